"""From a scored generation batch to TRL's loss: its division into micro-batches, and our forward in place of TRL's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from vt_trl.forward import PolicyForward
from vt_trl.forward.batches import loss_mask, micro_batches, without_idle

# Losses that TRL averages over sequences, masked ones included; the others count loss tokens.
PER_SEQUENCE_LOSSES = ("grpo", "sapo", "dr_grpo", "luspo")


class UpdatingTrainer(Trainer):
    """Mixin for a GRPO trainer whose batches are those of :func:`vt_trl.packing.pack`; ``forward`` scores them."""

    forward: PolicyForward
    _scored: dict[str, Any] | None = None  # the micro-batch whose loss is being computed

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, Any]:
        """The next micro-batch; generates when the last generation is used up. Evaluation takes its rows as they are.

        TRL's, but for the division of a generation, which knows of groups and of pictures they share.
        """
        if self._mode() == "eval":
            return self._generate_and_score_completions(generation_batch)
        steps, accumulated = self.args.steps_per_generation, self.args.gradient_accumulation_steps
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            parts = micro_batches(batch, steps, accumulated, self.args.balance_micro_batches)
            self._buffered_inputs = [without_idle(part) for part in parts] if self._zero_is_idle() else parts
        return self._buffered_inputs[self._step % steps]

    def _zero_is_idle(self) -> bool:
        """Whether a rollout whose advantage is 0 changes neither loss nor gradient."""
        other_terms = self.beta != 0.0 or self._entropy_bonus_enabled or self.aux_loss_enabled
        # These two look at all loss tokens of the micro-batch, whatever their advantage.
        over_tokens = self.loss_type == "bnpo" or self.top_entropy_quantile < 1.0
        return self.args.skip_zero_advantage and not other_terms and not over_tokens

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, *args: Any, compute_aux_loss: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What TRL's loss asks for of ``self._scored``, the micro-batch at hand, from our own forward."""
        batch = self._scored
        scores = self.forward.score(model, batch, compute_aux_loss)
        logprobs = scores.logprobs
        if (old := batch.get("old_per_token_logps")) is not None:
            logprobs = torch.where(loss_mask(batch).bool(), logprobs, old)  # no ratio where there is no loss
        return logprobs, scores.entropies, scores.aux_loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's loss; where it is a mean over sequences, over those only whose group carries loss.

        Advantages and the KL coefficient are scaled rather than the loss: TRL's entropy bonus is a mean over loss
        tokens already.
        """
        scale = inputs["loss_scale"][0].item() if self.loss_type in PER_SEQUENCE_LOSSES else 1.0
        beta, self.beta, self._scored = self.beta, self.beta * scale, inputs
        try:
            return super().compute_loss(model, {**inputs, "advantages": inputs["advantages"] * scale}, *args, **kwargs)
        finally:
            self.beta, self._scored = beta, None
