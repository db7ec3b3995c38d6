"""Parts of a packed generation batch: some of its rows, and its division into micro-batches.

A batch is the dictionary of :func:`vt_trl.packing.pack`. Pictures are in it once, in ``pixel_values`` and
``image_grid_thw``, and every part of it refers to those same tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

PICTURES = ("pixel_values", "image_grid_thw")  # of the whole batch, not of a row
INTEGERS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "loss_mask")


def take(batch: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The rows of a batch, with the pictures of all of it."""
    index: torch.Tensor | None = None
    part: dict[str, Any] = {}
    for name, value in batch.items():
        if name in PICTURES or (isinstance(value, torch.Tensor) and value.ndim == 0):
            part[name] = value
        elif isinstance(value, torch.Tensor):
            if index is None or index.device != value.device:
                index = torch.tensor(list(rows), device=value.device)
            part[name] = value[index]
        else:
            part[name] = [value[row] for row in rows]
    return part


def loss_mask(batch: dict[str, Any]) -> torch.Tensor:
    """(B, C): 1 on the tokens that carry loss."""
    return batch["completion_mask"] * batch["tool_mask"]


def without_idle(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with no loss on rows whose advantage is 0; one such row stays where there is no other, to log from."""
    idle = batch["advantages"] == 0
    mask = loss_mask(batch)
    if not mask[~idle].any() and mask.any():
        lengths = mask.sum(1)
        idle[lengths.masked_fill(lengths == 0, lengths.max() + 1).argmin()] = False
    return {**batch, "tool_mask": batch["tool_mask"] * (~idle).to(batch["tool_mask"].dtype)[:, None]}


def on_cpu(batch: dict[str, Any], mask: torch.Tensor) -> dict[str, Any]:
    """What a layout is made of, on the CPU: integers of ``batch``, with ``mask`` (B, C) as ``loss_mask``."""
    found = {**batch, "loss_mask": mask}
    kept = ("prompt_index", "prompt_images", "image_index", "image_grid_thw")
    return {name: found[name].cpu() for name in INTEGERS} | {name: batch[name] for name in kept if name in batch}


def by_prompt(prompt_index: Sequence[int], rows: Iterable[int]) -> list[list[int]]:
    """``rows`` divided by their prompt, in order of first appearance; ``prompt_index``: of every row of the batch."""
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(prompt_index[row], []).append(row)
    return list(groups.values())


def token_counts(batch: dict[str, Any]) -> list[int]:
    """Tokens of each sample, prompt and completion."""
    return (batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)).tolist()


def micro_batches(batch: dict[str, Any], steps: int, per_update: int, balance: bool) -> list[dict[str, Any]]:
    """Divide a generation batch into ``steps`` micro-batches of equal numbers of rows, in random order.

    With ``balance`` groups stay together, whole or in adjacent micro-batches, so that their prompt and pictures are
    computed once; those of one update (``per_update`` micro-batches) get about equally many tokens, the fullest
    first, on every process. Otherwise rows are shuffled one by one, as TRL does it.
    """
    count = len(batch["prompt_index"])
    if not balance:
        order = torch.randperm(count).tolist()
        size = count // steps
        return [take(batch, order[start : start + size]) for start in range(0, size * steps, size)]
    return [take(batch, rows) for rows in divide(batch["prompt_index"], token_counts(batch), steps, per_update)]


def divide(prompts: Sequence[int], lengths: Sequence[int], steps: int, per_update: int) -> list[list[int]]:
    """Rows of each micro-batch (:func:`micro_batches`): ``prompts`` and ``lengths`` (N,) are those of the rows."""
    groups = by_prompt(prompts, range(len(prompts)))
    groups = [groups[number] for number in torch.randperm(len(groups)).tolist()]
    order = [row for group in groups for row in group]
    size, per_update = len(order) // steps, min(per_update, steps)
    parts: list[list[int]] = []
    for start in range(0, size * steps, size * per_update):
        rows = order[start : start + size * per_update]
        made = _balanced(rows, prompts, lengths, size)
        parts += sorted(made, key=lambda part: -sum(lengths[row] for row in part))
    return parts


def _balanced(rows: Sequence[int], prompts: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Parts of ``size`` rows: whole groups dealt out by length, or each group cut into parts of about equal length."""
    groups = by_prompt(prompts, rows)
    sizes = {len(group) for group in groups}
    if len(sizes) == 1 and size % (group_size := sizes.pop()) == 0:
        units = sorted(groups, key=lambda group: -sum(lengths[row] for row in group))
        weights = [sum(lengths[row] for row in unit) for unit in units]
        return _deal(units, weights, len(rows) // size, size // group_size)
    if all(len(group) % size == 0 for group in groups):
        parts = []
        for group in groups:
            group = sorted(group, key=lambda row: -lengths[row])
            parts += _deal([[row] for row in group], [lengths[row] for row in group], len(group) // size, size)
        return parts
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def _deal(units: Sequence[list[int]], weights: Sequence[int], parts: int, capacity: int) -> list[list[int]]:
    """Give each unit, heaviest first, to the lightest part that has fewer than ``capacity`` units."""
    made: list[list[int]] = [[] for _ in range(parts)]
    loads, held = [0] * parts, [0] * parts
    for unit, weight in zip(units, weights, strict=True):
        place = min((number for number in range(parts) if held[number] < capacity), key=loads.__getitem__)
        made[place] += unit
        loads[place] += weight
        held[place] += 1
    return made
