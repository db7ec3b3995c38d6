"""Difficulty from the command to the rows: pass rates, ratings, bands, drift, and the bands a stage trains on."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from helpers import answer
from hypothesis import given
from hypothesis import strategies as st
from test_traces import _key, shown, write_rows  # noqa: F401 - _key is a fixture

from benchmarks.judge_server import JudgeServer, content, server_error
from data_prep import difficulty, filter  # noqa: A004
from data_prep.bands import Measured, Ruler, Scale, centres_of, drift, make_ruler
from data_prep.rating import RUBRIC, read_rating
from data_prep.tracing import WriterOutage
from vt_trl.data import load_rows
from vt_trl.errors import ConfigError, DataError
from vt_trl.evaluation.rows import Evaluation, RowResult
from vt_trl.evaluation.shards import Cell, shard_path, write_shard


def measured(*pairs: tuple[float | None, float | None]) -> list[Measured]:
    return [Measured(*pair) for pair in pairs]


def test_difficulty_is_the_mean_z_score_worked_out_by_hand():
    """Errors 0, 0.5, 1 and ratings 2, 5, 8: both z-scores are -1.2247, 0, 1.2247, and so is their mean."""
    rows = measured((1.0, 2.0), (0.5, 5.0), (0.0, 8.0), (None, 9.0), (0.0, None))
    ruler = make_ruler(rows, ("error", "rating"), 0)
    assert ruler.scales == {"error": Scale(0.5, pytest.approx(0.40825, abs=1e-5)),
                            "rating": Scale(5.0, pytest.approx(2.44949, abs=1e-5))}  # fmt: skip
    scores = [ruler.difficulty(row) for row in rows]
    assert scores == [pytest.approx(-1.22474, abs=1e-5), 0.0, pytest.approx(1.22474, abs=1e-5), None, None]
    assert [ruler.band(one) for one in scores] == ["easy", "medium", "hard", None, None]
    mixed = ruler.difficulty(Measured(0.5, 8.0))  # 0 and 1.2247
    assert mixed == pytest.approx(0.61237, abs=1e-5)


def test_bands_are_clusters_in_order_and_the_same_every_time():
    rows = measured(*[(one / 100, None) for one in (99, 98, 97, 60, 58, 10, 9, 8, 7)])
    rulers = [make_ruler(order, ("error",), 3) for order in (rows, rows, rows[::-1])]
    assert all(list(one.centres) == sorted(one.centres) and len(one.centres) == 3 for one in rulers)
    assert rulers[0] == rulers[1]
    bands = [[ruler.band(ruler.difficulty(row)) for row in rows] for ruler in rulers]
    assert bands[0] == bands[1] == bands[2] == ["easy"] * 3 + ["medium"] * 2 + ["hard"] * 4


def test_fewer_different_rows_make_fewer_bands():
    assert centres_of([], 0) == () and Ruler({}, ()).band(1.0) is None
    same, two = (
        make_ruler(measured((0.5, None)) * 4, ("error",), 0),
        make_ruler(measured((0, None), (1, None)), ("error",), 0),
    )
    assert [same.band(same.difficulty(Measured(0.5)))] == ["medium"]
    assert [two.band(two.difficulty(Measured(rate))) for rate in (1.0, 0.0)] == ["easy", "hard"]


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.integers(0, 3))
def test_a_harder_row_is_never_in_an_easier_band(scores, seed):
    ruler = Ruler({}, centres_of(scores, seed))
    order = {"easy": 0, "medium": 1, "hard": 2}
    bands = [order[ruler.band(score)] for score in sorted(scores)]
    assert bands == sorted(bands)


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ('{"rating": 7}', 7),
        ('```json\n{"rating": "7"}\n```', 7),
        ("<think>2 or 3? A rating of 3.</think>\nRating: 8/10", 8),
        ("**Rating:** 4", 4),
        ("I would say 6/10.", 6),
        ("6 out of 10", 6),
        (" 5. ", 5),
        ("A rating of 7.5", 7.5),
        ('{"rating": 7} or {"rating": 8}', None),
        ('{"rating": 11}', None),
        ('{"rating": 0}', None),
        ('{"rating": true}', None),
        ('{"rating": NaN}', None),
        ("hard", None),
        ("", None),
        ("It has 3 steps.", None),
        ("<think>rating: 4", None),
        ("rating: 1000", None),
        ("between 3 and 4", None),
        ("x" * 5000 + "7/10", None),
    ],
)
def test_ratings_are_read_or_not_there(text, rating):
    assert read_rating(text) == rating


@given(st.text(max_size=300))
def test_no_reply_breaks_the_reader(text):
    found = read_rating(text)
    assert found is None or 1 <= found <= 10


def test_drift_by_hand():
    """b: medium to easy. c: hard to medium, by a ruler of its own round; by the earlier one it stays hard."""
    earlier = Ruler({"error": Scale(0.5, 0.5)}, (-1.0, 0.0, 1.0))
    before = {
        "a": (Measured(1.0, 2.0), "easy"),
        "b": (Measured(0.5, 4.0), "medium"),
        "c": (Measured(0.0, None), "hard"),
        "gone": (Measured(0.0, 1.0), "hard"),
    }
    now = {
        "a": (Measured(1.0, 2.0), "easy"),
        "b": (Measured(1.0, 5.0), "easy"),
        "c": (Measured(0.1, 9.0), "medium"),
        "new": (Measured(None, None), None),
    }
    found = drift(before, now, earlier)
    assert (found["rows"], found["only_before"], found["only_now"]) == (3, 1, 1)
    assert found["transitions"]["medium"] == {"easy": 1, "medium": 0, "hard": 0}
    assert found["transitions"]["hard"] == {"easy": 0, "medium": 1, "hard": 0}
    assert found["on_earlier_scale"]["hard"] == {"easy": 0, "medium": 0, "hard": 1}  # z = (0.9 - 0.5) / 0.5 = 0.8
    assert found["mean_shift"] == {"pass_rate": pytest.approx(0.2), "rating": 0.5}


# The whole command, against a server that plays the current model and the rater.

RATES = {1: 4, 2: 4, 3: 2, 4: 2, 5: 0, 6: 0}  # right answers of four
RATINGS = {1: "1", 2: '{"rating": 2}', 3: "5", 4: "Rating: 5/10", 5: "9", 6: "who knows"}


def number_of(question: str) -> int:
    return int(question.split()[-1].strip("?"))


def script_of(rates=RATES, ratings=RATINGS, down=()):
    seen: dict[int, int] = {}

    def script(request):
        first = request.body["messages"][0]["content"]
        if first == RUBRIC:
            number = number_of(request.case["question"])
            return server_error() if number in down else content(ratings[number])
        number = shown(request)[0].getpixel((0, 0))[0]
        seen[number] = seen.get(number, 0) + 1
        return content(answer(str(number if seen[number] <= rates[number] else 0)))

    return script


def run(rows: Path, out: Path, script, *more: str, model: bool = True, rater: bool = True, server=None):
    with nullcontext(server) if server else JudgeServer() as server:
        server.script, before = script, len(server.requests)
        args = json.dumps({"base_url": server.base_url, "max_attempts": 1})
        words = ["--dataset", rows, "--out", out, "--samples", 4, *more]
        words += ["--model", "now", "--endpoint-args", args] if model else []
        words += ["--rater-model", "judge", "--rater-args", args] if rater else []
        difficulty.run(difficulty.parser().parse_args([str(word) for word in words]))
        return server.requests[before:]


def test_rows_get_their_bands_and_what_is_undecided_is_counted_and_no_zero(tmp_path):
    rows, out = write_rows(tmp_path / "rows", *[None] * 7), tmp_path / "out"
    (rows / "7.png").write_bytes(b"broken")
    ratings = RATINGS | {7: "5"}
    requests = run(rows, out, script_of(RATES, ratings), "--unit-rows", "3")
    assert len(requests) == 6 * 4 + 7
    answers = [request for request in requests if request.body["model"] == "now"]
    assert len({request.body["seed"] for request in answers}) == 24
    found = load_rows(out)
    assert found["band"] == ["easy", "easy", "medium", "medium", "hard", None]
    assert found["pass_rate"] == [1.0, 1.0, 0.5, 0.5, 0.0, 0.0] and found["rating"] == [1, 2, 5, 5, 9, None]
    assert found["difficulty"][5] is None and found["difficulty"][0] < found["difficulty"][2] < found["difficulty"][4]
    assert found["answer"][0] == ["1"]
    report = json.loads((out / "report.json").read_text())
    assert report["bands"] == {"easy": 2, "medium": 2, "hard": 1}
    assert report["undecided"] == {"no rating": 1, "bad row": 1} and report["rows"] == 7
    assert report["sources"] == {"signs": {"easy": 2, "medium": 2, "hard": 1, "undecided": 2}}
    assert report["mean"]["pass_rate"] == 0.5 and report["spent"]["rater"]["replies"] == 7
    (bad,) = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert (bad["id"], bad["reason"]) == ("r7", "bad_row")


def test_a_stage_trains_on_bands_and_the_next_round_says_what_moved(tmp_path):
    rows, first, second = write_rows(tmp_path / "rows", *[None] * 6), tmp_path / "first", tmp_path / "second"
    ratings = RATINGS | {6: "9"}
    run(rows, first, script_of(RATES, ratings))
    options = filter.parser().parse_args([str(first), "--out", str(tmp_path / "stage"), "--band", "medium", "hard",
                                          "--workers", "0"])  # fmt: skip
    filter.run(options)
    chosen = load_rows(tmp_path / "stage")
    assert chosen["id"] == ["r3", "r4", "r5", "r6"] and chosen["band"] == ["medium", "medium", "hard", "hard"]
    assert json.loads((tmp_path / "stage" / "report.json").read_text())["dropped"] == {"other band": 2}
    run(rows, second, script_of(RATES | {3: 4, 4: 4}, ratings), "--before", str(first))
    report = json.loads((second / "report.json").read_text())["drift"]
    assert report["before"] == "first" and report["rows"] == 6
    assert report["transitions"]["medium"]["easy"] + report["transitions"]["medium"]["medium"] == 2
    assert report["mean_shift"]["pass_rate"] == pytest.approx(1 / 6) and report["mean_shift"]["rating"] == 0
    with pytest.raises(ConfigError, match="no column 'band'"):
        filter.run(
            filter.parser().parse_args([str(rows), "--out", str(tmp_path / "x"), "--band", "hard", "--workers", "0"])
        )
    with pytest.raises(DataError, match="has no column"):
        run(rows, tmp_path / "third", script_of(), "--before", str(rows))


def test_one_measure_will_do(tmp_path):
    rows = write_rows(tmp_path / "rows", *[None] * 4)
    lines = [json.loads(line) | {"right": number} for number, line in enumerate((rows / "data.jsonl").open())]
    lines[3]["right"] = None
    (rows / "data.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert run(rows, tmp_path / "a", script_of(), "--pass-rate", "right/2", model=False, rater=False) == []
    found = load_rows(tmp_path / "a")
    assert found["pass_rate"] == [0.0, 0.5, 1.0, None] and found["band"] == ["hard", "medium", "easy", None]
    assert set(found["rating"]) == {None}
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["undecided"] == {"no pass rate": 1}
    assert len(run(rows, tmp_path / "b", script_of(), model=False)) == 4
    assert load_rows(tmp_path / "b")["band"] == ["easy", "medium", "hard", "hard"]  # 1, 2, 5, 5


def test_work_that_is_done_is_not_done_again_and_an_outage_stops_the_run(tmp_path):
    rows, out = write_rows(tmp_path / "rows", *[None] * 6), tmp_path / "out"
    with JudgeServer() as server:
        with pytest.raises(WriterOutage, match="requests to the rater failed"):
            run(rows, out, script_of(down=(4, 5, 6)), "--unit-rows", "3", server=server)
        with pytest.raises(DataError):
            load_rows(out)
        requests = run(rows, out, script_of(), "--unit-rows", "3", server=server)
        assert sorted(number_of(one.case["question"]) for one in requests) == [4, 5, 6]
        assert run(rows, out, script_of(), "--unit-rows", "3", server=server) == []
        with pytest.raises(ConfigError, match="another run"):
            run(rows, out, script_of(), "--unit-rows", "3", "--temperature", "0.5", server=server)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "nothing to measure"),
        (["--model", "m", "--pass-rate", "x"], "--pass-rate and --model"),
        (["--pass-rate", "x/0"], "COLUMN/N"),
        (["--pass-rate", "right"], "no column 'right'"),
        (["--model", "m", "--samples", "0"], "counts from 1"),
        (["--model", "m", "--temperature", "0"], "all samples of a row are equal"),
    ],
)
def test_settings_that_cannot_work(tmp_path, more, words):
    rows = write_rows(tmp_path / "rows", None)
    options = difficulty.parser().parse_args(["--dataset", str(rows), "--out", str(tmp_path / "o"), *more])
    assert isinstance(options, argparse.Namespace)
    with pytest.raises(ConfigError, match=words):
        difficulty.run(options)


def test_an_evaluation_gives_pass_rates_by_id(tmp_path):
    """One answer per row: right, wrong, no verdict, and a row that was not evaluated."""
    rows = write_rows(tmp_path / "rows", *[None] * 4)
    verdicts = {"r1": True, "r2": False, "r3": None}
    results = [RowResult(id, "signs", "answered", "digest", correct) for id, correct in verdicts.items()]
    for policy in ("single", "always-low"):
        cell = Cell("now", "rows", policy)
        done = Evaluation(results, [None] * 3, 1.0)
        path = shard_path(tmp_path / "evaluation", cell, 0)
        write_shard(path, cell, {}, ["d"] * 3, done, "now")
    more = ["--evaluation", str(tmp_path / "evaluation")]
    with pytest.raises(ConfigError, match="now,rows,always-low; now,rows,single"):
        run(rows, tmp_path / "x", None, *more, model=False, rater=False)
    run(rows, tmp_path / "out", None, *more, "--cell", "now,rows,single", model=False, rater=False)
    found = load_rows(tmp_path / "out")
    assert found["pass_rate"] == [1.0, 0.0, None, None] and found["band"] == ["easy", "hard", None, None]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["undecided"] == {"no pass rate": 2}
