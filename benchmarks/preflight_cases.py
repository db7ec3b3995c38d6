"""The training steps that ``python -m benchmarks.preflight_check`` measures."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from benchmarks.preflight_packed import Groups
from vt_trl.preflight.counts import Widths


@dataclass(frozen=True)
class Case:
    """One training step: how the model is trained, and on what."""

    name: str
    samples: int
    text: int  # tokens per sample besides the picture
    picture: tuple[int, int]  # width and height in pixels, one picture per sample
    lora: str = "none"
    train_vision: bool = True
    checkpointing: bool = False
    padded: bool = True
    dtype: str = "float32"
    autocast: bool = False
    group: int = 0  # samples that share a prompt in a packed row; 0: padded

    def grid(self, w: Widths) -> tuple[int, int]:
        """Patches of the picture: rows and columns."""
        width, height = self.picture
        return height // w.factor * w.merge, width // w.factor * w.merge

    def groups(self, w: Widths) -> Groups:
        return Groups(self.samples, self.group, self.text, *self.grid(w))


def tiny_cases(small: bool = False) -> list[Case]:
    """Two batches and lengths, all weights and adapters, with and without checkpointing, and 16 bits."""
    shapes = [(2, 96, (112, 168))] if small else [(2, 96, (112, 168)), (4, 320, (224, 336))]
    cases = []
    for samples, text, picture in shapes:
        for lora in ("none", "language", "all"):
            for checkpointing in (False, True):
                name = f"{'full' if lora == 'none' else 'LoRA ' + lora}, {samples} x {text}"
                name += ", checkpointing" if checkpointing else ""
                cases.append(Case(name, samples, text, picture, lora, checkpointing=checkpointing))
    packed = [replace(case, name=f"{case.name}, packed", samples=8, group=4) for case in cases]
    if small:
        both = [case for case in cases if case.checkpointing == (case.lora == "language")][:2]
        return [*both, packed[0], packed[3]]
    samples, text, picture = shapes[-1]
    frozen = Case("frozen vision", samples, text, picture, train_vision=False)
    even = Case("full, no padding", samples, text, picture, padded=False)
    bf16 = Case("full, bf16", samples, text, picture, dtype="bfloat16")
    mixed = Case("full, fp32 under autocast", samples, text, picture, autocast=True)
    adapter = Case("LoRA all, bf16 under autocast", samples, text, picture, "all", dtype="bfloat16", autocast=True)
    one = replace(packed[-1], name="LoRA all, one group, checkpointing, packed", group=8)
    half = [replace(case, name=f"{case.name}, packed", samples=8, group=4) for case in (frozen, bf16, mixed, adapter)]
    return [*cases, frozen, even, bf16, mixed, adapter, *packed, one, *half]


def wide_cases() -> list[Case]:
    """For layers of a real model: in fp32, which a CPU multiplies much faster than bf16."""
    shape = (2, 64, (168, 168))
    return [
        Case("full", *shape),
        Case("full, checkpointing", *shape, checkpointing=True),
        Case("LoRA language, checkpointing", *shape, lora="language", checkpointing=True),
        Case("LoRA language, checkpointing, packed", 4, *shape[1:], "language", checkpointing=True, group=4),
    ]


def few_wide_layers(config: PretrainedConfig) -> PretrainedConfig:
    """A real model's configuration with one decoder layer, two vision layers and 2048 words."""
    config = copy.deepcopy(config)
    text, vision = config.get_text_config(), config.vision_config
    text.num_hidden_layers, text.vocab_size, vision.depth = 1, 2048, 2
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    for name, value in {"fullatt_block_indexes": [1], "deepstack_visual_indexes": [0]}.items():
        if hasattr(vision, name):
            setattr(vision, name, value)
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    for token, name in enumerate(ids, start=2000):
        setattr(config, name, token)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, 0)
    return config
