"""What the vLLM engine and backend decide by themselves, on stand-ins: no vLLM needed."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from PIL import Image
from trl.distributed import DistributedBackend

from vt_trl.errors import ConfigError
from vt_trl.generation.vllm import collapse_runs
from vt_trl.generation.vllm_common import content_id
from vt_trl.generation.vllm_engine import ColocatedEngine, random_state_kept
from vt_trl.packing import placeholder_runs


def stand_in(model, load_weights, calls):
    """A ColocatedEngine around a recorder: what it asks of vLLM goes to ``calls``."""
    engine = ColocatedEngine.__new__(ColocatedEngine)
    engine.model, engine.enable_sleep_mode, engine._llm_weights_sleeping = model, True, False
    engine._dist = DistributedBackend(Accelerator(cpu=True))
    runner = SimpleNamespace(model=SimpleNamespace(load_weights=load_weights))
    core = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner)))
    for name in ("prefix", "mm", "encoder"):
        setattr(core, f"reset_{name}_cache", lambda name=name: calls.append(name))
    engine.llm = SimpleNamespace(
        llm_engine=core,
        wake_up=lambda tags: calls.append(("wake", *tags)),
        sleep=lambda level: calls.append(("sleep", level)),
    )
    return engine


def test_a_sleeping_engine_gets_weights_before_it_gets_a_cache():
    calls = []
    engine = stand_in(torch.nn.Linear(1, 1), lambda weights: calls.append(("load", len([*weights]))), calls)
    engine.wake(stale=False)
    engine.sleep()
    engine.wake(stale=False)  # not stale, but level 2 has discarded the weights
    push = [("load", 2), "prefix", "mm", "encoder"]
    assert calls == [("wake", "kv_cache"), ("sleep", 2), ("wake", "weights"), *push, ("wake", "kv_cache")]


@pytest.mark.parametrize("collect", [iter, list], ids=["one by one", "all first"])
def test_merged_adapters_arrive_merged_and_are_unmerged_again(collect):
    # The iterator subtracts the adapters in place at its end: a model that collects first must get them all the same.
    base = torch.nn.Sequential(torch.nn.Linear(3, 3))
    before = base[0].weight.detach().clone()
    adapted = get_peft_model(base, LoraConfig(target_modules=["0"], init_lora_weights=False))
    update = adapted.base_model.model[0].get_delta_weight("default")
    loaded = {}
    load_weights = lambda weights: loaded.update((name, weight + 0) for name, weight in collect(weights))  # noqa: E731
    stand_in(adapted, load_weights, []).sync_weights()
    torch.testing.assert_close(loaded["0.weight"], before + update)
    torch.testing.assert_close(adapted.base_model.model[0].base_layer.weight, before)


def test_caches_that_vllm_refuses_to_reset_raise():
    engine = stand_in(torch.nn.Linear(1, 1), list, [])
    engine.llm.llm_engine.reset_prefix_cache = lambda: False
    with pytest.raises(RuntimeError, match="reset_prefix_cache: turns still run"):
        engine.sync_weights()


@pytest.mark.parametrize("wrong", [{"mode": "server"}, {"tensor_parallel_size": 2}])  # of one process
def test_settings_that_cannot_work_are_refused_before_anything_loads(wrong):
    with pytest.raises(ConfigError, match=f"vllm_{next(iter(wrong))}"):
        ColocatedEngine(model=None, accelerator=Accelerator(cpu=True), processing_class=None, **wrong)


def test_the_random_states_survive_an_engine_that_seeds_them():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seed():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)

    seed()
    expected = draw()
    seed()
    with random_state_kept():
        seed()
        draw()
    assert draw() == expected


def test_runs_collapse_to_one_placeholder_per_image():
    # start=1, image=7, end=2; images that touch are kept apart by end and start
    ids = [5, 1, 7, 7, 7, 2, 1, 7, 7, 2, 6]
    assert collapse_runs(ids, 7) == [5, 1, 7, 2, 1, 7, 2, 6]
    assert placeholder_runs(ids, 7) == [3, 2]


def test_pictures_are_told_apart_by_pixels_and_by_shape():
    flat = Image.new("RGB", (4, 2))
    others = Image.new("RGB", (2, 4)), Image.new("RGB", (4, 2), "red")
    assert content_id(flat) == content_id(flat.copy())
    assert len({content_id(image) for image in (flat, *others)}) == 3


@pytest.mark.vllm
def test_an_engine_of_its_own_process_is_one_although_vllm_has_read_its_environment_before(monkeypatch):
    """An engine in this process makes vLLM keep what it read; a judge's engine would then start here as well."""
    from vllm import envs

    from vt_trl.generation.fixed_engine import own_process

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    envs.enable_envs_cache()  # what the engine core does where it starts
    try:
        assert envs.VLLM_ENABLE_V1_MULTIPROCESSING is False
        with own_process():
            assert envs.VLLM_ENABLE_V1_MULTIPROCESSING is True
        assert envs.VLLM_ENABLE_V1_MULTIPROCESSING is False and hasattr(envs.__getattr__, "cache_clear")
    finally:
        envs.disable_envs_cache()
