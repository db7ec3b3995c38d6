"""Selection by resolution: counting, the whole command, and that a killed run ends like one left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import picture
from datasets import Dataset, Features, Image, Value
from helpers import SHORT_PROMPTS, answer, png
from PIL import Image as PILImage
from transformers import AutoModelForImageTextToText, AutoProcessor

from data_prep import select
from data_prep.counting import BothViews, count_rows
from data_prep.kinds import Kind, Rule
from data_prep.ways import RESOLUTIONS
from vt_trl.chat import ChatEncoder
from vt_trl.data import load_rows
from vt_trl.errors import ConfigError, JudgeOutage
from vt_trl.families import family_of
from vt_trl.features import ImageFeatures
from vt_trl.generation.base import Sample, SamplingSettings, ScriptedBackend
from vt_trl.generation.standalone import make_runner
from vt_trl.judges import make_judge, make_judge_reward
from vt_trl.rollout import Limits, RolloutRunner

K = Kind
ROOT = Path(__file__).resolve().parents[1]
SMALL = {"min_pixels": 3136, "prompts": SHORT_PROMPTS}


# Counting, with a script in place of the model: a picture's red value is its row's number.


class Reader:
    """Answers as ``script[row][view]`` says, one text per rollout in turn."""

    def __init__(self, tokenizer, script):
        self.tokenizer, self.script, self.turns = tokenizer, script, {}

    def __call__(self, request):
        image = request.images[0]
        key = image.getpixel((0, 0))[0], "low" if image.width == 28 else "full"
        text = self.script[key[0]][key[1]][next(self.turns.setdefault(key, count()))]
        finished = not text.endswith("…")
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = (*ids, self.tokenizer.eos_token_id) if finished else tuple(ids)
        return Sample(request.request_id, ids, (None,) * len(ids), finished)


@pytest.fixture
def scripted(checkpoint):
    """``script -> runner``: a rollout loop that says what a script says."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    family = family_of(AutoModelForImageTextToText.from_pretrained(checkpoint).config)
    encoder = ChatEncoder(processor.tokenizer, family, ImageFeatures(processor.image_processor))

    def make(script) -> RolloutRunner:
        backend = ScriptedBackend(Reader(processor.tokenizer, script))
        stop = [processor.tokenizer.eos_token_id]
        return RolloutRunner(lambda: BothViews(**SMALL), backend, encoder, stop, Limits(64, 64))

    return make


def stored(number: int, **changes) -> dict:
    row = {"id": f"r{number}", "image": PILImage.new("RGB", (56, 56), (number, 0, 0)), "question": "Which number?"}
    return row | {"answer": [str(number)], "data_source": "easy" if number % 2 else "hard"} | changes


def judge(**settings):
    return make_judge_reward(make_judge("rule"), max_failed=1.0, **settings)


def test_right_answers_are_counted_at_both_resolutions(scripted):
    right, wrong = answer("1"), answer("2")
    script = {
        1: {"low": [right, wrong, "no tags"], "full": [right] * 3},
        2: {"low": [answer("2")] * 3, "full": [answer("2"), "<think>and so on…", answer("2")]},
    }
    one, two = count_rows(
        scripted(script), [(4, stored(1)), (9, stored(2))], 3, SamplingSettings(), judge(), RESOLUTIONS
    )
    assert (one.number, one.id, one.source) == (4, "r1", "easy")
    assert one.verdicts == {"low": ["right", "wrong", "wrong"], "full": ["right"] * 3}
    assert one.answers["low"] == ["1", "2", None]
    assert one.statuses == {"low": {"answered": 2, "no_answer": 1}, "full": {"answered": 3}}
    assert one.tokens == {"low": 1, "full": 4}
    assert (one.right("low"), one.right("full"), one.kind(Rule(3, 2))) == (1, 3, K.NEEDS_FULL)
    assert two.right("full") == 2 and two.statuses["full"] == {"answered": 2, "truncated": 1}
    assert two.kind(Rule(3, 2)) is K.NEITHER
    assert one.sampled["full"] != one.sampled["low"]


