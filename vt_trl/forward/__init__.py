"""Log-probabilities and entropies of a batch, for the old, the reference and the training pass alike.

A group of rollouts shares its prompt and its pictures; :class:`PolicyForward` computes each of them once where the
model allows it, and says so once where it does not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from vt_trl.forward.attention import install
from vt_trl.forward.batches import by_prompt, loss_mask, on_cpu, token_counts
from vt_trl.forward.check import check_rows, largest_difference, tolerance
from vt_trl.forward.passes import Policy, Scores, packed_pass, padded_pass
from vt_trl.forward.support import why_not_packed
from vt_trl.forward.vision import FeatureCache

if TYPE_CHECKING:
    from vt_trl.trainer import VTGRPOTrainer

logger = logging.getLogger(__name__)

__all__ = ["PolicyForward", "Scores"]


class PolicyForward:
    """The forward of a trainer's policy and reference; the settings are ``share_*`` and ``max_packed_tokens``."""

    def __init__(self, trainer: VTGRPOTrainer):
        self.trainer, self.args = trainer, trainer.args
        accelerator = trainer.accelerator
        # Processes that divide the weights between them wait for each other in every layer.
        self.sharded = accelerator.distributed_type is DistributedType.FSDP or trainer._dist.is_zero3
        self.cache = None if self.sharded or not self.args.share_vision else FeatureCache()
        self.packed = self.args.share_prefix
        self._checked = False
        if self.packed and (reason := why_not_packed(trainer)):
            self._fall_back(reason)
        if self.packed:
            install(self._policy(trainer.model).base.config.text_config._attn_implementation)

    def _fall_back(self, reason: str) -> None:
        self.packed = False
        logger.warning(f"Prompts are computed once per rollout, not once per group: {reason}.")

    def _policy(self, model: nn.Module) -> Policy:
        whole = self.trainer.accelerator.unwrap_model(model)
        whole = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
        return Policy(model, whole, self.trainer.image_token_id, self.trainer.accelerator.autocast)

    def forget(self) -> None:
        """Let go of features; call it when a new generation batch begins."""
        if self.cache is not None:
            self.cache.clear()

    def score(self, model: nn.Module, batch: dict[str, Any], aux_loss: bool = False) -> Scores:
        """Scores of the loss tokens of ``batch``, 0 elsewhere; rows without loss tokens are left out of the forward.

        A collective.
        """
        policy, mask = self._policy(model), self._labelled(batch)
        rows = mask.any(dim=1).nonzero()[:, 0].tolist() or [0]  # one at least: every process takes part in a forward
        once = self.args.share_vision
        if not self.packed or aux_loss:
            return padded_pass(policy, batch, mask, rows, self.cache, share_vision=once, aux_loss=aux_loss)
        parts, integers = [], on_cpu(batch, mask)
        nothing = integers | {"loss_mask": torch.zeros_like(integers["loss_mask"])}
        for part in self._parts(batch, rows):
            # An empty part only keeps other processes company.
            known, part = (integers, part) if part else (nothing, rows[:1])
            parts.append(packed_pass(policy, batch, known, part, self.cache, share_vision=once))
        # The reference's head gives no entropies.
        entropies = [part.entropies for part in parts if part.entropies is not None]
        return Scores(sum(part.logprobs for part in parts), sum(entropies) if entropies else None)

    def _labelled(self, batch: dict[str, Any]) -> torch.Tensor:
        return loss_mask(batch) if self.args.loss_tokens_only else batch["completion_mask"]

    def _parts(self, batch: dict[str, Any], rows: Sequence[int]) -> list[list[int]]:
        """``rows`` in as many parts as it takes to keep each below ``max_packed_tokens``, as many on every process."""
        limit = self.args.max_packed_tokens
        if limit is None:
            return [list(rows)]
        lengths, prompts = token_counts(batch), batch["prompt_mask"].sum(1).tolist()
        parts = split(by_prompt(batch["prompt_index"], rows), lengths, prompts, limit)
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:  # DDP exchanges buffers in every forward, and sharding weights
            wanted = torch.tensor([len(parts)], device=accelerator.device)
            parts = as_many(parts, int(accelerator.gather(wanted).max()))
        return parts

    @torch.no_grad()
    def check_once(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, float]:
        """Once per run: some rows packed and alone; falls back to the padded forward when they differ. A collective.

        Returns what is worth logging.
        """
        if self._checked or not self.packed:
            return {}
        self._checked = True
        policy, mask = self._policy(model), self._labelled(batch)
        rows = check_rows(batch)
        packed = packed_pass(policy, batch, on_cpu(batch, mask), rows, None)
        alone = [padded_pass(policy, batch, mask, [row], None) for row in rows]
        difference = largest_difference(packed, alone, mask, rows)
        difference = self.trainer.accelerator.gather(difference.reshape(1)).max().item()
        allowed = tolerance(policy.whole.dtype, self.trainer.accelerator.mixed_precision)
        if not difference <= allowed:
            self._fall_back(
                f"on the first batch its log-probabilities differ from the plain forward's by {difference:.2g} on "
                f"average, and {allowed:.2g} is what rounding explains. Please report this with your model's name"
            )
        return {"forward/check_difference": difference}


def split(
    groups: Sequence[Sequence[int]], lengths: Sequence[int], prompts: Sequence[int], limit: int
) -> list[list[int]]:
    """Rows in parts of at most ``limit`` packed tokens, or of one row where that row alone is longer.

    ``groups``: rows by prompt; ``lengths`` and ``prompts``: tokens of a row and of its prompt.
    """
    parts: list[list[int]] = []
    used = 0
    for group in groups:
        shared = prompts[group[0]]
        inside = False  # whether the prompt of this group is in the last part already
        for row in group:
            own = lengths[row] - shared + 1
            cost = own if inside else own + shared
            if parts and used + cost <= limit:
                parts[-1].append(row)
                used += cost
            else:
                parts.append([row])
                used = own + shared
            inside = True
    return parts


def as_many(parts: list[list[int]], count: int) -> list[list[int]]:
    """The same rows in ``count`` parts, by halving the largest; empty ones where there are too few rows."""
    parts = [list(part) for part in parts]
    while len(parts) < count:
        largest = max(parts, key=len)
        if len(largest) < 2:
            parts.append([])
            continue
        parts.remove(largest)
        middle = len(largest) // 2
        parts += [largest[:middle], largest[middle:]]
    return parts
