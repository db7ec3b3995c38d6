"""Operations of a forward on paper, for stock TRL's layout and for ours: the model that measurements are set beside.

2 per weight and token, 4 per pair of positions and width of the queries in each layer (half where a prompt is causal;
a mask is computed in full), 2 per entry of the output head and labelled position. Backward and checkpointing multiply
everything alike, so ratios of forwards are ratios of updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vt_trl.preflight.counts import Counts, Widths
from vt_trl.types import Rollout


@dataclass(frozen=True)
class Operations:
    """Of one forward over a micro-batch."""

    language: float
    attention: float
    head: float
    vision: float

    @property
    def total(self) -> float:
        return self.language + self.attention + self.head + self.vision


def stock_operations(w: Widths, counts: Counts, rollouts: Sequence[Rollout]) -> Operations:
    """Every rollout padded to the longest, every picture through the tower, the head on all completion tokens."""
    longest = max(len(one.completion_ids) for one in rollouts)
    tokens = sum(len(one.prompt_ids) + longest for one in rollouts)
    pairs = sum((len(one.prompt_ids) + longest) ** 2 for one in rollouts)
    labelled = sum(len(one.completion_ids) for one in rollouts)
    return _operations(w, counts, tokens, pairs, labelled, [image for one in rollouts for image in one.images])


def our_operations(w: Widths, counts: Counts, rollouts: Sequence[Rollout]) -> Operations:
    """Each prompt once, no padding, each picture once, the head on sampled tokens."""
    tokens = pairs = labelled = 0.0
    prompts: set[tuple[int, ...]] = set()
    pictures: dict[int, Any] = {}
    for one in rollouts:
        prefix, branch = len(one.prompt_ids) - 1, len(one.completion_ids)
        if tuple(one.prompt_ids) not in prompts:
            prompts.add(tuple(one.prompt_ids))
            tokens, pairs = tokens + prefix, pairs + prefix**2 / 2
        tokens, pairs = tokens + branch, pairs + branch * (prefix + branch)
        labelled += sum(one.loss_mask)
        pictures |= {id(image): image for image in one.images}
    return _operations(w, counts, tokens, pairs, labelled, list(pictures.values()))


def _operations(
    w: Widths, counts: Counts, tokens: float, pairs: float, labelled: float, images: Sequence[Any]
) -> Operations:
    vision = 0.0
    for image in images:
        patches = (image.width // w.side) * (image.height // w.side)
        windowed = (w.vision_layers - w.full_attention) * w.window
        vision += patches * (2 * counts.vision + 4 * w.vision_hidden * (w.full_attention * patches + windowed))
    return Operations(
        language=2.0 * counts.language * tokens,
        attention=4.0 * w.layers * w.queries * pairs,
        head=2.0 * w.vocabulary * w.hidden * labelled,
        vision=vision,
    )
