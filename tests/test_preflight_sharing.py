"""The preflight knows what is computed once and held once (vt_trl/speed.py)."""

from __future__ import annotations

import pytest

from vt_trl.forward.layout import Layout, Segment
from vt_trl.preflight import Launch, estimate
from vt_trl.preflight.activations import Packing
from vt_trl.preflight.advice import advise, changed
from vt_trl.preflight.faster import larger_micro_batch, speed_remarks
from vt_trl.preflight.micro import work


def by_samples(setup_of, samples: int, *more: str, **kwargs):
    """efficient_lora with ``samples`` rollouts per micro-batch in one forward, 64 per update."""
    numbers = ("--per_device_train_batch_size", str(samples), "--gradient_accumulation_steps", str(64 // samples))
    return changed(setup_of("efficient_lora", *numbers, *more, **kwargs), max_packed_tokens=None)


def test_a_row_on_paper_is_the_row_that_is_computed(setup_of):
    setup = by_samples(setup_of, 4)
    whole = work(setup, "longest").whole
    known, branch = setup.longest.prompt - 1, setup.longest.completion
    segments = [Segment(0, known)]
    for number in range(4):
        segments.append(Segment(known + number * branch, branch, (0, known)))
    index, queries, *_ = Layout(segments).variable("cpu")
    assert (whole.tokens, whole.packing.keys) == (queries[-1].item(), len(index))
    assert whole.labelled == 4 * setup.longest.sampled < 4 * branch
    passing = work(setup, "longest", training=False).whole
    assert passing.patches == setup.longest.patches  # one prompt, and one full view that all its rollouts are shown


def test_pairs_are_those_that_attention_computes():
    segments = ((10, 10), (4, 14))
    assert Packing(segments, gathered=True).pairs == 10 * 10 / 2 + 4 * 10 + 4 * 4 / 2
    assert Packing(segments, gathered=False).pairs == 10 * 10 / 2 + 4 * 14  # behind a mask


@pytest.mark.parametrize("samples, prompts", [(1, 1), (8, 1), (16, 1), (32, 2), (6, 2), (24, 3)])
def test_prompts_of_a_micro_batch(setup_of, samples, prompts):
    setup = changed(setup_of("efficient_lora"), per_device_train_batch_size=samples, steps_per_generation=16)
    known = work(setup, "mean").whole.packing
    assert len(known.segments) - len(known.branches) == prompts


def test_the_typical_micro_batch_is_the_fullest(setup_of):
    """All members of a group ask, and one of them is the longest of its generation."""
    setup = by_samples(setup_of, 8)
    known, ask = setup.routes[-1][1].prompt - 1, setup.routes[-1][1].completion
    assert work(setup, "typical").whole.tokens == known + setup.padded.completion + 7 * ask
    assert work(setup, "mean").whole.tokens < work(setup, "typical").whole.tokens


def test_whole_groups_compute_least(setup_of):
    each = [estimate(by_samples(setup_of, samples, gpu=80)) for samples in (1, 2, 8, 16)]
    computed = [one.tokens.computed for one in each]
    assert computed == sorted(computed, reverse=True) and len(set(computed)) == 4
    seconds = [one.seconds.total for one in each]
    assert seconds == sorted(seconds, reverse=True)
    padded = estimate(by_samples(setup_of, 2, "--share_prefix", "false", gpu=80))
    assert padded.tokens.computed > computed[0] and padded.seconds.update > each[0].seconds.update


def test_shuffled_micro_batches_share_nothing(setup_of):
    setup = by_samples(setup_of, 4, "--balance_micro_batches", "false")
    train, score = (len(work(setup, "mean", training).whole.packing.segments) for training in (True, False))
    assert (train, score) == (4 + 4, 4 + 1)  # passes take rollouts group by group


def test_a_limit_bounds_what_is_at_work_not_what_is_kept(setup_of):
    free = by_samples(setup_of, 16)
    bound = changed(free, max_packed_tokens=16_384)
    parts = work(bound, "longest")
    assert parts.part.tokens <= 16_384 < parts.whole.tokens
    assert parts.whole.tokens >= work(free, "longest").whole.tokens  # prompts again in every part
    first, second = (estimate(one).longest.step for one in (free, bound))
    assert second.kept >= first.kept and second.passes < first.passes and second.backward < first.backward


def test_pixels_are_held_once_per_picture_a_group_is_shown(setup_of):
    w = setup_of("efficient_lora").widths

    def pixels(*overrides):
        setup = setup_of("efficient_lora", *overrides)
        return estimate(setup).longest.rollouts.pixels // (w.patch * 4), setup

    shared, setup = pixels()
    longest, groups = setup.longest, 64 // 16
    assert shared == groups * longest.patches
    alone, _ = pixels("--share_images", "false")
    assert alone == 64 * longest.patches
    looks, setup = pixels("--environment", "look", "--environment_args", "{}")  # every rollout crops for itself
    assert looks == groups * setup.longest.prompt_patches + 64 * setup.longest.reply_patches


def test_features_of_frozen_towers_are_held_for_a_generation(setup_of):
    setup = setup_of("efficient_lora")
    load = estimate(setup).longest
    assert load.rollouts.features == 4 * load.episode.visual * 3584 * 2  # 4 groups, bf16
    parts = {phase.name: phase.parts["rollouts"] for phase in load.phases}
    assert parts["update"] - parts["generation"] == load.rollouts.features
    assert work(setup, "longest").whole.patches == 0 and load.step.vision == 0  # the passes have left them
    for other in (("--lora", "all"), ("--share_vision", "false")):
        assert estimate(setup_of("efficient_lora", *other)).longest.rollouts.features == 0
    sharded = setup_of("efficient_full", "--train_vision", "false", launch=Launch(8, "zero3"))
    assert estimate(sharded).longest.rollouts.features == 0


def test_other_attention_and_models_are_padded(setup_of):
    eager = setup_of("efficient_lora", "--attn_implementation", "eager")
    assert not eager.packed and work(eager, "mean").whole.packing is None
    assert "attn_implementation eager" in speed_remarks(estimate(eager))[0]


def test_fp32_attends_segment_by_segment(setup_of):
    assert setup_of("efficient_lora").gathers_keys
    assert not setup_of("efficient_lora", "--dtype", "float32").gathers_keys
    assert not changed(setup_of("efficient_lora"), use_cpu=True).gathers_keys


# Advice


def test_advice_turns_sharing_on_before_all_else(setup_of):
    off = [word for name in ("share_images", "share_prefix") for word in (f"--{name}", "false")]
    setup = by_samples(setup_of, 16, *off, gpu=79)
    advice = advise(setup, "longest")
    assert advice.enough and {change.setting for change in advice.changes} >= {"share_prefix"}


def test_remarks_name_the_faster_setting(setup_of):
    text = larger_micro_batch(estimate(by_samples(setup_of, 2, gpu=140)))
    assert "per_device_train_batch_size: 16, gradient_accumulation_steps: 4" in text
    text = larger_micro_batch(estimate(by_samples(setup_of, 2, gpu=79)))  # 16 of the longest would no longer fit
    assert "per_device_train_batch_size: 8, gradient_accumulation_steps: 8" in text
    assert larger_micro_batch(estimate(by_samples(setup_of, 16, gpu=79))) is None
    assert larger_micro_batch(estimate(by_samples(setup_of, 2, gpu=10))) is None  # nothing fits
    off = estimate(by_samples(setup_of, 2, "--share_prefix", "false", gpu=79))
    assert speed_remarks(off)[0].startswith("share_prefix is off")