def test_bad_rows_and_failed_verdicts_are_named_and_never_scored(scripted):
    """Row 1 leaves the rule judge open; row 2 has no picture, row 3 one that no rule can show, row 5 is fine."""
    prose = answer("somewhere between the third and the fourth, I believe")
    script = {1: {"low": [prose], "full": [answer("1")]}, 5: {"low": [answer("5")], "full": [answer("5")]}}
    rows = [
        (0, stored(1, answer=["the narrow street behind the church"])),
        (1, stored(2, image=b"no picture")),
        (2, stored(3, image=PILImage.new("RGB", (1000, 2)))),
        (3, stored(5)),
    ]
    open_, unreadable, narrow, good = count_rows(scripted(script), rows, 1, SamplingSettings(), judge(), RESOLUTIONS)
    assert open_.kind(Rule(1, 1)) is K.JUDGE_FAILED and open_.failures[0] == "no rule fits"
    assert unreadable.kind(Rule(1, 1)) is narrow.kind(Rule(1, 1)) is K.BAD_ROW
    assert "cannot read the image" in unreadable.error and "aspect ratio" in narrow.error
    assert unreadable.verdicts == {} and good.kind(Rule(1, 1)) is K.LOW_IS_ENOUGH
    with pytest.raises(JudgeOutage):
        strict = make_judge_reward(make_judge("rule"), max_failed=0.1)
        many = [(n, stored(1, answer=["the narrow street behind the church"])) for n in range(16)]
        count_rows(
            scripted({1: {"low": [prose] * 16, "full": [prose] * 16}}),
            many,
            1,
            SamplingSettings(),
            strict,
            RESOLUTIONS,
        )


# Draws that depend on the row alone.


