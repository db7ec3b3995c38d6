"""One micro-batch on one rank: what its forward keeps, and the most that is alive in each of its passes."""

from __future__ import annotations

from dataclasses import dataclass

from vt_trl.preflight.activations import (
    Head,
    MicroBatch,
    Training,
    backward_layer,
    backward_vision,
    forward_layer,
    forward_vision,
    fused_head,
    kept,
    shared_mask,
)
from vt_trl.preflight.counts import Counts, Widths
from vt_trl.preflight.precision import Precision
from vt_trl.recipe import RunArguments


@dataclass(frozen=True)
class StepMemory:
    """Bytes on top of weights, gradients, optimizer states and the batch's own tensors.

    ``kept``: alive between forward and backward; ``passes``: the most in a pass without gradient; ``forward`` and
    ``backward``: the most in the two halves of a training step, ``kept`` included.
    """

    kept: int
    language: int
    vision: int
    head: Head
    passes: int
    forward: int
    backward: int


def training_of(run: RunArguments, counts: Counts, checkpointing: bool, attention: str) -> Training:
    """Which tower is trained how, and whether a gradient passes through the vision tower."""
    lora = run.lora != "none"
    vision = not lora and run.train_vision
    return Training(
        language=not lora,
        vision=vision,
        lora_rank=run.lora_r if lora else 0,
        lora_vision=run.lora == "all",
        checkpointing=checkpointing,
        attention=attention.split("|")[0],
        vision_graph=vision or run.lora == "all" or (lora and checkpointing and counts.tower_marked),
        tower_marked=counts.tower_marked,
    )


def training_step(
    w: Widths,
    counts: Counts,
    whole: MicroBatch,
    p: Precision,
    t: Training,
    triton: bool = True,
    part: MicroBatch | None = None,
) -> StepMemory:
    """The memory of one micro-batch, with gradients of an earlier one in place. ``part``: its largest forward, where
    ``max_packed_tokens`` divides it into several, all of which are kept until the backward."""
    language, vision = kept(w, whole, p, t)
    head = fused_head(w, whole, p, counts.head_trained, triton)
    batch = part or whole
    own_language, _ = kept(w, batch, p, t)
    own_head = fused_head(w, batch, p, counts.head_trained, triton)
    others = language - own_language, head.kept - own_head.kept
    pixels = batch.patches * w.patch * 4 if batch.joined else 0
    # Autocast converts every trained weight once per forward, and keeps the copies to its end (without checkpointing:
    # to the end of the backward).
    copies = p.compute * counts.trained_matrices if p.casts or p.adapter_casts and p.trained != p.adapter_input else 0
    stream = batch.tokens * w.hidden * p.residual
    features = batch.patches // w.merge**2 * w.hidden * p.compute
    mask = shared_mask(batch, t)
    in_vision = forward_vision(w, batch, p)
    in_layer = 2 * stream + mask + forward_layer(w, batch, p, t)
    passes = max(in_vision, in_layer, 2 * stream + own_head.forward) + copies + pixels
    alive = language + vision + copies + others[1]
    working = forward_layer(w, batch, p, t) if t.checkpointing else 0
    forward = max(vision + in_vision + copies + others[0], alive + max(working, own_head.forward))
    if p.compute != 4 or not t.vision:
        forward += pixels  # otherwise they are kept, and counted there
    held = copies if not t.checkpointing else 0
    embedding = w.vocabulary * w.hidden * p.gradient if t.language else 0
    backward = max(
        language + vision + held + head.kept + own_head.backward,
        language + vision + held + others[1] + backward_layer(w, batch, p, t, counts) + stream,
        sum(others) + vision + held + stream + features + max(embedding, backward_vision(w, batch, p, t, counts)),
    )
    total = language + vision + head.kept + held
    return StepMemory(total, language, vision, head, passes, max(forward, total), max(backward, total))
