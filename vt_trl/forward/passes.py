"""One forward over some rows of a batch, padded as TRL does it or packed with shared prompts; the numbers are equal.

Both run the wrapped model (DDP, FSDP, ZeRO, PEFT) once, with TRL's fused output head on the positions that have a
label, and return (B, C) tensors that are 0 wherever there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vt_trl.forward.batches import take
from vt_trl.forward.layout import IGNORED, lay_out
from vt_trl.forward.vision import FeatureCache, pictures_once
from vt_trl.fused_head import labelled_positions_only
from vt_trl.token_ban import declare_whole


@dataclass(frozen=True)
class Scores:
    """(B, C) log-probabilities and entropies of the labelled tokens, 0 elsewhere; and the experts' load balance."""

    logprobs: torch.Tensor
    entropies: torch.Tensor | None
    aux_loss: torch.Tensor | None = None


@dataclass(frozen=True)
class Policy:
    """A model as a forward needs it: ``wrapped`` is called, ``whole`` is the model inside with its output head."""

    wrapped: nn.Module
    whole: nn.Module
    image_token_id: int
    autocast: Any  # a callable that gives a context

    @property
    def base(self) -> nn.Module:
        """The model below the output head, which knows pictures and positions."""
        return self.whole.model

    def run(self, inputs: dict[str, Any]) -> Any:
        declare_whole(self.whole)
        with labelled_positions_only(), self.autocast():
            return self.wrapped(**inputs, fused_lm_head=True)


def packed_pass(
    policy: Policy,
    batch: dict[str, Any],
    integers: dict[str, Any],
    rows: Sequence[int],
    cache: FeatureCache | None,
    *,
    share_vision: bool = True,
) -> Scores:
    """``rows`` in one padding-free row with shared prompts.

    ``integers``: :func:`vt_trl.forward.batches.on_cpu` of the batch, with the mask of the tokens that get a label.
    """
    device = batch["completion_ids"].device
    merge = policy.base.config.vision_config.spatial_merge_size
    row = lay_out(integers, rows, policy.image_token_id, merge, policy.base.get_rope_index)
    labelled = (row.labels != IGNORED).nonzero()[:, 0].to(device)
    inputs = {
        "input_ids": row.ids[None].to(device),
        "position_ids": row.positions[:, None].to(device),
        "shift_labels": row.labels[None].to(device),
        "layout": row.layout,
    }
    with _pictures(policy, batch, row.images, cache, share_vision) as pictures:
        output = policy.run(inputs | pictures)
    places = row.places.to(device)

    def place(values: torch.Tensor) -> torch.Tensor:
        empty = values.new_zeros(batch["completion_ids"].shape)
        return empty.index_put((places[:, 0], places[:, 1]), values[0, labelled])

    return Scores(*_placed(output, place))


def padded_pass(
    policy: Policy,
    batch: dict[str, Any],
    mask: torch.Tensor,
    rows: Sequence[int],
    cache: FeatureCache | None,
    *,
    share_vision: bool = True,
    aux_loss: bool = False,
) -> Scores:
    """``rows`` one below the other, padded to the longest of the batch, each with its own copy of its prompt."""
    index = torch.tensor(list(rows), device=mask.device)
    part, labelled = take(batch, rows), mask[index]
    ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
    labels = torch.full_like(ids, IGNORED)
    width = labelled.shape[1]
    labels[:, -width:] = part["completion_ids"].masked_fill(labelled == 0, IGNORED)
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.cat([part["prompt_mask"], part["completion_mask"]], dim=1),
        "labels": labels,
    }
    if aux_loss:
        inputs["output_router_logits"] = True
    order = [image for images in part.get("image_index", ()) for image in images]
    if order:
        inputs["mm_token_type_ids"] = (ids == policy.image_token_id).int()
    with _pictures(policy, batch, order, cache, share_vision) as pictures:
        output = policy.run(inputs | pictures)

    def place(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(mask.shape).index_copy(0, index, values[:, -width:])

    return Scores(*_placed(output, place), output.aux_loss)


def _placed(output: Any, place: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A forward's log-probabilities and entropies as (B, C); a head that gives no entropies leaves None."""
    return place(output.log_probs), None if output.entropy is None else place(output.entropy)


@contextmanager
def _pictures(
    policy: Policy, batch: dict[str, Any], order: Sequence[int], cache: FeatureCache | None, once: bool = True
) -> Any:
    """The model's inputs for the pictures of placeholder runs in their ``order``, each through the tower once."""
    if not order:
        yield {}
        return
    pixels, grids = batch["pixel_values"], batch["image_grid_thw"]
    places = {"image_grid_thw": grids[list(order)].to(batch["completion_ids"].device)}
    if not once:
        pixels, grids, order, cache = [pixels[one] for one in order], grids[list(order)], range(len(order)), None
    with pictures_once(policy.base, pixels, grids, order, cache) as seen:
        yield places | {"pixel_values": seen}
