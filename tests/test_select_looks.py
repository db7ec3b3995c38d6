"""Selection by looking: rows answered at once and after a look, in any environment that looks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import picture
from helpers import answer, png
from PIL import Image as PILImage
from test_env_zoom import EIGHT, call, inline
from transformers import AutoProcessor

from data_prep import select
from data_prep.counting import both_ways
from data_prep.ways import LOOKS, RESOLUTIONS, WAY, ways_of
from vt_trl.data import episode_row, load_rows
from vt_trl.envs import ZoomEnv
from vt_trl.errors import ConfigError
from vt_trl.generation import standalone
from vt_trl.generation.base import Sample, ScriptedBackend
from vt_trl.types import RolloutStatus

ROW = {"id": "r", "image": picture(1, (112, 112)), "question": "What?", "answer": ["5"]}
BOX = [0, 56, 56, 112]  # the lower left quarter of 112 x 112


def shown(environment, way: str, row=ROW):
    opening = environment.reset({**row, WAY: way})
    return [image for one in opening.messages for image in one.images], "".join(one.text for one in opening.messages)


def test_the_opening_is_answered_at_once_without_a_tool_or_looked_into():
    environment = both_ways("zoom", {"turns": 3}, EIGHT)()
    images, text = shown(environment, "at_once")
    assert "zoom_image" not in text and "What?" in text
    assert environment.step(call([0, 500, 500, 1000])).status is RolloutStatus.TURN_LIMIT  # no tool, no second turn
    again, text = shown(environment, "looking")
    assert "zoom_image" in text and "call the tool first" in text
    assert [one.tobytes() for one in again] == [one.tobytes() for one in images]
    twin = environment.fork()
    looked = twin.step(call([0, 500, 500, 1000]))
    assert looked.granted and looked.regions[0].box == (0, 56, 56, 112)
    assert twin.step(answer("5")).answer == "5" and environment.step(call([0, 500, 500, 1000])).granted
    assert "call the tool first" not in shown(both_ways("zoom", {}, EIGHT, steer=False)(), "looking")[1]


def test_boxes_inside_the_reasoning_stop_the_looking_way_alone():
    environment = both_ways("zoom", {"shape": "inline"})()
    shown(environment, "at_once")
    assert environment.stop_texts == () and not environment.goes_on("{")
    shown(environment, "looking")
    assert environment.stop_texts == ("}",) and environment.step(inline(BOX)).granted


def test_environments_and_their_ways():
    assert ways_of("direct") is ways_of("resize") is RESOLUTIONS
    assert ways_of("zoom") is ways_of("look") is ways_of("helpers:ZoomsFirst") is LOOKS
    with pytest.raises(ConfigError, match="one turn"):
        both_ways("zoom", {"turns": 1})
    with pytest.raises(ConfigError, match="Did you mean 'zoom'"):
        both_ways("zom", {})
    low, full = (shown(both_ways("resize", {"min_pixels": 3136})(), way)[0][0].size for way in RESOLUTIONS.names)
    assert (low, full) == ((56, 56), (112, 112))


class Own(ZoomEnv):
    """One of a user's own, by `module:Class`."""


