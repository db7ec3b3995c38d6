"""The workload of :mod:`benchmarks.step`: a model of a shape, rollouts of given lengths, and both trainers' passes."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import (
    pad,
    shuffle_sequence_dict,
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from benchmarks.rollout_parts import phrases
from vt_trl.config import VTGRPOConfig
from vt_trl.forward.batches import micro_batches
from vt_trl.fused_head import labelled_positions_only
from vt_trl.generation.base import ScriptedBackend
from vt_trl.packing import pack
from vt_trl.passes import completion_logprobs
from vt_trl.speed import SpeedSettings
from vt_trl.tiny import build_tiny
from vt_trl.token_ban import ban_tokens
from vt_trl.trainer import VTGRPOTrainer
from vt_trl.types import Rollout, RolloutStatus, Turn

LEVERS = [name for name in vars(SpeedSettings) if name.startswith(("share", "loss", "balance", "skip"))]

_TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112,
          "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
# Text and vision settings that differ from a tiny checkpoint's. `cpu` keeps the proportions of 7b: per token the
# output head costs 8% of the layers, and per visual token the tower costs 40% of them.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cpu": (
        {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 1024,
         "num_hidden_layers": 3, "vocab_size": 1024},
        {"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 2, "out_hidden_size": 256},
    ),
    "3b": (
        {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "intermediate_size": 11008,
         "num_hidden_layers": 36, "vocab_size": 151936},
        _TOWER | {"out_hidden_size": 2048},
    ),
    "7b": (
        {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
         "num_hidden_layers": 28, "vocab_size": 152064},
        _TOWER | {"out_hidden_size": 3584},
    ),
}  # fmt: skip
_MROPE = {64: [8, 12, 12], 128: [16, 24, 24]}  # by head width


@dataclass(frozen=True)
class Sizes:
    """Tokens: a low-resolution picture of ``rows`` x ``columns``, one with twice the sides, text, and turns."""

    groups: int
    members: int
    rows: int
    columns: int
    text: int
    turn: int
    wrap: int = 30  # what the tool says around its picture

    @property
    def low(self) -> int:
        return self.rows * self.columns

    @property
    def high(self) -> int:
        return 4 * self.low


FULL = Sizes(groups=2, members=16, rows=14, columns=25, text=300, turn=150)
QUARTER = Sizes(groups=2, members=16, rows=8, columns=11, text=75, turn=38, wrap=8)
TEST = Sizes(groups=2, members=4, rows=2, columns=3, text=8, turn=40, wrap=4)
TOKENS = {"full": FULL, "quarter": QUARTER, "test": TEST}


def make_checkpoint(folder: Path, shape: str) -> Path:
    """A Qwen2.5-VL checkpoint of a shape, without weights: they are drawn when it is loaded (:func:`load`)."""
    build_tiny(folder, corpus=phrases(), max_pixels=4096 * 28 * 28)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text, vision = SHAPES[shape]
    config["text_config"] |= text
    width = text["hidden_size"] // text["num_attention_heads"]
    config["text_config"]["rope_parameters"]["mrope_section"] = _MROPE[width]
    config["text_config"]["layer_types"] = ["full_attention"] * text["num_hidden_layers"]
    config["vision_config"] |= vision
    if "fullatt_block_indexes" not in vision:
        config["vision_config"]["fullatt_block_indexes"] = [vision["depth"] - 1]
    path.write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    return folder


def load(folder: Path, device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(folder), dtype=dtype, attn_implementation="sdpa"
        )


def make_rollouts(folder: Path, sizes: Sizes, percent: int, seed: int = 0) -> list[Rollout]:
    """``sizes.groups`` groups; ``percent`` of each group's members look at the larger picture. Turn lengths are even
    draws from half to one and a half times ``sizes.turn``, the same for every way of computing them."""
    draw = random.Random(seed)
    config = AutoConfig.from_pretrained(folder)
    text = lambda count: [draw.randrange(20, 200) for _ in range(count)]  # noqa: E731
    length = lambda: draw.randint(sizes.turn // 2, 3 * sizes.turn // 2)  # noqa: E731

    def shown(tokens: int) -> list[int]:
        return [config.vision_start_token_id, *[config.image_token_id] * tokens, config.vision_end_token_id]

    rollouts = []
    for _ in range(sizes.groups):
        low, high = _picture(draw, sizes, 28), _picture(draw, sizes, 56)
        half = sizes.text // 2
        prompt = [*text(half), *shown(sizes.low), *text(sizes.text - half)]
        asking = set(draw.sample(range(sizes.members), round(sizes.members * percent / 100)))
        for member in range(sizes.members):
            turns = [text(length())] + ([text(length())] if member in asking else [])
            told = [*text(sizes.wrap // 2), *shown(sizes.high), *text(sizes.wrap - sizes.wrap // 2)]
            ids, mask = list(turns[0]), [1] * len(turns[0])
            if len(turns) == 2:
                ids, mask = ids + told + turns[1], mask + [0] * len(told) + [1] * len(turns[1])
            made = [Turn("", tuple(turn), (0.0,) * len(turn), True) for turn in turns]
            images = [low, high] if len(turns) == 2 else [low]
            rollouts.append(
                Rollout({"id": "-"}, prompt, ids, mask, [0.0] * len(ids), images, [], 0, made, RolloutStatus.ANSWERED)
            )
    return rollouts


def _picture(draw: random.Random, sizes: Sizes, side: int) -> Image.Image:
    width, height = sizes.columns * side, sizes.rows * side
    return Image.frombytes("RGB", (width, height), draw.randbytes(3 * width * height))


def _settings(out: Path, sizes: Sizes, micro_batch: int, device: str) -> dict[str, Any]:
    count = sizes.groups * sizes.members
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": count // micro_batch,
        "num_generations": sizes.members,
        "max_completion_length": 100_000,
        "beta": 0.0,
        "gradient_checkpointing": True,
        "use_cpu": device == "cpu",
        "bf16": device != "cpu",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _rows(count: int) -> Dataset:
    return Dataset.from_list(
        [{"id": str(n), "prompt": "-", "answer": ["-"], "question": "-", "image": ""} for n in range(count)]
    )


class Work:
    """One way of computing a step's update: :meth:`preprocess`, then :meth:`old_pass` and :meth:`training_pass`."""

    trainer: Any

    def zero(self) -> None:
        self.trainer.model.zero_grad(set_to_none=True)

    def gradient_norm(self) -> float:
        """Of all weights: both ways must have computed the same thing."""
        parts = [p.grad.float().norm() for p in self.trainer.model.parameters() if p.grad is not None]
        return torch.stack(parts).norm().item()

    def _update(self, parts: list[dict[str, Any]]) -> None:
        self.trainer.current_gradient_accumulation_steps = len(parts)
        for part in parts:
            self.trainer.compute_loss(self.trainer.model, part).backward()


