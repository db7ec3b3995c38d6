"""The preflight counts weights, patches and tokens exactly."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from vt_trl.envs import ResizeEnv
from vt_trl.families import family_of
from vt_trl.preflight import PixelLimits, tables
from vt_trl.preflight.counts import count, widths
from vt_trl.preflight.episodes import text_tokens, visual_patches
from vt_trl.recipe import RunArguments
from vt_trl.run import freeze_vision, lora_config

SEVEN = 8_292_166_656  # weights of Qwen2.5-VL-7B; its card says 8.29B
EIGHT = 8_767_123_696  # of Qwen3-VL-8B


def plain(**settings) -> RunArguments:
    return RunArguments(model="-", dataset="-", **settings)


@pytest.mark.parametrize("family", ("qwen2_5_vl", "qwen3_vl"))
@pytest.mark.parametrize(
    "settings",
    ({}, {"train_vision": False}, {"lora": "language", "lora_r": 3}, {"lora": "all", "lora_r": 5}),
    ids=("full", "frozen", "language", "all"),
)
def test_counts_are_those_of_the_loaded_model(checkpoints, family, settings):
    run = plain(**settings)
    model = AutoModelForImageTextToText.from_pretrained(checkpoints[family])
    names = family_of(model.config)
    whole = sum(weight.numel() for weight in model.parameters())
    tower = sum(weight.numel() for weight in model.get_submodule(names.vision_module).parameters())
    if run.lora != "none":
        model = get_peft_model(model, lora_config(run, names))
    elif not run.train_vision:
        freeze_vision(model, names)
    counts = count(AutoConfig.from_pretrained(checkpoints[family]), run)
    assert (counts.base, counts.vision) == (whole, tower)
    assert counts.trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert counts.adapter == (counts.trained if run.lora != "none" else 0)
    assert counts.total == sum(weight.numel() for weight in model.parameters())


def test_counts_of_the_real_models(seven, eight):
    counts = count(seven, plain())
    assert counts.base == counts.trained == SEVEN
    assert counts.embedding == 2 * 152064 * 3584
    # Per layer q, k, v, o and gate, up, down get r x (inputs + outputs) each.
    h, f, k = 3584, 18944, 512
    assert count(seven, plain(lora="language")).adapter == 28 * 64 * (2 * (h + h) + 2 * (h + k) + 3 * (h + f))
    assert count(eight, plain()).base == EIGHT
    assert count(tables.three_billion(seven), plain()).base == 3_754_622_976  # the card says 3.75B


def test_widths_of_the_real_models(seven, eight):
    ours, theirs = widths(seven), widths(eight)
    assert (ours.factor, ours.patch, ours.keys_and_values) == (28, 3 * 2 * 14 * 14, 2 * 28 * 4 * 128)
    assert (ours.full_attention, ours.window, ours.mergers) == (4, 64, 1)
    assert (theirs.factor, theirs.mergers, theirs.full_attention) == (32, 4, 27)
    assert theirs.query_norm and not theirs.vision_gated


@pytest.mark.parametrize("family", ("qwen2_5_vl", "qwen3_vl"))
@pytest.mark.parametrize("size", ((28, 28), (333, 191), (900, 700), (64, 1000)))
def test_patches_are_the_processor_s(checkpoints, family, size):
    from conftest import picture

    processor = AutoProcessor.from_pretrained(checkpoints[family]).image_processor
    limits = PixelLimits(processor.size["shortest_edge"], processor.size["longest_edge"])
    w = widths(AutoConfig.from_pretrained(checkpoints[family]))
    pixels = processor(images=[picture(0, size)], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (visual_patches(size, w, limits), w.patch)


def test_text_is_not_counted_too_low(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "qwen" / "qwen2.5-vl-7b-instruct")
    prompts = ResizeEnv().prompts
    for text in (prompts.system, prompts.task, prompts.after_image):
        assert len(tokenizer(text)["input_ids"]) <= text_tokens(text) <= 1.6 * len(tokenizer(text)["input_ids"])
