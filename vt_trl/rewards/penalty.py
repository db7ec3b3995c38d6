"""What a request for the full image costs, decided per group (VisionThink, Section 3.4, Equations 4-5).

A group function sees the rollouts of one prompt together: ``correct`` (G,) bool, ``asked`` (G,) bool -> penalty (G,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

PenaltyRule = Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor]

# The released code adds this to the denominator, so that a ratio of exactly theta counts as below it.
_RELEASED_EPSILON = 1e-4


def direct_share(correct: torch.Tensor, asked: torch.Tensor) -> float:
    """r = C_direct / (C_direct + C_high): the share of the correct answers that did without the full image.

    With no correct answer at all r is 0 / 0; it is taken as 0, as if full resolution were needed.
    """
    direct, high = int((correct & ~asked).sum()), int((correct & asked).sum())
    return direct / (direct + high) if direct + high else 0.0


def _paper(correct: torch.Tensor, asked: torch.Tensor, theta: float, amount: float) -> torch.Tensor:
    """Equation 5: direct answers pay where r < theta, requests pay where r >= theta, right or wrong."""
    needs_full = direct_share(correct, asked) < theta
    return amount * (~asked if needs_full else asked).float()


def _paper_correct(correct: torch.Tensor, asked: torch.Tensor, theta: float, amount: float) -> torch.Tensor:
    """Equation 5 applied to correct answers only: a wrong answer already earns nothing."""
    return _paper(correct, asked, theta, amount) * correct.float()


def _released(correct: torch.Tensor, asked: torch.Tensor, theta: float, amount: float) -> torch.Tensor:
    """The published code: a correct request always pays; a correct direct answer pays where 0 < r < theta."""
    direct, high = int((correct & ~asked).sum()), int((correct & asked).sum())
    ratio = direct / (direct + high + _RELEASED_EPSILON)
    lucky = (correct & ~asked) if 0 < ratio < theta else torch.zeros_like(correct)
    return amount * ((correct & asked) | lucky).float()


def _always(correct: torch.Tensor, asked: torch.Tensor, theta: float, amount: float) -> torch.Tensor:
    """Every request pays (the paper's ablation, Figure 3a)."""
    return amount * asked.float()


def _none(correct: torch.Tensor, asked: torch.Tensor, theta: float, amount: float) -> torch.Tensor:
    return torch.zeros(len(asked))


PENALTIES: dict[str, PenaltyRule] = {
    "paper": _paper,
    "paper_correct": _paper_correct,
    "released": _released,
    "always": _always,
    "none": _none,
}


def group_penalty(
    rule: str,
    correct: torch.Tensor,
    asked: torch.Tensor,
    group_size: int,
    theta: float = 0.2,
    amount: float = 0.1,
    spent: torch.Tensor | None = None,
) -> torch.Tensor:
    """Penalties (N,) for N rollouts that lie group by group. ``correct`` and ``asked`` are bool (N,).

    ``spent`` (N,): visual tokens shown on request. With it a rollout that asked pays by its share of the most that was
    spent in its group, so that a small look costs less than a large one; without it every call costs the same.
    """
    if len(correct) % group_size:
        raise ValueError(f"{len(correct)} rollouts are not whole groups of {group_size}.")
    penalty = PENALTIES[rule]
    groups = zip(correct.view(-1, group_size), asked.view(-1, group_size), strict=True)
    paid = torch.cat([penalty(c, a, theta, amount) for c, a in groups])
    if spent is None:
        return paid
    spent = spent.float().view(-1, group_size)
    share = (spent / spent.amax(dim=1, keepdim=True).clamp(min=1)).view(-1)
    return torch.where(asked, paid * share, paid)
