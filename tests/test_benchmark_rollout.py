"""The parts of the rollout benchmark on stand-ins, and the figures that its page gives. No vLLM needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoProcessor

from benchmarks.rollout_parts import CALL, Endings, Lengths, Plan, PlannedTurns, RoundByRound, check
from vt_trl.generation.base import Request, Sample, SamplingSettings, ScriptedBackend

ROOT = Path(__file__).resolve().parents[1]


def test_steps_of_a_plan_by_hand():
    plan = Plan(((20, 30), (60,), (10, 5)))
    assert plan.sampled == 125
    assert plan.steps == (60, 60 + 30)
    assert Plan(((5,), (7,))).steps == (7, 7)


def test_drawn_lengths_have_the_median_and_the_tail_that_were_asked_for():
    drawn = Lengths(median=64, sigma=0.9, longest=512).draw(20_000, np.random.default_rng(0))
    assert np.median(drawn) == pytest.approx(64, abs=2)
    assert np.quantile(drawn, 0.95) == pytest.approx(64 * np.exp(0.9 * 1.645), rel=0.05)
    assert (min(drawn), max(drawn)) == (16, 512)
    plan = Plan.draw(16, 0.4, Lengths(64, 0.9, 512), np.random.default_rng(0))
    assert sorted(map(len, plan.turns)) == [1] * 10 + [2] * 6


def test_rounds_hold_a_turn_back_until_all_that_run_have_ended():
    order = []
    backend = RoundByRound(ScriptedBackend(lambda request: Sample(request.request_id, (1,), (0.0,), True)))
    backend.begin(SamplingSettings())
    for number in range(3):
        backend.submit(Request(number, (1,), (), 4))
    for sample in backend.completed():
        order.append(sample.request_id)
        if sample.request_id < 2:
            backend.submit(Request(10 + sample.request_id, (1,), (), 4))
        if sample.request_id == 10:
            backend.submit(Request(20, (1,), (), 4))
    assert order == [0, 1, 2, 10, 11, 20]
    backend.submit(Request(30, (1,), (), 4))
    backend.end()
    assert list(backend.completed()) == []  # given up


def test_turns_have_the_planned_length_and_end_in_a_call_where_one_follows(checkpoint):
    tokenizer = AutoProcessor.from_pretrained(checkpoint).tokenizer
    asked = []

    def sample(request):
        asked.append(request.max_new_tokens)
        return Sample(request.request_id, (5,) * request.max_new_tokens, (-1.0,) * request.max_new_tokens, False)

    backend = PlannedTurns(ScriptedBackend(sample), tokenizer)
    backend.plan = Plan(((200, 120), (150,)))
    backend.begin(SamplingSettings())
    for number in (0, 1):
        backend.submit(Request(number, (1,), (), 999))
    texts = []
    for found in backend.completed():
        assert len(found.token_ids) == asked[len(texts)] and found.finished
        texts.append(tokenizer.decode(found.token_ids))
        if found.request_id == 0 and len(texts) == 1:
            backend.submit(Request(0, (1,), (), 999))
    assert asked == [200, 150, 120]
    assert [CALL in text for text in texts] == [True, False, False]
    assert all(text.endswith("<|im_end|>") for text in texts)
    with pytest.raises(ValueError, match="3 tokens has no room"):
        Endings(tokenizer).put((1, 2, 3), asks=True)


def test_rollouts_that_do_not_follow_the_plan_are_refused(checkpoint):
    with pytest.raises(RuntimeError, match=r"planned turns of \(\(5,\),\) tokens, got \(\)"):
        check([], Plan(((5,),)))


def test_the_page_gives_the_figures_of_the_report():
    report = json.loads((ROOT / "docs/results/benchmark_rollout.json").read_text(encoding="utf-8"))
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    for name, words in (("rounds", "seconds, with a barrier after each round"), ("trl", "seconds, TRL's tool loop")):
        assert f"| rollout | {words} | {report['seconds_ours']} | {report[f'seconds_{name}']} |" in page
        low, high = report[f"ratio_{name}_spread"]
        assert f"{report[f'ratio_{name}']} ({low} to {high})" in page
    assert len(report["runs"]) == report["settings"]["repeats"]
    for run in report["runs"]:
        free, rounds = run["least_steps"]
        assert (run["ours"]["steps"], run["rounds"]["steps"], run["trl"]["steps"]) == (free, rounds, rounds)
