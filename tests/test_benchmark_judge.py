"""The benchmark of judging runs, judges rightly, and the README's figures are those of the committed report."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks import judge, record_step

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "docs" / "results" / "benchmark_judge.json"
_CALLS = (("", "calls_made"), ("_naive", "calls_naive"))


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads(REPORT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_a_small_piece_of_the_committed_workload(tmp_path: Path, committed: dict):
    out = tmp_path / "report.json"
    arguments = ["--completions", "64", "--speed", "20", "--latency", "0.05", "--json", str(out)]
    report = judge.main(arguments)  # raises when the two ways to judge differ in a score
    assert json.loads(out.read_text(encoding="utf-8")) == report
    assert report["calls_made"] == report["calls_needed"] < report["calls_naive"] <= report["completions"] == 64
    assert report["calls_naive"] == report["answered"]
    assert report["in_flight_max"] <= report["concurrency"]
    assert 0 < report["wait_share"] < 1 and 0 < report["wait_share_naive"] < 1
    assert set(report) == set(committed)
    _, completions = judge.read_workload(judge.WORKLOAD, 64)
    right = [
        one.prediction is not None and one.prediction.casefold() == one.answer[0].casefold() for one in completions
    ]
    assert report["mean_score"] == round(sum(right) / 64, 4)


def test_different_scores_are_no_result(monkeypatch: pytest.MonkeyPatch):
    replays = [judge.Replay(scores, 1.0, 1.0, 1, 1) for scores in ([1.0], [0.0])]
    monkeypatch.setattr(judge, "replay_ours", lambda *_, **__: replays[0])
    monkeypatch.setattr(judge, "replay_naive", lambda *_, **__: replays[1])
    with pytest.raises(RuntimeError, match="different scores"):
        judge.main(["--completions", "16"])


def test_calls_needed_counts_distinct_answers_that_a_judge_must_see():
    said = ["A", " A", "B", "", None, "A" * 3000]
    completions = [judge.Completion(0, "Which?", ["A"], text, "answered", 0.0) for text in said]
    other = judge.Completion(1, "Which one?", ["A"], "A", "answered", 0.0)
    assert judge.calls_needed([*completions, other]) == 3


def test_torn_groups_are_refused():
    with pytest.raises(SystemExit, match="groups of 16: 20 cannot"):
        judge.read_workload(judge.WORKLOAD, 20)


def test_a_step_is_recorded(tmp_path: Path):
    path = tmp_path / "step.jsonl.gz"
    record_step.main(["--out", str(path), "--prompts", "2", "--group", "4", "--warm-steps", "2"])
    header, completions = judge.read_workload(path)
    assert len(completions) == 8
    assert [one.prompt for one in completions] == [0] * 4 + [1] * 4
    assert {one.question for one in completions} == {f"Which letter is on picture {n}?" for n in (0, 1)}
    assert set(header["phases"]) == {"generation", "passes", "update"}
    assert all(seconds > 0 for seconds in header["phases"].values())
    assert all(0 < one.ended <= header["phases"]["generation"] + 0.001 for one in completions)  # both are rounded
    assert {"machine", "versions", "date", "settings", "command"} <= set(header)
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        assert len(lines.readlines()) == 9


def test_committed_workload_and_report_belong_together(committed: dict):
    header, completions = judge.read_workload(judge.WORKLOAD)
    assert judge.WORKLOAD.stat().st_size < 2**20
    assert committed["completions"] == len(completions) == 8192
    assert committed["phases"] == header["phases"]
    assert committed["calls_needed"] == judge.calls_needed(completions)
    assert committed["answered"] == sum(one.prediction is not None for one in completions)
    assert committed["workload"]["settings"] == header["settings"]
    assert committed["latency"] == 1.0 and committed["speed"] == 1.0
    assert committed["command"] == f"python -m benchmarks.judge --json {REPORT.relative_to(ROOT)}"


def test_wait_shares_follow_from_the_seconds(committed: dict):
    step = sum(committed["phases"].values())
    for key, wait, seconds in (
        ("wait_share", "wait_seconds", step),
        ("wait_share_naive", "wait_seconds_naive", step),
        ("wait_share_fast", "wait_seconds_fast", step / 4),
        ("wait_share_fast_naive", "wait_seconds_naive", step / 4),
    ):
        assert committed[key] == pytest.approx(committed[wait] / (seconds + committed[wait]), abs=2e-4)


def test_readme_table_is_that_of_the_report(committed: dict, readme: str):
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in readme.splitlines()]
    assert [row[1:] for row in rows if row[0] == "judge"] == judge.figures(committed)


def test_readme_says_where_the_figures_come_from(committed: dict, readme: str):
    readme = " ".join(readme.split())
    header, completions = judge.read_workload(judge.WORKLOAD)
    assert committed["command"] in readme and header["command"] in readme
    versions = ", ".join(
        f"{name} {committed['versions'][name]}" for name in ("torch", "transformers", "trl", "openai")
    )
    assert f"{committed['machine']}; {versions}; {committed['date']}." in readme
    phases, settings = committed["phases"], header["settings"]
    assert ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items()) in readme
    assert (
        f"{len(completions)} completions ({settings['prompts']} prompts, groups of {settings['num_generations']})"
        in readme
    )
    assert f"({settings['parameters'] / 1e6:.1f}M parameters)" in readme
    assert f"({sum(phases.values()):.0f} s in all; a clock showed {header['wall_seconds']:.0f} s)" in readme
    asking = committed["calls_made"] / committed["concurrency"] * committed["latency"]
    hidden = phases["generation"] + phases["passes"] - min(one.ended for one in completions)
    assert f"{committed['calls_made']} calls, {committed['concurrency']} at a time, take {asking:.0f} s" in readme
    assert f"there were {hidden:.0f} s" in readme and f"the step has {hidden / 4:.0f} s" in readme
    right = round(committed["mean_score"] * len(completions))
    assert (
        f"{committed['answered']} completions have an answer" in readme and f"{right} completions are right" in readme
    )
    per_call = [1000 * committed[f"cpu_seconds{way}"] / committed[calls] for way, calls in _CALLS]
    assert f"some {min(per_call):.0f} to {max(per_call):.0f} ms" in readme
