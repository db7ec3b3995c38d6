"""Packed micro-batches for ``python -m benchmarks.preflight_check``: groups that share a prompt, as the trainer's do.

The forward is this library's own (:mod:`vt_trl.forward`); on a CPU it attends segment by segment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PretrainedConfig

from vt_trl.forward.attention import install
from vt_trl.forward.batches import on_cpu
from vt_trl.forward.passes import Policy, packed_pass
from vt_trl.preflight.activations import MicroBatch, Packing
from vt_trl.preflight.counts import Widths, widths
from vt_trl.token_ban import ban_tokens


@dataclass(frozen=True)
class Groups:
    """``samples`` rollouts in groups of ``group``, one picture of ``rows`` x ``columns`` patches in each prompt."""

    samples: int
    group: int
    text: int  # tokens besides the picture, half of them in the prompt
    rows: int
    columns: int

    @property
    def pictures(self) -> int:
        return self.samples // self.group

    def prompt(self, w: Widths) -> int:
        """Tokens of a prompt."""
        return self.rows * self.columns // w.merge**2 + self.text - self.text // 2

    @property
    def completions(self) -> list[int]:
        """Tokens of each completion, no two of a group alike."""
        return [self.text // 2 - 3 * (number % self.group) for number in range(self.samples)]


def packed_forward(
    config: PretrainedConfig, model: Any, groups: Groups, device: torch.device, autocast: Any
) -> tuple[Callable[[], Any], list[torch.Tensor]]:
    """A forward of ``model`` over a packed batch, and the batch's pixel tensors."""
    install("sdpa")
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    ban_tokens(whole, [config.image_token_id])
    policy = Policy(model, whole, config.image_token_id, lambda: autocast)
    batch = _batch(config, groups, device)
    mask = batch["completion_mask"]

    def forward() -> Any:
        scores = packed_pass(policy, batch, on_cpu(batch, mask), range(groups.samples), None)
        return SimpleNamespace(log_probs=scores.logprobs, entropy=scores.entropies)

    return forward, batch["pixel_values"]


def packed_micro_batch(config: PretrainedConfig, groups: Groups, gathered: bool) -> MicroBatch:
    """The same micro-batch as the preflight describes one."""
    w = widths(config)
    known, segments = groups.prompt(w) - 1, []
    for number, length in enumerate(groups.completions):
        if number % groups.group == 0:
            segments.append((known, known))
        segments.append((length, known + length))
    tokens, labelled = sum(queries for queries, _ in segments), sum(groups.completions)
    patches = groups.pictures * groups.rows * groups.columns
    packing = Packing(tuple(segments), gathered)
    return MicroBatch(1, tokens, labelled, patches, groups.pictures, False, packing, joined=True)


def _batch(config: PretrainedConfig, groups: Groups, device: torch.device) -> dict[str, Any]:
    """What :func:`vt_trl.packing.pack` makes of such rollouts, with random tokens and pixels."""
    w, generator = widths(config), torch.Generator().manual_seed(0)
    prompt, lengths = groups.prompt(w), groups.completions
    ids = torch.randint(0, 200, (groups.pictures, prompt), generator=generator)
    ids[:, 8 : 8 + groups.rows * groups.columns // w.merge**2] = config.image_token_id
    prompts = ids.repeat_interleave(groups.group, dim=0)
    completions = torch.randint(0, 200, (groups.samples, max(lengths)), generator=generator)
    kept = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tensors = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": kept.long(),
    }
    shape = (groups.rows * groups.columns, w.patch)
    owner = [number // groups.group for number in range(groups.samples)]
    return {name: tensor.to(device) for name, tensor in tensors.items()} | {
        "prompt_index": owner,
        "prompt_images": [1] * groups.samples,
        "image_index": [[one] for one in owner],
        "pixel_values": [torch.rand(shape, generator=generator).to(device) for _ in range(groups.pictures)],
        "image_grid_thw": torch.tensor([[1, groups.rows, groups.columns]] * groups.pictures),
    }
