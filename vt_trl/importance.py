"""How far the engine's log-probabilities may be from the trainer's: the truncated or masked importance ratio.

TRL multiplies the per-token loss with it when vLLM samples (``vllm_importance_sampling_*`` settings).
"""

from __future__ import annotations

import math

import torch


def sampling_ratio(
    old: torch.Tensor,
    sampled: torch.Tensor,
    mask: torch.Tensor,
    mode: str,
    low: float | None,
    high: float | None,
) -> torch.Tensor:
    """exp(old - sampled) over loss tokens, bounded.

    Args:
        old, sampled: (B, C) log-probabilities of trainer and engine; NaN in ``sampled`` (unknown) counts as equal.
        mask: (B, C) loss mask.
        mode: ``token_*`` gives (B, C), ``sequence_*`` (B, 1); ``*_truncate`` clamps, ``*_mask`` zeroes the rest.
    """
    level, _, action = mode.partition("_")
    if level not in ("token", "sequence") or action not in ("truncate", "mask"):
        raise ValueError(f"vllm_importance_sampling_mode {mode!r}: use token_ or sequence_, truncate or mask.")
    difference = torch.nan_to_num((old - sampled) * mask, nan=0.0)
    if level == "sequence":
        difference = difference.sum(dim=-1, keepdim=True)
    ratio = difference.exp()
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if action == "truncate":
        return ratio.clamp(low, high)
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)
