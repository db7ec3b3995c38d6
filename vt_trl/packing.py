"""Rollouts to batch tensors. The only place that lays out tokens and pictures, and the only one that checks them.

Layout per sample: ``[pad … prompt | completion … pad]``. The attention mask is 1 on every real token, tool text and
image tokens included; the loss mask is 1 on sampled tokens only. They are two masks, always.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from trl.trainer.utils import pad

from vt_trl.features import ImageFeatures
from vt_trl.types import Rollout


class AlignmentError(RuntimeError):
    """Tokens and pictures of a rollout disagree; training on it would be training on noise."""


def check_alignment(rollout: Rollout, features: ImageFeatures, image_token_id: int) -> None:
    """Raise AlignmentError unless masks, log-probabilities and pictures of a rollout fit its tokens."""
    length = len(rollout.completion_ids)
    if not length == len(rollout.loss_mask) == len(rollout.logprobs):
        raise AlignmentError(
            f"row id {rollout.row.get('id')!r}: {length} completion tokens, {len(rollout.loss_mask)} mask entries and "
            f"{len(rollout.logprobs)} log-probabilities."
        )
    sampled = [token for turn in rollout.turns for token in turn.token_ids]
    trained = [token for token, keep in zip(rollout.completion_ids, rollout.loss_mask, strict=True) if keep]
    if trained != sampled:
        raise AlignmentError(f"row id {rollout.row.get('id')!r}: the trained tokens are not the sampled ones.")
    if image_token_id in sampled:
        raise AlignmentError(
            f"row id {rollout.row.get('id')!r}: the policy sampled the image placeholder {image_token_id}; "
            f"the backend must ban it."
        )
    runs = placeholder_runs([*rollout.prompt_ids, *rollout.completion_ids], image_token_id)
    expected = [features.visual_tokens(image) for image in rollout.images]
    if runs != expected:
        raise AlignmentError(
            f"row id {rollout.row.get('id')!r}: placeholder runs of {runs} tokens, but the pictures make {expected}."
        )


def placeholder_spans(token_ids: Sequence[int], image_token_id: int) -> list[tuple[int, int]]:
    """(start, end) of each run of ``image_token_id``, in order: one run per picture, as long as its visual tokens."""
    spans, start = [], 0
    for token, run in groupby(token_ids):
        end = start + len(list(run))
        if token == image_token_id:
            spans.append((start, end))
        start = end
    return spans


def placeholder_runs(token_ids: Sequence[int], image_token_id: int) -> list[int]:
    """Length of each run of ``image_token_id``, in order."""
    return [end - start for start, end in placeholder_spans(token_ids, image_token_id)]


def pack(
    rollouts: Sequence[Rollout],
    features: ImageFeatures,
    *,
    pad_id: int,
    image_token_id: int,
    device: torch.device,
    pad_to_multiple_of: int | None = None,
    share_images: bool = True,
) -> dict[str, Any]:
    """The fields of a generation batch that come from rollouts alone, for B rollouts with U unique pictures.

    Returns TRL's ``prompt_ids``, ``prompt_mask`` (B, P), ``completion_ids``, ``completion_mask``, ``tool_mask`` (B, C;
    TRL's name for the loss mask) and ``sampling_per_token_logps`` (B, C; NaN where unknown); and ours:
    ``prompt_index`` (list of B), equal for rollouts with the same prompt and pictures in it, and ``prompt_images``
    (list of B), how many pictures lie in the prompt; and, if there are pictures, ``pixel_values`` (list of U, each
    (patches, dim)), ``image_grid_thw`` (U, 3; on the CPU) and ``image_index`` (list of B lists: the unique picture of
    each placeholder run). Without ``share_images`` every occurrence counts as a picture of its own.
    """
    for rollout in rollouts:
        check_alignment(rollout, features, image_token_id)

    def stack(rows: list[list[Any]], fill: float, side: str, dtype: torch.dtype) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=dtype) for row in rows]
        return pad(tensors, fill, side, pad_to_multiple_of=pad_to_multiple_of).to(device)

    prompts = [rollout.prompt_ids for rollout in rollouts]
    completions = [rollout.completion_ids for rollout in rollouts]
    logprobs = [[float("nan") if p is None else p for p in rollout.logprobs] for rollout in rollouts]
    batch: dict[str, Any] = {
        "prompt_ids": stack(prompts, pad_id, "left", torch.long),
        "prompt_mask": stack([[1] * len(ids) for ids in prompts], 0, "left", torch.long),
        "completion_ids": stack(completions, pad_id, "right", torch.long),
        "completion_mask": stack([[1] * len(ids) for ids in completions], 0, "right", torch.long),
        "tool_mask": stack([rollout.loss_mask for rollout in rollouts], 0, "right", torch.long),
        "sampling_per_token_logps": stack(logprobs, 0.0, "right", torch.float32),
    }
    in_prompt = [len(placeholder_runs(ids, image_token_id)) for ids in prompts]
    known: dict[Any, int] = {}
    batch["prompt_index"] = [
        known.setdefault((tuple(rollout.prompt_ids), *map(id, rollout.images[:count])), len(known))
        for rollout, count in zip(rollouts, in_prompt, strict=True)
    ]
    if any(rollout.images for rollout in rollouts):
        batch |= _pictures(rollouts, features, device, share_images)
    return batch | {"prompt_images": in_prompt}


def _pictures(
    rollouts: Sequence[Rollout], features: ImageFeatures, device: torch.device, share: bool
) -> dict[str, Any]:
    """Pixels of each unique picture, and which of them each rollout shows."""
    places: dict[int, int] = {}
    entries: list[tuple[torch.Tensor, torch.Tensor]] = []

    def place(image: Any) -> int:
        if share and id(image) in places:
            return places[id(image)]
        entries.append((features.patches(image), features.grid(image)) if share else features.preprocess(image))
        return places.setdefault(id(image), len(entries) - 1) if share else len(entries) - 1

    index = [[place(image) for image in rollout.images] for rollout in rollouts]
    return {
        "pixel_values": [patches.to(device) for patches, _ in entries],
        "image_grid_thw": torch.stack([grid for _, grid in entries]),
        "image_index": index,
    }
