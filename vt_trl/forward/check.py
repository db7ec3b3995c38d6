"""The self-check of a run: the packed forward against the plain one, on rows of the run's own first batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vt_trl.forward.batches import by_prompt
from vt_trl.forward.passes import Scores

# Mean absolute difference of log-probabilities. Completions that see each other differ by 0.1 and more; single
# precision rounds at 1e-6, and half precision at a few hundredths for a single token, less on average.
_WHOLE, _HALF = 1e-4, 3e-2


def tolerance(model: torch.dtype, mixed_precision: str) -> float:
    """How far two orders of the same sums may be apart on average, in the precision that a run computes in."""
    return _HALF if mixed_precision != "no" or model in (torch.float16, torch.bfloat16) else _WHOLE


def check_rows(batch: dict[str, Any]) -> list[int]:
    """Two rows of one prompt: the one with the most pictures, and the shortest other one."""
    images = batch.get("image_index", [()] * len(batch["prompt_index"]))
    lengths = batch["completion_mask"].sum(1).tolist()
    groups = by_prompt(batch["prompt_index"], range(len(lengths)))
    group = max(groups, key=lambda rows: max(len(images[row]) for row in rows))
    first = max(group, key=lambda row: len(images[row]))
    others = [row for row in group if row != first]
    return [first, *sorted(others, key=lengths.__getitem__)[:1]]


def largest_difference(
    packed: Scores, alone: Sequence[Scores], mask: torch.Tensor, rows: Sequence[int]
) -> torch.Tensor:
    """The largest of the rows' mean absolute differences, over tokens with a label; NaN where one is NaN."""
    gaps = []
    for row, one in zip(rows, alone, strict=True):
        gap = (packed.logprobs[row] - one.logprobs[row]).abs()[mask[row].bool()]
        gaps.append(gap.mean() if len(gap) else gap.sum())
    return torch.stack(gaps).float().max()