class Ours(Work):
    """vt_trl's data path and forward; ``off`` names levers to switch off."""

    def __init__(
        self, folder: Path, sizes: Sizes, micro_batch: int, device: str, dtype: torch.dtype, peft: Any = None
    ):
        args = VTGRPOConfig(**_settings(folder / "ours", sizes, micro_batch, device), environment="direct")
        model, processor = load(folder, device, dtype), AutoProcessor.from_pretrained(folder)
        self.trainer = VTGRPOTrainer(
            model, args, _rows(2), backend=ScriptedBackend(None), processing_class=processor, peft_config=peft
        )
        self.trainer.model.train()

    @contextmanager
    def without(self, off: tuple[str, ...]) -> Iterator[None]:
        args, forward = self.trainer.args, self.trainer.forward
        for name in LEVERS:
            setattr(args, name, name not in off)
        cache, forward.packed = forward.cache, args.share_prefix
        forward.cache = cache if args.share_vision else None
        try:
            yield
        finally:
            forward.cache = cache

    def pictures(self, rollouts: list[Rollout]) -> None:
        """The image processor on every picture object once."""
        self.trainer.features.clear()
        for one in rollouts:
            for image in one.images:
                self.trainer.features.patches(image)

    def preprocess(self, rollouts: list[Rollout], advantages: torch.Tensor) -> None:
        trainer = self.trainer
        trainer.features.clear()
        trainer.forward.forget()
        self.batch = pack(
            rollouts,
            trainer.features,
            pad_id=trainer._tokenizer.pad_token_id,
            image_token_id=trainer.image_token_id,
            device=trainer.accelerator.device,
            share_images=trainer.args.share_images,
        )
        self.batch |= {
            "advantages": advantages.to(trainer.accelerator.device),
            "num_items_in_batch": self.batch["tool_mask"].sum(),
            "loss_scale": torch.ones(len(rollouts)),
        }
        self.pixel_bytes = sum(one.nbytes for one in self.batch["pixel_values"])

    def old_pass(self) -> None:
        with torch.no_grad():
            chunk = self.trainer.args.per_device_train_batch_size
            self.batch["old_per_token_logps"] = completion_logprobs(
                self.trainer, self.trainer.model, self.batch, chunk
            )

    def training_pass(self) -> None:
        args = self.trainer.args
        steps = args.gradient_accumulation_steps
        self._update(micro_batches(self.batch, steps, steps, args.balance_micro_batches))