class Reader:
    """Rows 1 to 3 are read at once; 4 to 6 only after a look; 7 never; with row 8 nobody looks."""

    def __init__(self, tokenizer, box):
        self.tokenizer, self.box = tokenizer, box

    def __call__(self, request) -> Sample:
        text, number = self.tokenizer.decode(request.token_ids), request.images[0].getpixel((0, 0))[0]
        looking, looked = "zoom_image" in text, "tool_response" in text
        if looking and not looked and number != 8:
            said = call(self.box, **({"image": 1} if "images are numbered" in text else {}))
        else:
            said = answer(str(number if number <= 3 or (looked and number <= 6) else 0))
        ids = self.tokenizer(said, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = (*ids, self.tokenizer.eos_token_id)
        return Sample(request.request_id, ids, (None,) * len(ids), True)


@pytest.fixture
def reads(checkpoint, monkeypatch):
    """The command on a real checkpoint's processor, with a script in place of its weights."""
    tokenizer = AutoProcessor.from_pretrained(checkpoint).tokenizer
    monkeypatch.setattr(standalone, "open_backend", lambda *given: ScriptedBackend(Reader(tokenizer, BOX)))


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Nine rows of 112 x 112, red as their number; the last one's picture is broken. Row 2 and 5 have two pictures."""
    root = tmp_path / "rows"
    root.mkdir()
    lines = []
    for number in range(1, 10):
        (root / f"{number}.png").write_bytes(b"broken" if number == 9 else png((number, 0, 0), (112, 112)))
        PILImage.new("RGB", (56, 112)).save(root / "other.png")
        images = [f"{number}.png", "other.png"] if number in (2, 5) else f"{number}.png"
        lines.append(json.dumps({"id": f"r{number}", "images": images, "question": "Which?", "answer": str(number)}))
    (root / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


def options(dataset, model, out, environment: str, **arguments):
    words = ["--dataset", dataset, "--model", model, "--out", out, "--environment", environment, "--rollouts", 2]
    words += ["--margin", 2, "--backend", "transformers", "--max-turn-tokens", 200, "--examples", 9]
    words += ["--environment-args", json.dumps(arguments), "--shard-rows", 3]
    return select.parser().parse_args([str(word) for word in words])


@pytest.mark.parametrize("environment", ["zoom", "look", "test_select_looks:Own"])
def test_rows_are_chosen_by_what_a_look_brings(dataset, checkpoint, tmp_path, reads, environment):
    """With `look` rows of two pictures take part; where one picture is the limit they are bad rows like the broken."""
    out, takes_two = tmp_path / "out", environment == "look"
    arguments = {"turns": 3} | ({"pictures": 2, "start_scale": 1.0} if takes_two else {})
    select.run(options(dataset, checkpoint, out, environment, **arguments))
    report = json.loads((out / "report.json").read_text())
    enough, needed, bad = (3, 3, 1) if takes_two else (2, 2, 3)
    assert report["rows_by_kind"] == {
        "at_once_is_enough": enough,
        "needs_looking": needed,
        "neither": 2,
        "judge_failed": 0,
        "bad_row": bad,
    }
    assert report["chosen_needs_looking"] == needed and report["chosen_at_once_is_enough"] == enough
    judged = enough + needed + 2
    assert report["accuracy"] == pytest.approx({"at_once": enough / judged, "looking": (enough + needed) / judged})
    assert report["looked"] == pytest.approx((judged - 1) / judged)  # row 8 did not
    rows = load_rows(out / "rows")
    assert {row["id"]: row["needs_full"] for row in rows} == {
        f"r{number}": number > 3 for number in range(1, 7) if takes_two or number not in (2, 5)
    }
    assert set(rows["right_looking"]) == {2} and set(rows["right_at_once"]) == {0, 2}
    if takes_two:
        pair = episode_row(rows[1], 2)
        assert [image.size for image in pair["images"]] == [(112, 112), (56, 112)]
    page = (out / "report.html").read_text()
    assert "Needs looking (" in page and "resolution" not in page and "full picture" not in page
    assert "1 need a closer look" not in page and f"{needed} need a closer look" in page
    # Both rollouts of every row that looked, on the picture: a quarter of it, at the lower left.
    assert page.count('<rect x="0%" y="50%" width="50%" height="50%"/>') == 2 * (judged - 1)
    assert page.count("<img src") == 2 + judged + (2 if takes_two else 0)  # two plots; each picture once


def test_work_of_another_environment_is_refused(dataset, checkpoint, tmp_path, reads):
    select.run(options(dataset, checkpoint, tmp_path / "out", "zoom", turns=3))
    with pytest.raises(ConfigError, match="environment was 'zoom' and is 'look'"):
        select.run(options(dataset, checkpoint, tmp_path / "out", "look", turns=3))
