"""Rewards to advantages, group by group (GRPO, arXiv 2402.03300, Section 4.1)."""

from __future__ import annotations

import torch

_STD_FLOOR = 1e-4  # as in TRL and in VisionThink's filter


def group_advantages(rewards: torch.Tensor, group_size: int, scale: str = "group") -> torch.Tensor:
    """Advantages (N,) of rewards (N,) that lie group by group.

    A group with an unknown (NaN) reward is out as a whole: its advantages are 0, because a baseline from some of its
    members would be biased. ``scale``: divide by the standard deviation of the ``group``, of the ``batch``, or not at
    all (``none``).
    """
    groups = rewards.view(-1, group_size)
    known = ~groups.isnan().any(dim=1, keepdim=True)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if scale == "group" and group_size > 1:
        centred = centred / (groups.std(dim=1, keepdim=True) + _STD_FLOOR)
    elif scale == "batch" and known.sum() * group_size > 1:
        centred = centred / (groups[known[:, 0]].std() + _STD_FLOOR)
    return torch.where(known, centred, 0.0).reshape(-1)
