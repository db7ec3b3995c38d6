"""The demo from end to end at a size that teaches nothing, and the pieces whose meaning can be checked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demos.reading import __main__ as demo
from demos.reading.task import make_rows
from demos.reading.unreliable import UnreliableEnv
from vt_trl.errors import ConfigError
from vt_trl.images import ResolutionRule
from vt_trl.types import Done, Observation


def test_demo_writes_its_reports(tmp_path: Path):
    """Two steps of everything; the report has every promised key and admits that the targets are missed."""
    arguments = ["--warm-steps", "2", "--grpo-steps", "2", "--eval-rows", "16", "--threads", "1"]
    demo.main([*arguments, "--out", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    keys = {"accuracy", "accuracy_easy", "accuracy_hard", "request_rate_easy", "request_rate_hard"}
    for when in ("before", "after"):
        assert keys | {"visual_tokens_mean"} <= set(report[when])
    assert {"always_full_accuracy", "always_low_accuracy", "visual_tokens_always_full", "hard_share"} <= set(report)
    assert {"wall_seconds", "machine", "versions"} <= set(report)
    assert report["grpo_steps"] == 2 and report["visual_tokens_always_full"] == 4
    assert not all(report["targets_met"].values())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") >= 6


def mean_difference(rows: list[dict], low: bool) -> float:
    """How far the mean pictures of two letters are apart, in grey levels: 0 when the letter leaves no trace."""
    rule = ResolutionRule(min_pixels=1)
    views = {}
    for row in rows:
        image = rule.views(row["image"])
        pixels = np.asarray((image.low if low else image.full).convert("L"), dtype=float)
        views.setdefault(row["answer"], []).append(pixels - pixels.mean())
    means = [np.mean(pictures, axis=0) for _, pictures in sorted(views.items())]
    return float(np.abs(means[0] - means[1]).max())


def test_halving_removes_hard_letters_and_keeps_easy_ones():
    hard, easy = (make_rows(400, share, seed=3, alphabet="AH") for share in (1.0, 0.0))
    assert mean_difference(easy, low=True) > 20
    assert mean_difference(hard, low=True) < 6  # grain averaged over 200 pictures


def test_legibility_brings_the_letter_back():
    rows = make_rows(400, 1.0, seed=3, alphabet="AH", legibility=1.0)
    assert mean_difference(rows, low=True) > 20


CALL = '<think>x</think><tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'


@pytest.mark.parametrize(("reliability", "shown"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_unreliable_tool_shows_the_picture_that_often(reliability: float, shown: float):
    row = make_rows(1, 0.0, seed=0)[0]
    environment = UnreliableEnv(reliability, min_pixels=1)
    environment.reset(row)
    seen = 0
    for _ in range(400):
        outcome = environment.fork().step(CALL)
        assert isinstance(outcome, Observation) and outcome.granted
        image: Image.Image = outcome.messages[0].images[0]
        assert image.size == row["image"].size
        seen += np.asarray(image).std() > 1
    assert abs(seen / 400 - shown) < 0.1


def test_unreliable_tool_refuses_a_probability_above_one():
    with pytest.raises(ConfigError, match="reliability is 1.5"):
        UnreliableEnv(1.5)


def test_tool_never_ends_an_episode():
    environment = UnreliableEnv(0.0, min_pixels=1)
    environment.reset(make_rows(1, 0.0, seed=0)[0])
    assert not isinstance(environment.step(CALL), Done)