class Stock(Work):
    """Stock TRL 1.16: its batch layout, its forward and its loss, fed with the rollouts its tool loop would have made.

    Its output head scores every position on a CPU and labelled ones on a GPU; here it scores labelled ones on both.
    ``banned``: tokens that vt_trl's policy cannot sample, banned here too so that the numbers can be compared.
    """

    def __init__(
        self,
        folder: Path,
        sizes: Sizes,
        micro_batch: int,
        device: str,
        dtype: torch.dtype,
        peft: Any = None,
        banned: Sequence[int] = (),
    ):
        args = GRPOConfig(**_settings(folder / "stock", sizes, micro_batch, device))
        model, processor = load(folder, device, dtype), AutoProcessor.from_pretrained(folder)
        ban_tokens(model, banned)
        self.trainer = GRPOTrainer(
            model, lambda completions, **_: [0.0] * len(completions), args, _rows(2), None, processor, peft_config=peft
        )
        self.trainer.model.train()

    def pictures(self, rollouts: list[Rollout]) -> Any:
        """The image processor is called as often, and on as many pictures, as by TRL when tools return pictures:
        ``_tokenize_prompts`` on all prompts; ``_get_tool_suffix_ids`` on each tool picture; ``_tool_call_loop`` on all
        pictures of the rollouts that called; ``_generate_and_score_completions`` on all pictures of all rollouts."""
        process = self.trainer.processing_class.image_processor
        calling = [one for one in rollouts if len(one.images) > 1]
        process(images=[one.images[0] for one in rollouts], return_tensors="pt")
        for one in calling:
            process(images=[one.images[1]], return_tensors="pt")
        if calling:
            process(images=[image for one in calling for image in one.images], return_tensors="pt")
        return process(images=[image for one in rollouts for image in one.images], return_tensors="pt")

    def preprocess(self, rollouts: list[Rollout], advantages: torch.Tensor) -> None:
        trainer, device = self.trainer, self.trainer.accelerator.device
        pictures = self.pictures(rollouts)

        def stack(values: list[list[int]], fill: int, side: str) -> torch.Tensor:
            return pad([torch.tensor(one) for one in values], fill, side).to(device)

        blank = trainer._tokenizer.pad_token_id
        prompts, completions = [one.prompt_ids for one in rollouts], [one.completion_ids for one in rollouts]
        self.batch = {
            "prompt_ids": stack(prompts, blank, "left"),
            "prompt_mask": stack([[1] * len(ids) for ids in prompts], 0, "left"),
            "completion_ids": stack(completions, blank, "right"),
            "completion_mask": stack([[1] * len(ids) for ids in completions], 0, "right"),
            "tool_mask": stack([one.loss_mask for one in rollouts], 0, "right"),
            "advantages": advantages.to(device),
            "pixel_values": pictures["pixel_values"].to(device),
            "image_grid_thw": pictures["image_grid_thw"].to(device),
            "num_images": [len(one.images) for one in rollouts],
        }
        self.batch["num_items_in_batch"] = self.batch["tool_mask"].sum()
        ids = torch.cat([self.batch["prompt_ids"], self.batch["completion_ids"]], dim=1)
        self.batch["mm_token_type_ids"] = (ids == trainer.model.config.image_token_id).int()
        self.pixel_bytes = self.batch["pixel_values"].nbytes

    def old_pass(self) -> None:
        batch, trainer = self.batch, self.trainer
        pictures = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
        with torch.no_grad(), labelled_positions_only():
            self.batch["old_per_token_logps"], _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].size(1),
                trainer.args.per_device_train_batch_size,
                **{name: batch[name] for name in pictures},
            )

    def training_pass(self) -> None:
        steps = self.trainer.args.gradient_accumulation_steps
        parts = split_tensor_dict(shuffle_sequence_dict(split_pixel_values_by_grid(self.batch)), steps)
        with labelled_positions_only():
            self._update([unsplit_pixel_values_by_grid(part) for part in parts])


def advantages(sizes: Sizes) -> torch.Tensor:
    """One per rollout, none of them 0, so that nobody can leave a rollout out."""
    count = sizes.groups * sizes.members
    return torch.tensor([(-1) ** n * (0.5 + math.sin(n) ** 2) for n in range(count)])
