"""The vision tower once per unique picture: its features go to every place that shows the picture.

Gradients of all those places add up before they enter the tower, so a trained tower gets what it would have got from
running once per place. Features of a frozen tower are kept for as long as the generation batch lasts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class FeatureCache:
    """Features of frozen towers by tower and pixel tensor; :meth:`clear` it when the pixel tensors are let go."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[torch.Tensor, Any]] = {}

    def get(self, tower: nn.Module, pixels: torch.Tensor) -> Any:
        return self._known.get((id(tower), id(pixels)), (None, None))[1]

    def put(self, tower: nn.Module, pixels: torch.Tensor, features: Any) -> None:
        # The tensor is held so that its identity cannot be reused.
        self._known[id(tower), id(pixels)] = pixels, features

    def clear(self) -> None:
        self._known.clear()

    def __len__(self) -> int:
        return len(self._known)


@contextmanager
def pictures_once(
    base: nn.Module,
    pixels: Sequence[torch.Tensor],
    grids: torch.Tensor,
    order: Sequence[int],
    cache: FeatureCache | None = None,
) -> Iterator[torch.Tensor | None]:
    """Within it ``base`` (the model with ``get_image_features``) finds the features of each placeholder run.

    Args:
        pixels: patches of each unique picture, (patches, dim); ``grids`` (U, 3) their grids.
        order: the unique picture of each placeholder run, in the order of the runs.
        cache: where features of a frozen tower are kept; None: nowhere.

    Yields what to hand to the forward as ``pixel_values``: the patches the tower has to see, or None without pictures.
    """
    if not order:
        yield None
        return
    used = list(dict.fromkeys(order))
    frozen = cache is not None and not any(weight.requires_grad for weight in base.visual.parameters())
    known = {one: cache.get(base.visual, pixels[one]) if frozen else None for one in used}
    missing = [one for one in used if known[one] is None]
    original = base.get_image_features

    def features(pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None, **kwargs: Any) -> Any:
        kwargs.pop("layout", None)
        output = None
        if missing:
            output = original(pixel_values, grids[missing].to(pixel_values.device), **kwargs)
            for place, one in enumerate(missing):
                known[one] = _of_picture(output, place, detached=frozen)
                if frozen:
                    cache.put(base.visual, pixels[one], known[one])
        return _Features([known[one] for one in order])

    base.get_image_features = features
    try:
        empty = pixels[used[0]][:0]
        yield torch.cat([pixels[one] for one in missing]) if missing else empty
    finally:
        del base.get_image_features


def _of_picture(output: Any, place: int, detached: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Features of one picture: (tokens, width), and those that deepstack adds to the first layers."""
    main = output.pooler_output[place]
    deep = [layer[place] for layer in getattr(output, "deepstack_features", None) or []]
    # Gradient checkpointing may mark the inputs of a frozen tower; a kept graph would be used up by one pass.
    return (main.detach(), [layer.detach() for layer in deep]) if detached else (main, deep)


class _Features:
    """What the models read of the output of ``get_image_features``, one entry per placeholder run."""

    def __init__(self, runs: Sequence[tuple[torch.Tensor, list[torch.Tensor]]]):
        self.pooler_output = tuple(main for main, _ in runs)
        self.deepstack_features = [tuple(layers) for layers in zip(*(deep for _, deep in runs), strict=True)]
