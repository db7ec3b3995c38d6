"""The parts of a preflight are what can be worked out by hand, and its advice fits."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import shipped
from transformers import AutoConfig

from vt_trl.cli import main
from vt_trl.config import VTGRPOConfig
from vt_trl.envs import Environment
from vt_trl.envs.base import user
from vt_trl.errors import ConfigError
from vt_trl.preflight import PixelLimits, Workload, check_run, estimate, preflight, tables
from vt_trl.preflight.advice import CONFIG, advise, changed
from vt_trl.preflight.counts import widths
from vt_trl.preflight.engines import GIB
from vt_trl.preflight.episodes import visual_patches
from vt_trl.preflight.launch import Launch, launch_from_environment, launch_from_file
from vt_trl.preflight.precision import precision, state_bytes
from vt_trl.recipe import RunArguments

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
SEVEN = 8_292_166_656  # weights of Qwen2.5-VL-7B; its card says 8.29B
SHARDED = Launch(8, "zero3")


def plain(**settings) -> RunArguments:
    return RunArguments(model="-", dataset="-", **settings)


# Parts, by hand


def test_states_of_full_fine_tuning_under_zero3(setup_of):
    held = setup_of("efficient_full", launch=SHARDED).states
    assert held.weights == held.reference == pytest.approx(2 * SEVEN / 8, abs=1)
    assert held.gradients == pytest.approx(2 * SEVEN / 8, abs=1)
    assert held.optimizer == pytest.approx(12 * SEVEN / 8, abs=1)  # fp32 weights, mean, variance
    assert held.optimizer_step == 4 * min(SEVEN // 8, 10**9)
    assert held.gathered == 2 * 10**9 and held.buckets == 2 * 5 * 10**8


def test_states_of_an_adapter(setup_of):
    setup = setup_of("efficient_lora")
    adapter = setup.counts.adapter
    assert setup.states.weights == 2 * SEVEN + 4 * adapter
    assert (setup.states.gradients, setup.states.optimizer) == (4 * adapter, 8 * adapter)
    assert setup.states.reference == setup.states.gathered == setup.states.buckets == 0


@pytest.mark.parametrize("sharding, weights, gradients, optimizer", [
    ("none", 4, 4, 8), ("zero2", 2, 2 / 8, 12 / 8), ("zero3", 2 / 8, 2 / 8, 12 / 8), ("fsdp2", 4 / 8, 4 / 8, 8 / 8),
])  # fmt: skip
def test_sharding_divides(setup_of, sharding, weights, gradients, optimizer):
    dtype = "float32" if sharding == "none" else "bfloat16"
    held = setup_of("efficient_full", "--dtype", dtype, launch=Launch(8, sharding)).states
    expected = [round(SEVEN * each) for each in (weights, gradients, optimizer)]
    assert [held.weights, held.gradients, held.optimizer] == pytest.approx(expected, abs=1)


def test_ddp_and_fsdp2_keep_copies_of_gradients(setup_of):
    ddp = setup_of("efficient_full", "--dtype", "float32", launch=Launch(8)).states
    assert ddp.buckets == ddp.gradients == 4 * SEVEN
    assert setup_of("efficient_full", launch=Launch(8, "fsdp2")).states.unsharded == 2 * SEVEN
    sync = '{"gradient_accumulation_kwargs": {"sync_each_batch": true}}'
    synced = setup_of("efficient_full", "--accelerator_config", sync, launch=Launch(8, "fsdp2")).states
    assert synced.unsharded < 2 * SEVEN / 10


def test_reference_needs_a_kl_term_and_no_adapter(setup_of):
    assert setup_of("efficient_full", launch=SHARDED).states.reference
    assert not setup_of("efficient_full", "--beta", "0", launch=SHARDED).states.reference
    assert not setup_of("efficient_full", "--lora", "language", launch=SHARDED).states.reference


def test_optimizer_states_by_name():
    assert (state_bytes("adamw_torch_fused"), state_bytes("sgd"), state_bytes("lion_32bit")) == (8, 0, 4)
    assert state_bytes("adamw_bnb_8bit") == state_bytes("paged_adamw_8bit") == pytest.approx(2.03, abs=0.01)


def test_precision_of_plain_runs(setup_of):
    mixed = precision(plain(dtype="float32"), setup_of("efficient_lora").args, Launch())
    assert (mixed.compute, mixed.residual, mixed.casts) == (2, 4, True)
    adapter = setup_of("efficient_lora").precision
    assert (adapter.frozen, adapter.trained, adapter.compute, adapter.residual) == (2, 4, 2, 2)


@pytest.mark.parametrize("packed", (True, False), ids=("packed", "padded"))
def test_kept_activations_of_a_checkpointed_7b_step(setup_of, packed):
    """A layer keeps its input in bf16; the rest is the last norm, sines and cosines, the mask, and the merger."""
    smaller = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "32")
    setup = setup_of("efficient_full", *smaller, "--share_prefix", str(packed).lower(), launch=SHARDED)
    setup = changed(setup, max_packed_tokens=None)
    load = estimate(setup).longest
    episode, h, v = load.episode, 3584, 1280
    tokens, mask = 2 * episode.tokens, 2 * episode.tokens**2
    if packed:  # the prompt once, but for its last token; a place for each gathered key instead of a mask
        known = episode.prompt - 1
        tokens, mask = known + 2 * episode.completion, 8 * (known + 2 * (known + episode.completion))
    norm, rotary = tokens * (4 + 2) * h, 2 * tokens * 128 * 2
    assert load.step.language == 28 * tokens * h * 2 + norm + rotary + mask
    patches = episode.patches  # one prompt, one full view
    merger = (4 + 2) * v + 2 * v + 2 * 2 * v  # norm, input, both sides of the GELU
    assert load.step.vision == patches * (32 * v * 2 + 2 * 80 * 4 + 1176 * 2 + merger)


def test_pixels_of_a_generation(setup_of):
    setup = setup_of("general_gpt4o", launch=SHARDED)
    patches = (2044 // 14) ** 2  # 2048 x 2048, in steps of 28 pixels
    assert setup.longest.patches == patches and setup.longest.visual == patches // 4
    assert setup.generated == 8192 // 8
    assert estimate(setup).longest.rollouts.pixels == 1024 // 16 * patches * 1176 * 4
    each = setup_of("general_gpt4o", "--share_images", "false", launch=SHARDED)
    assert estimate(each).longest.rollouts.pixels == 1024 * patches * 1176 * 4


def test_engine_takes_its_share_and_caches_what_is_left(setup_of):
    engine = estimate(setup_of("efficient_lora", gpu=80)).longest.generation
    assert engine.awake == round(0.4 * 80 * GIB)
    assert engine.cache == (engine.awake - engine.weights - engine.working) // 57_344
    assert engine.asleep == GIB
    awake = estimate(setup_of("efficient_lora", "--vllm_enable_sleep_mode", "false", gpu=80)).longest
    assert awake.generation.asleep == engine.awake


def test_phases_are_a_maximum_not_a_sum(setup_of):
    estimated = estimate(setup_of("efficient_lora", gpu=80))
    load = estimated.longest
    assert load.peak.total == max(phase.total for phase in load.phases)
    update = next(phase for phase in load.phases if phase.name == "update")
    assert update.parts["engine"] == GIB and update.parts["gradients"] > 0
    assert [phase.name for phase in load.phases if phase.parts["judge"] > GIB] == ["judging"]


def test_tokens_per_step(setup_of):
    estimated = estimate(setup_of("efficient_full", launch=SHARDED, workload=Workload(asks=0.5)))
    tokens = estimated.tokens
    assert tokens.rollouts == 64 and tokens.updates == 16
    assert tokens.visual == 64 * (361 + 0.5 * 1369) and tokens.sampled == 64 * 1.5 * 150
    assert tokens.computed < tokens.total  # prompts are computed once per micro-batch
    alone = setup_of("efficient_full", "--share_prefix", "false", launch=SHARDED)
    assert estimate(alone).tokens.computed > tokens.total


# Monotony


@pytest.mark.parametrize("more", [
    {"environment_args": {"max_pixels": 5_000_000}}, {"max_turn_tokens": 2048}, {"per_device_train_batch_size": 32},
    {"gradient_checkpointing": False}, {"beta": 0.0},
], ids=lambda more: next(iter(more)))  # fmt: skip
def test_more_is_not_less(setup_of, more):
    less = changed(setup_of("efficient_lora", gpu=80), max_packed_tokens=None)
    before, after = (estimate(one).longest for one in (less, changed(less, **more)))
    if "beta" in more:
        before, after = after, before
    for first, second in zip(before.phases, after.phases, strict=True):
        assert second.total >= first.total
    assert after.peak.total > before.peak.total or "beta" in more


def test_a_larger_picture_never_has_fewer_patches(seven):
    w = widths(seven)
    patches = [visual_patches((side, side), w, PixelLimits()) for side in range(56, 3500, 61)]  # the processor's limit
    assert patches == sorted(patches)


# Advice


@pytest.mark.parametrize("row", [row for row in tables.HARDWARE if row.gpu < 79 or row.processes > 1], ids=str)
def test_advice_names_settings_and_following_it_fits(seven, row):
    result = row.preflight(seven)
    known = {f.name for kind in (RunArguments, VTGRPOConfig) for f in fields(kind)}
    for advice in (result.needed, result.safe):
        if advice is None:
            continue
        assert advice.changes
        for change in advice.changes:
            assert (ROOT / change.value).is_file() if change.setting == CONFIG else change.setting in known
        followed = row.preflight(seven, *advice.overrides()).estimate  # through the recipe's own checks
        assert getattr(followed, advice.which).peak.total == getattr(advice.after, advice.which).peak.total
        assert (followed.excess(getattr(followed, advice.which)) == 0) is advice.enough
    if result.needed is None or result.needed.enough:
        assert result.safe is None or result.safe.enough
    else:
        assert result.needed.changes[-1].setting == "model"


def test_advice_shards_what_does_not_fit_whole(setup_of):
    setup = setup_of("efficient_full", "--dtype", "float32", launch=Launch(8), gpu=79)
    assert CONFIG in [change.setting for change in advise(setup, "typical").changes]


def test_no_gpu_no_verdict(setup_of):
    setup = setup_of("efficient_lora")
    assert estimate(setup).fits is None and advise(setup, "longest") is None


# The command


def test_every_shipped_recipe_preflights(seven, capsys):
    for path in (path for path in shipped.RECIPES if shipped.kind_of(path) is VTGRPOConfig):
        overrides = ("--model", "x", "--dataset", "y") if path.stem == "smoke" else ()
        gpu = None if "use_cpu: true" in path.read_text() else 79
        result = preflight(path, overrides, gpu_gib=gpu, model_config=seven)
        assert result.estimate.longest.peak.total > SEVEN * 2
        printed = capsys.readouterr().out
        assert "8,292 million weights" in printed and ("into 75.0 GiB" in printed) is (gpu is not None)


@pytest.mark.parametrize("path", shipped.LOOPS, ids=lambda path: path.stem)
def test_a_loops_recipe_is_told_where_it_belongs(path):
    with pytest.raises(ConfigError, match="is the recipe of a loop: run `vt-trl loop "):
        preflight(path)


def test_command_says_with_its_status_whether_it_fits(shared, capsys):
    model = ("--model-config", str(shared / "qwen" / "qwen2.5-vl-7b-instruct"))
    assert (
        main(["preflight", str(RECIPES / "efficient_lora.yaml"), "--gpu-gib", "79", "--model", "another", *model]) == 0
    )
    assert "Fits" in (out := capsys.readouterr().out) and "another" in out
    assert (
        main(["preflight", str(RECIPES / "efficient_lora.yaml"), "--gpu-gib", "24", *model, "--picture", "800x600"])
        == 1
    )
    assert "vllm_gpu_memory_utilization" in (out := capsys.readouterr().out) or "model: one with" in out
    assert main(["preflight", str(RECIPES / "efficient_lora.yaml"), "--model-config", str(RECIPES)]) == 2


def test_start_of_a_run_never_fails(checkpoint, tmp_path, capsys):
    args = VTGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=8, report_to="none")
    run = plain(dtype="float32")
    assert check_run(run, args, AutoConfig.from_pretrained(checkpoint)) is not None
    assert "Preflight:" in capsys.readouterr().err
    assert check_run(run, args, None) is None


def test_launch_from_accelerate_s_files():
    files = {path.stem: launch_from_file(path) for path in (RECIPES / "accelerate").glob("*.yaml")}
    expected = {"zero3": SHARDED, "fsdp2": Launch(8, "fsdp2"), "ddp": Launch(8), "cpu": Launch(2)}
    assert {name: files[name] for name in expected} == expected
    with pytest.raises(ConfigError, match="is no configuration of accelerate"):
        launch_from_file(RECIPES / "smoke.yaml")


def test_launch_from_the_environment(monkeypatch):
    assert launch_from_environment() == Launch()
    for name, number in {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, number)
    assert launch_from_environment() == Launch(16, machines=2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert launch_from_environment() == Launch(16, "fsdp2", machines=2)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert launch_from_environment() == Launch(16, "zero3", machines=2)


class Particular(Environment):
    """Wants a column nobody else has."""

    max_turns = 3
    max_image_pixels = 280 * 280

    def reset(self, row):
        return self.show(user(row["image"], row["only mine"]))

    def step(self, reply, truncated=False):
        raise NotImplementedError


def test_environments_that_cannot_be_played_are_bounded(setup_of):
    name = f"{__name__}:Particular"
    longest = setup_of("efficient_lora", "--environment", name, "--environment_args", "{}").longest
    assert (longest.images, longest.patches) == (3, 3 * 20 * 20)


# Engines that are shared or elsewhere, and a base in 4 bits


def test_an_engine_of_several_processes_divides_its_weights(setup_of):
    tensor_parallel = "--vllm_tensor_parallel_size"
    one, two = (
        estimate(setup_of("efficient_lora", tensor_parallel, size, launch=Launch(2), gpu=80)).typical.generation
        for size in ("1", "2")
    )
    assert two.weights == one.weights // 2 and two.cache > one.cache


def test_an_engine_on_other_machines_takes_nothing_here(setup_of):
    away = ("--vllm_mode", "server", "--vllm_enable_sleep_mode", "false")
    generation = estimate(setup_of("efficient_lora", *away, gpu=80)).typical.generation
    assert (generation.awake, generation.asleep) == (0, 0)


def test_a_base_in_4_bits_is_counted_as_such(setup_of):
    """6.5 of the 8.3 billion weights are in the language model's linear layers: 0.516 bytes instead of 2 each."""
    whole = setup_of("efficient_lora", "--quantize", "none").states.weights
    packed = setup_of("efficient_lora", "--quantize", "nf4").states.weights
    matrices = setup_of("efficient_lora").counts.language_matrices
    assert 6.5e9 < matrices < 6.6e9
    assert whole - packed == pytest.approx(matrices * (2 - 0.515869), rel=1e-4)