def test_what_a_row_gets_does_not_depend_on_its_batch(checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    rows = [stored(n, way_shown="low", image=picture(n, (56, 56)), question="Which " * n + "?") for n in range(1, 4)]

    def sampled(chosen, seed, max_batch) -> list[list[int]]:
        runner = make_runner(model, processor, lambda: BothViews(**SMALL), Limits(12, 12), max_batch)
        found = runner.run(chosen, 2, SamplingSettings(seed=seed))
        return [list(rollout.turns[0].token_ids) for rollout in found]

    together = sampled(rows, 5, 16)
    assert sampled(rows[2:], 5, 1) == together[4:] and sampled(rows[::-1], 5, 3)[:2] == together[4:]
    assert together[0] != together[1] and sampled(rows, 6, 16) != together
    with pytest.raises(ConfigError, match="top_p"):
        make_runner(model, processor, BothViews, Limits(1, 1)).run([], 1, SamplingSettings(seed=0, top_p=0.9))


# The whole command.


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A folder of ten rows; the picture of row 7 is broken."""
    root = tmp_path / "rows"
    root.mkdir()
    lines = []
    for number in range(10):
        (root / f"{number}.png").write_bytes(b"broken" if number == 7 else png((number + 1, 0, 0), (56, 56)))
        lines.append(json.dumps(stored(number + 1, image=f"{number}.png")))
    (root / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


def options(dataset, model, out, *more: str):
    words = ["--dataset", dataset, "--model", model, "--out", out, "--shard-rows", 2, "--max-turn-tokens", 6]
    words += ["--rollouts", 2, "--margin", 2, "--environment-args", json.dumps(SMALL), "--backend", "transformers"]
    return select.parser().parse_args([*map(str, words), *more])


@pytest.fixture
def reads(scripted, monkeypatch):
    """The command with a script for a model: rows 1 to 5 legible at both resolutions, the rest at full only."""
    script = {n: {"low": [answer(str(n if n <= 5 else 0))] * 2, "full": [answer(str(n))] * 2} for n in range(1, 11)}
    monkeypatch.setattr(select.Job, "runner", property(lambda job: scripted(script)))


def test_rows_are_chosen_and_reported(dataset, checkpoint, tmp_path, reads):
    out = tmp_path / "out"
    select.run(options(dataset, checkpoint, out, "--size", "4"))
    report = json.loads((out / "report.json").read_text())
    assert report["rows_by_kind"] == {
        "low_is_enough": 5,
        "needs_full": 4,
        "neither": 0,
        "judge_failed": 0,
        "bad_row": 1,
    }
    assert report["histogram"][2][2] == 5 and report["histogram"][0][2] == 4
    assert (report["chosen"], report["short_of_size"]) == (4, 0)
    assert [bad["row"] for bad in report["bad_rows"]] == [7]
    assert sum(source["chosen"] for source in report["sources"].values()) == 4
    rows = load_rows(out / "rows")
    assert len(rows) == 4 and sum(rows["needs_full"]) == 2
    assert all(row["needs_full"] == (int(row["id"][1:]) > 5) for row in rows)
    assert set(rows["right_full"]) == {2} and rows[0]["image"]["bytes"]
    page = (out / "report.html").read_text()
    assert page.count("<article>") == 4 + 4 + 1 and "Needs full (4)" in page and "cannot read the image" in page


def test_a_page_shows_what_a_data_set_says_as_text(scripted, monkeypatch, tmp_path, checkpoint):
    row = stored(1, question="<script>alert(1)</script>", answer="1", data_source="<b>$x_1$")
    kinds = Features({name: Value("string") for name in row} | {"image": Image()})
    Dataset.from_list([row], features=kinds).save_to_disk(tmp_path / "rows")
    script = {1: {"low": [answer("<img src=x>")] * 2, "full": [answer("1")] * 2}}
    monkeypatch.setattr(select.Job, "runner", property(lambda job: scripted(script)))
    select.run(options(tmp_path / "rows", checkpoint, tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>" not in page and "<img src=x>" not in page and "<b>" not in page
    assert "&lt;script&gt;" in page


def test_processes_do_their_own_shards_and_the_first_one_finishes(dataset, checkpoint, tmp_path, reads, monkeypatch):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    select.run(options(dataset, checkpoint, alone))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        select.run(options(dataset, checkpoint, shared))
        if rank == "1":
            assert sorted(path.name for path in (shared / "work").glob("*.jsonl")) == ["000001.jsonl", "000003.jsonl"]
            assert not (shared / "report.json").exists()
    assert outcome(shared) == outcome(alone)


def outcome(out: Path) -> dict:
    """All a selection leaves behind that does not name its folder."""
    files = {path.name: path.read_text() for path in sorted((out / "work").glob("*.jsonl"))}
    return files | {"rows": load_rows(out / "rows").to_list() if (out / "rows").exists() else []}


def test_other_settings_do_not_go_on_with_the_work(dataset, checkpoint, tmp_path, reads):
    out = tmp_path / "out"
    select.run(options(dataset, checkpoint, out))
    select.run(options(dataset, checkpoint, out, "--size", "2", "--share-full", "0"))  # only the choice is new
    assert not any(load_rows(out / "rows")["needs_full"])
    with pytest.raises(ConfigError, match="temperature was 1.0 and is 0.7"):
        select.run(options(dataset, checkpoint, out, "--temperature", "0.7"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--environment-args", '{"resolution": "low"}'], "both"),
        (["--environment-args", "[1]"], "must map names to settings"),
        (["--margin", "3"], "margin"),
        (["--backend", "vlm"], "backend"),
        (["--judge-args", '{"api_key": "x"}'], "api_key"),
    ],
)
def test_settings_that_cannot_work(dataset, checkpoint, tmp_path, more, words):
    with pytest.raises(ConfigError, match=words):
        select.run(options(dataset, checkpoint, tmp_path / "out", *more))


def test_a_killed_selection_ends_like_one_left_alone(dataset, checkpoint, tmp_path):
    """SIGKILL as soon as a shard is there; the model is a random one, so that every digest of samples counts."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    run = partial(options, dataset, checkpoint)
    select.run(run(alone))
    words = [sys.executable, "-m", "data_prep.select", *words_of(run(killed))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list((killed / "work").glob("0*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert 1 <= len(list((killed / "work").glob("0*.jsonl"))) < 5 and not (killed / "report.json").exists()
    select.run(run(killed))
    assert outcome(killed) == outcome(alone)
    sampled = [record["sampled"].get("low") for record in records(alone)]
    assert sampled[7] is None and len(set(sampled)) == 10


def records(out: Path) -> list[dict]:
    return [json.loads(line) for path in sorted((out / "work").glob("*.jsonl")) for line in path.open()]


def words_of(chosen) -> list[str]:
    """The command line of options, as far as these tests set them."""
    names = "dataset", "model", "out", "shard_rows", "max_turn_tokens", "rollouts", "margin", "environment_args"
    words = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(chosen, name)))]
    return [*words, "--backend", "transformers"]


def test_committed_figures_are_those_of_the_readme_and_good_enough():
    report = json.loads((ROOT / "docs/results/selection.json").read_text(encoding="utf-8"))
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    full, low = report["precision_needs_full"], report["precision_low_is_enough"]
    assert report["rows"] >= 400 and min(full, low) >= 0.95
    assert report["kills"] >= 1 and report["same_output_after_kills"] is True
    assert (
        f'called "needs full" are hard | {full:.1%}' in text and f'called "low is enough" are easy | {low:.1%}' in text
    )
    assert f"are found | {report['recall_needs_full']:.1%}, {report['recall_low_is_enough']:.1%}" in text
