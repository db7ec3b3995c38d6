"""Traces: what a writer is sent, what is kept, what is rejected and why, against a server on this machine."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from helpers import CALL, SHORT_PROMPTS, answer, png
from PIL import Image

from benchmarks.judge_server import JudgeServer, content, server_error, status
from data_prep import traces
from data_prep.speaking import EndpointSpeaker
from data_prep.tracing import WriterOutage, fault_of
from data_prep.writers import HINTS, Steered
from vt_trl.data import episode_row, load_rows
from vt_trl.dialogue import Dialogue, replay, trl_example
from vt_trl.envs import ResizeEnv
from vt_trl.errors import ConfigError, DataError
from vt_trl.judges.base import Judgement
from vt_trl.types import Done, RolloutStatus

KEY = "sk-test-0123456789"
SMALL = {"min_pixels": 3136, "prompts": SHORT_PROMPTS}


@pytest.fixture(autouse=True)
def _key(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_rows(folder: Path, *needs_full: bool | None) -> Path:
    """A row per entry: a plain picture of red value 1, 2, ..., whose answer is that number."""
    folder.mkdir()
    lines = []
    for number, full in enumerate(needs_full, start=1):
        (folder / f"{number}.png").write_bytes(png((number, 0, 0), (112, 56)))
        row = {"id": f"r{number}", "image": f"{number}.png", "question": f"What is {number}?", "answer": str(number)}
        row["data_source"] = "signs"
        lines.append(json.dumps(row if full is None else row | {"needs_full": full}))
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def shown(request) -> list[Image.Image]:
    """The pictures of a request, in order."""
    parts = [part for m in request.body["messages"] if isinstance(m["content"], list) for part in m["content"]]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) for url in urls]


def run(rows: Path, out: Path, script, *more: str):
    with JudgeServer(script) as server:
        words = ["--dataset", rows, "--out", out, "--model", "strong", "--environment-args", json.dumps(SMALL)]
        words += ["--endpoint-args", json.dumps({"base_url": server.base_url, "max_attempts": 1}), *more]
        traces.run(traces.parser().parse_args([str(word) for word in words]))
        return server.requests


def rejected(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def test_two_turns_and_one_are_written_as_the_environment_plays_them(tmp_path):
    """Row 1 asks first and row 2 answers at once; both are told so, and neither trace holds the hint."""
    rows = write_rows(tmp_path / "rows", True, False)

    def script(request):
        number = shown(request)[0].getpixel((0, 0))[0]
        return content(CALL if number == 1 and len(shown(request)) == 1 else answer(str(number)))

    requests = run(rows, tmp_path / "out", script)
    assert len(requests) == 3
    assert sorted([image.size for image in shown(request)] for request in requests) == [
        [(56, 28)],
        [(56, 28)],
        [(56, 28), (112, 56)],
    ]
    texts = [json.dumps(request.body["messages"]) for request in requests]
    assert (
        sum(HINTS[True][:40] in text for text in texts) == 2 and sum(HINTS[False][:40] in text for text in texts) == 1
    )
    assert all(KEY not in text for text in texts)
    two, one = load_rows(tmp_path / "out")
    assert (two["id"], two["replies"], two["route"]) == ("r1", [CALL, answer("1")], "asked")
    assert (one["id"], one["replies"], one["route"]) == ("r2", [answer("2")], "direct")
    assert two["written_by"] == "strong" and two["needs_full"] and two["answer"] == ["1"]
    played = replay(ResizeEnv(**SMALL), episode_row(two), two["replies"])
    assert [image.size for image in played.images] == [(56, 28), (112, 56)]
    assert played.images[0].getpixel((0, 0))[0] == 1
    assert not any(hint[:40] in message.text for message in played.messages for hint in HINTS.values())
    written = [path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert not any(KEY.encode() in data for data in written)


def test_tries_are_rejected_by_reason_and_tried_again(tmp_path):
    """Row 1: wrong, then right. Row 2: malformed, then cut. Row 3: prose that no rule decides, twice."""
    rows = write_rows(tmp_path / "rows", None, None, None)
    plays = {
        1: [content(answer("9")), content(answer("1"))],
        2: [content("2"), content("<think>and so on", finish_reason="length")],
        3: [content(answer("it can be seen in the corner over there"))] * 2,
    }
    left = {number: iter(play) for number, play in plays.items()}
    out = tmp_path / "out"
    requests = run(rows, out, lambda request: next(left[shown(request)[0].getpixel((0, 0))[0]]))
    assert len(requests) == 6
    (kept,) = load_rows(out)
    assert (kept["id"], kept["replies"]) == ("r1", [answer("1")])
    units = json.loads((out / "manifest.json").read_text())["units"].values()
    fates = [{name: count for name, count in unit["counts"].items() if "\t" in name} for unit in units]
    assert fates == [
        {
            "sample\tsigns\twrong": 1,
            "sample\tsigns\tmalformed/no_move": 1,
            "sample\tsigns\tjudge_failed": 2,
            "sample\tsigns\tmalformed/truncated": 1,
            "sample\tsigns\tkept": 1,
            "row\tsigns\tkept": 1,
            "row\tsigns\tno_trace": 2,
        }
    ]
    first, *_ = rejected(out)
    assert (first["id"], first["reason"], first["detail"]) == ("r1", "wrong", "9")
    assert first["replies"] == [answer("9")]
    assert len(rejected(out)) == 5


def test_rows_and_requests_that_fail_are_named_and_an_outage_stops_the_run(tmp_path):
    rows = write_rows(tmp_path / "rows", *[None] * 6)
    (rows / "2.png").write_bytes(b"broken")

    def script(request):
        number = shown(request)[0].getpixel((0, 0))[0]
        return status(400) if number == 5 else content(answer(str(number)))

    out = tmp_path / "out"
    with pytest.raises(WriterOutage, match="1 of 5 requests.*HTTP 400"):
        run(rows, out, script, "--attempts", "1")
    with pytest.raises(DataError, match="incomplete"):
        load_rows(out)
    requests = run(rows, out, script, "--attempts", "1", "--max-failed", "0.5")
    assert [row["id"] for row in load_rows(out)] == ["r1", "r3", "r4", "r6"] and len(requests) == 5
    assert [(one["id"], one["reason"]) for one in rejected(out)] == [("r2", "bad_row"), ("r5", "writer_failed")]
    with pytest.raises(WriterOutage):
        run(rows, tmp_path / "other", server_error(), "--attempts", "1")


def test_finished_units_are_not_asked_for_again(tmp_path):
    rows, out = write_rows(tmp_path / "rows", *[None] * 4), tmp_path / "out"
    down = {3, 4}

    def script(request):
        number = shown(request)[0].getpixel((0, 0))[0]
        return status(400) if number in down else content(answer(str(number)))

    with pytest.raises(WriterOutage):
        run(rows, out, script, "--unit-rows", "2")
    down.clear()
    requests = run(rows, out, script, "--unit-rows", "2")  # at another port
    assert sorted(shown(request)[0].getpixel((0, 0))[0] for request in requests) == [3, 4]
    assert [row["id"] for row in load_rows(out)] == ["r1", "r2", "r3", "r4"]
    assert run(rows, out, script, "--unit-rows", "2") == []
    with pytest.raises(ConfigError, match="another run"):
        run(rows, out, script, "--unit-rows", "2", "--temperature", "0.1")


def finished(*replies: str, needs_full: bool | None = None):
    row = {"image": Image.new("RGB", (56, 56)), "question": "What?", "answer": ["1"], "needs_full": needs_full}
    dialogue = Dialogue(ResizeEnv(**SMALL), row)
    for reply in replies:
        dialogue.say(reply)
    return dialogue.rollout()


@pytest.mark.parametrize(
    ("replies", "needs_full", "judgement", "reason"),
    [
        ([answer("1")], None, True, None),
        ([CALL, answer("1")], True, True, None),
        ([answer("1")], True, True, "wrong_route"),
        ([CALL, answer("1")], False, True, "wrong_route"),
        ([answer("2")], None, False, "wrong"),
        (["1"], None, True, "malformed/no_move"),
        ([f"so {answer('1')}"], None, True, "malformed/stray_text"),
        ([CALL, CALL], None, True, "malformed/call_after_image"),
        (["<tool_call>{}</tool_call>", answer("1")], None, True, "malformed/bad_json"),
    ],
)
def test_what_is_no_trace(replies, needs_full, judgement, reason):
    assert fault_of(finished(*replies, needs_full=needs_full), Judgement.of(judgement), steered=True) == reason


def test_routes_are_free_without_steering():
    rollout = finished(answer("1"), needs_full=True)
    assert fault_of(rollout, Judgement.of(True), steered=False) is None
    assert fault_of(rollout, Judgement.failed("down"), steered=False) == "judge_failed"


def test_a_steered_environment_forks_and_plays_like_the_plain_one():
    row = {"image": Image.new("RGB", (56, 56)), "question": "What?", "answer": ["1"], "needs_full": True}
    environment = Steered(ResizeEnv(**SMALL))
    first = environment.reset(row)
    one, other = environment.fork(), environment.fork()
    assert first.messages[-1].text.endswith(HINTS[True]) and environment.max_turns == 2
    assert one.step(CALL).granted and one.step(answer("1")) == Done(RolloutStatus.ANSWERED, answer="1")
    assert other.step(CALL).granted  # its own turns


def test_replies_that_are_no_episode_are_refused():
    row = {"image": Image.new("RGB", (56, 56)), "question": "What?", "answer": ["1"]}
    for replies, words in [
        ([], "still open"),
        ([CALL], "still open after its 1"),
        ([answer("1"), answer("1")], "ends with reply 1 of 2"),
        ([f"so {answer('1')}"], "reply 1 is malformed .stray_text"),
    ]:
        with pytest.raises(DataError, match=words):
            replay(ResizeEnv(**SMALL), row, replies)


def test_the_format_of_trl_has_the_pictures_in_their_turns():
    row = {"image": Image.new("RGB", (56, 56)), "question": "What?", "answer": ["1"]}
    example = trl_example(replay(ResizeEnv(**SMALL), row, [CALL, answer("1")]))
    kinds = [[part["type"] for part in message["content"]] for message in example["messages"]]
    assert [message["role"] for message in example["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert kinds == [["text"], ["image", "text", "text"], ["text"], ["text", "image", "text"], ["text"]]
    assert [image.size for image in example["images"]] == [(28, 28), (56, 56)]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--endpoint-args", '{"api_key": "x"}'], "OPENAI_API_KEY"),
        (["--endpoint-args", '{"bse_url": "x"}'], "bse_url"),
        (["--attempts", "0"], "attempts"),
        (["--environment", "resise"], "Did you mean 'resize'"),
    ],
)
def test_settings_that_cannot_work(tmp_path, more, words):
    rows = write_rows(tmp_path / "rows", None)
    options = traces.parser().parse_args(["--dataset", str(rows), "--out", str(tmp_path / "o"), "--model", "m", *more])
    with pytest.raises(ConfigError, match=words):
        traces.run(options)


def test_no_key_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="the writer is openai.*OPENAI_API_KEY"):
        EndpointSpeaker("m", "the writer is openai", "--endpoint-args", 0.7, 16)
