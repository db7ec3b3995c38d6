"""The passes over a packed batch that need no gradient: old and reference log-probabilities, importance ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from vt_trl.forward.batches import loss_mask, take
from vt_trl.importance import sampling_ratio

if TYPE_CHECKING:
    from vt_trl.trainer import VTGRPOTrainer


def add_logprobs(trainer: VTGRPOTrainer, batch: dict[str, Any], chunk: int) -> dict[str, float]:
    """Add to ``batch`` what TRL's loss reads, (B, C) each, and return what is worth logging.

    ``old_per_token_logps`` only where it differs from the training pass: with vLLM, whose numbers it corrects, and
    when one generation serves several updates. ``ref_per_token_logps`` with a KL term. ``chunk``: samples per forward.
    """
    args = trainer.args
    engine = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    generate_every = args.steps_per_generation * trainer.num_iterations
    with torch.no_grad(), disable_gradient_checkpointing(trainer.model, args.gradient_checkpointing_kwargs):
        numbers = trainer.forward.check_once(trainer.model, batch)
        if engine or args.gradient_accumulation_steps % generate_every != 0:
            batch["old_per_token_logps"] = completion_logprobs(trainer, trainer.model, batch, chunk)
        if trainer.beta != 0.0:
            batch["ref_per_token_logps"] = _reference_logprobs(trainer, batch, chunk)
    if not engine:
        # TRL would take these for the engine's; transformers draws from the trainer's own weights, so there is no gap.
        return numbers
    mask = loss_mask(batch)
    old, sampled = batch["old_per_token_logps"], batch["sampling_per_token_logps"]
    batch["importance_sampling_ratio"] = sampling_ratio(
        old,
        sampled,
        mask,
        trainer.vllm_importance_sampling_mode,
        trainer.vllm_importance_sampling_clip_min,
        trainer.vllm_importance_sampling_clip_max,
    )
    gap = (old - sampled).abs()[mask.bool() & ~sampled.isnan()]
    if not len(gap):
        return numbers
    return numbers | {
        "sampling/logp_difference_max": gap.max().item(),
        "sampling/logp_difference_mean": gap.mean().item(),
    }


def _reference_logprobs(trainer: VTGRPOTrainer, batch: dict[str, Any], chunk: int) -> torch.Tensor:
    if trainer.ref_model is not None:
        return completion_logprobs(trainer, trainer.ref_model, batch, chunk)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    # Without its adapter the policy is the reference; TRL adds a copy named "ref" when training goes on from one.
    with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
        return completion_logprobs(trainer, trainer.model, batch, chunk)


def completion_logprobs(trainer: VTGRPOTrainer, model: nn.Module, batch: dict[str, Any], chunk: int) -> torch.Tensor:
    """(B, C) log-probabilities of the sampled tokens under ``model``, by the same forward that trains; 0 elsewhere."""
    count = len(batch["prompt_index"])
    parts = [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    return torch.cat([trainer.forward.score(model, take(batch, rows)).logprobs for rows in parts])
