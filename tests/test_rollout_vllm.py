"""Rollouts on a real colocated engine: no barrier, the tokens of a loop with one, and what a phase asks of vLLM."""

from __future__ import annotations

import os
from unittest.mock import patch

import numpy as np
import pytest

from vt_trl.generation.base import SamplingSettings
from vt_trl.generation.vllm_common import content_id

pytest.importorskip("vllm")
from benchmarks import rollout  # noqa: E402
from benchmarks.rollout_parts import Plan, World, phrases  # noqa: E402
from benchmarks.serve import make_restless  # noqa: E402
from benchmarks.step_engine import measure_engine  # noqa: E402
from benchmarks.step_work import TEST, make_checkpoint, make_rollouts  # noqa: E402
from vt_trl.generation.vllm import VLLMBackend  # noqa: E402
from vt_trl.tiny import build_tiny  # noqa: E402

pytestmark = pytest.mark.vllm
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

PLAN = Plan(((20, 30), (90,), (40, 60), (70,), (16, 16), (64,)))
FIRST = {number: turns[0] for number, turns in enumerate(PLAN.turns)}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """Its weights make the next token hang on picture and tokens, and every rollout gets them anew."""
    folder = build_tiny(tmp_path_factory.mktemp("world") / "model", corpus=phrases(), hidden_size=64)
    world = World(folder, seats=6, context=2048)
    make_restless(world.model)
    return world


def turns_of(world: World, variant: str, settings: SamplingSettings) -> tuple[list, list]:
    """The rollouts of a group, and when each turn started and ended: ("start" or "end", number, turn)."""
    events, started = [], {}
    submit, sample = VLLMBackend.submit, VLLMBackend._sample

    def submitted(backend, request):
        started[request.request_id] = started.get(request.request_id, -1) + 1
        events.append(("start", request.request_id, started[request.request_id]))
        submit(backend, request)

    def sampled(backend, output):
        found = sample(backend, output)
        events.append(("end", found.request_id, started[found.request_id]))
        return found

    with patch.object(VLLMBackend, "submit", submitted), patch.object(VLLMBackend, "_sample", sampled):
        return world.roll_out(variant, world.row(0), PLAN, settings), events


@pytest.mark.parametrize(
    "settings", [SamplingSettings(temperature=0.0), SamplingSettings(temperature=1.0, seed=3)], ids=["greedy", "seed"]
)
def test_without_a_barrier_the_tokens_are_those_of_rounds(world, settings):
    free, overlapping = turns_of(world, "free", settings)
    rounds, apart = turns_of(world, "rounds", settings)
    assert len({tuple(one.completion_ids) for one in free}) == len(free)
    for one, other in zip(free, rounds, strict=True):
        assert one.completion_ids == other.completion_ids and one.loss_mask == other.loss_mask
        assert len(one.images) == len(other.images) == len(one.turns)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    second = overlapping.index(("start", 0, 1))
    assert second == overlapping.index(("end", 4, 0)) + 3  # 4's second turn has started, and 0's first has ended
    assert {("end", number, 0) for number in (1, 2, 3, 5)} <= set(overlapping[second:])
    first_turns = [event for event in apart if event[2] == 0]
    assert apart[: len(first_turns)] == first_turns and len(first_turns) == 12


def test_a_phase_is_one_sync_one_load_one_reset_and_one_sleep(world):
    calls, engine = [], world.engine
    llm, core = engine.llm, engine.llm.llm_engine
    inside = core.model_executor.driver_worker.model_runner.model
    load, step = inside.load_weights, core.step

    def loaded(weights):
        names = []
        load((names.append(name) or name, weight) for name, weight in weights)
        calls.append(("load", len(names)))

    def stepped():
        if calls[-1] != "steps":
            calls.append("steps")
        return step()

    caches = ("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache")
    with (
        patch.object(engine, "enable_sleep_mode", True),  # which vLLM's CPU build cannot do: it is only asked to
        patch.object(engine, "_llm_weights_sleeping", False),
        patch.object(llm, "wake_up", lambda tags: calls.append(("wake", *tags))),
        patch.object(llm, "sleep", lambda level: calls.append(("sleep", level))),
        patch.object(inside, "load_weights", loaded),
        patch.object(core, "step", stepped),
        patch.multiple(core, **{name: lambda name=name: calls.append(name) for name in caches}),
    ):
        for _ in range(2):
            world.roll_out("free", world.row(1), PLAN)
    tensors = len(list(world.model.named_parameters()))
    phase = [("load", tensors), *caches, ("wake", "kv_cache"), "steps", ("sleep", 2)]
    assert calls == [*phase, ("wake", "weights"), *phase]


def test_pictures_are_known_to_vllm_by_their_content(world):
    core, seen = world.engine.llm.llm_engine, []
    add = core.add_request

    def added(name, prompt, params):
        seen.append(tuple(prompt["multi_modal_uuids"]["image"]))
        add(name, prompt, params)

    with patch.object(core, "add_request", added):
        rollouts = world.roll_out("free", world.row(2), PLAN)
        world.roll_out("free", world.row(2), Plan(((16,),)))  # another object of the same pixels
        world.roll_out("free", world.row(3), Plan(((16,),)))
    low, full = map(content_id, rollouts[0].images)
    assert sorted(seen[:9]) == sorted([(low,)] * 6 + [(low, full)] * 3) and low != full
    assert seen[9] == (low,) and seen[10] not in [(low,), (full,)]


def test_the_benchmark_takes_the_steps_that_the_plans_need(world, monkeypatch, tmp_path):
    monkeypatch.setattr(rollout, "World", lambda *sizes: world)
    words = ["--group", "6", "--share", "0.5", "--median", "24", "--longest", "64", "--repeats", "2", "--seed", "9"]
    report = rollout.main([*words, "--json", str(tmp_path / "report.json")])
    assert len(report["runs"]) == 2
    for run in report["runs"]:
        free, rounds = run["least_steps"]
        assert (run["ours"]["steps"], run["rounds"]["steps"], run["trl"]["steps"]) == (free, rounds, rounds)
        assert free < rounds
    for name in ("rounds", "trl"):
        ratios = sorted(run[name]["seconds"] / run["ours"]["seconds"] for run in report["runs"])
        assert report[f"ratio_{name}"] == pytest.approx(sum(ratios) / 2, abs=1e-3)
    assert report["sync_seconds_trl"] > 0 and report["settings"]["group"] == 6


def test_the_benchmark_of_an_update_measures_rollouts_and_syncs_of_both(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model", "cpu")
    found = measure_engine(checkpoint, TEST, {"50": make_rollouts(checkpoint, TEST, 50)}, "cpu", repeats=1)
    assert set(found) == {"50"} and set(found["50"]) == {"rollout", "sync"}
    for way in ("stock", "vt_trl"):
        assert found["50"]["rollout"][way] > found["50"]["sync"][way] > 0
