"""Intervals, significance and the paper's layout, against numbers worked out by hand; no model."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from vt_trl.evaluation import RowResult
from vt_trl.evaluation.paper import paper_tables
from vt_trl.evaluation.show import print_results
from vt_trl.evaluation.stats import interval, paired, significance, summarise


def result(number: int, correct: bool | None = True, **more) -> RowResult:
    return RowResult(f"r{number}", "s", "answered", "d", correct, visual_tokens=4, **more)


def test_intervals_are_seeded_and_close_to_the_normal_one():
    values = [1.0] * 60 + [0.0] * 40
    low, high = interval(values)
    assert [low, high] == interval(values)
    assert (low, high) == (pytest.approx(0.504, abs=0.02), pytest.approx(0.696, abs=0.02))  # 0.6 -+ 1.96 x 0.049
    assert interval([1.0] * 5) == [1.0, 1.0] and interval([]) is None


def test_mcnemar_by_hand(monkeypatch):
    """7 rows changed, one of them for the worse: 2 x (1 + 7) / 2^7 = 0.125."""
    pairs = [(True, False)] + [(False, True)] * 6 + [(True, True)] * 13
    first, second = ([result(n, side) for n, side in enumerate(column)] for column in zip(*pairs, strict=True))
    first.append(result(20, None))
    second.append(result(20))
    found = paired(first, second)
    assert (found["only_first_right"], found["only_second_right"], found["unjudged"]) == (1, 6, 1)
    assert found["accuracy_test"] == "McNemar, exact" and found["accuracy_p"] == pytest.approx(0.125)
    assert found["accuracy"]["difference"] == pytest.approx(5 / 20)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    name, p_value = significance(1, 6, pairs)
    assert name.startswith("paired bootstrap") and 0.02 < p_value < 0.2


def test_the_papers_layout():
    def cell(data: str, policy: str, accuracy: float, share: float, rate: float | None) -> dict:
        return {
            "model": "m", "data": data, "policy": policy, "accuracy": accuracy, "visual_tokens_share": share,
            "request_rate": rate, "seconds": 2.0,
        }  # fmt: skip

    tables = paper_tables(
        [
            cell("chart-qa", "always-full", 0.8, 1.0, None),
            cell("mine", "always-full", 0.5, 1.0, None),
            cell("chart-qa", "two-turn", 0.6, 0.5, 0.25),
        ]
    )
    (_, heading, scores), (_, _, times), (_, _, requests) = tables
    assert heading[2] == "ChartQA" and heading[-2:] == ["mine", "average %"]
    assert scores[0] == ["m always-full", "100.0", "80.0", *"-" * 8, "50.0", "100.0"]
    assert scores[1] == ["m two-turn", "50.0", "60.0", *"-" * 8, "-", "75.0"]
    assert times[1] == ["m two-turn", "2.0", *"-" * 9]
    assert requests == [["m two-turn", "25.0", *"-" * 9]]


def test_results_fit_a_terminal_and_tell_what_was_left_out():
    cell = {"model": "m", "data": "d", "policy": "always-full", "seconds": 2.0}
    cell |= summarise([result(0), result(1, False), result(2, None)], [result(number) for number in range(3)])
    shown = io.StringIO()
    print_results({"cells": [cell]}, Console(width=80, file=shown))
    line = next(line for line in shown.getvalue().splitlines() if "always-full " in line)
    assert line.split() == ["always-full", "50.0", "0.0-100.0", "0.0", "4.0", "100.0", "0.0", "2.0"]
    assert "1 not be judged" in shown.getvalue() and "33.3 %" in shown.getvalue()
