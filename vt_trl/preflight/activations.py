"""Bytes of activations: what a forward keeps for its backward, and what a layer needs while it is computed.

Counted from the code of transformers' Qwen2.5-VL and Qwen3-VL, operation by operation, as Korthikanti et al. 2022
("Reducing Activation Recomputation in Large Transformer Models", arXiv 2205.05198, section 4) count GPT's: every
tensor that a backward needs, once per storage. What differs from their formula: SDPA and flash attention keep queries,
keys, values, the output and one fp32 number per head and token instead of the scores; RMSNorm works in fp32; the MLP
is gated; dropout is off. ``benchmarks/preflight_check.py`` compares the result with measured allocations.

Per token of a decoder layer, with h hidden, f intermediate, q query and k key width, e bytes per number:

    two RMSNorms     2 * (4 h fp32 input + e h normalised + 4)
    attention        e h input + e (2 q + 2 k) queries, output, keys, values + 4 per head
    gated MLP        e h input + 4 e f gate, its activation, up, their product

and per patch of a vision layer of Qwen2.5-VL, with v hidden, m intermediate (Qwen3-VL: LayerNorm, plain MLP):

    two RMSNorms     2 * (4 v + e v + 4)
    attention        e v input + 3 e v joint projection + 2 e v rotated + e v output + e v joined windows + 4 per head
    gated MLP        e v input + 4 e m

With gradient checkpointing a layer keeps its input alone, and one layer at a time is computed again.

A packed row (:mod:`vt_trl.forward`) has no padding and no mask over all of it. On a GPU in half precision its keys and
values are gathered once per branch, prompt included, and kept instead of those of the row. Elsewhere attention runs
branch by branch: with joined keys and values for every query head, and a mask for each branch.
"""

from __future__ import annotations

from dataclasses import dataclass

from vt_trl.preflight.counts import Counts, Widths
from vt_trl.preflight.precision import Precision

# A tile of TRL's fused head (trl/kernels/chunked_logprob.py, trl/trainer/utils.py).
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768


@dataclass(frozen=True)
class Packing:
    """The segments of a packed row (:mod:`vt_trl.forward.layout`): (queries, keys) of each, a prompt's keys included.

    ``gathered``: one call of the kernel for variable lengths; otherwise one call of SDPA per segment.
    """

    segments: tuple[tuple[int, int], ...]
    gathered: bool

    @property
    def keys(self) -> int:
        return sum(keys for _, keys in self.segments)

    @property
    def branches(self) -> list[tuple[int, int]]:
        return [(queries, keys) for queries, keys in self.segments if keys > queries]

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key that attention computes: of a prompt what causality leaves, and of a branch that
        as well, or all where a mask hides the rest."""
        own = sum(queries * (keys - queries) + queries**2 / 2 for queries, keys in self.segments)
        return own if self.gathered else own + sum(queries**2 / 2 for queries, _ in self.branches)


@dataclass(frozen=True)
class MicroBatch:
    """One forward: ``samples`` rows padded to ``length`` tokens, of which ``labelled`` go through the head.

    ``padded``: at least one row is shorter than the batch, so that SDPA gets a mask. ``packing``: how its only row
    divides, if it is packed. ``joined``: the pixels of its pictures are joined into a tensor for this forward.
    """

    samples: int
    length: int
    labelled: int
    patches: int
    images: float
    padded: bool = True
    packing: Packing | None = None
    joined: bool = False

    @property
    def tokens(self) -> int:
        return self.samples * self.length


@dataclass(frozen=True)
class Training:
    """Who is trained, and how activations are kept."""

    language: bool  # weights of the language model itself
    vision: bool  # weights of the vision tower itself
    lora_rank: int = 0
    lora_vision: bool = False
    checkpointing: bool = False
    attention: str = "sdpa"
    vision_graph: bool = True  # a gradient passes through the vision tower
    tower_marked: bool = False  # see Counts


def decoder_layer(w: Widths, batch: MicroBatch, p: Precision, t: Training) -> int:
    """Bytes one decoder layer keeps for its backward without checkpointing."""
    e, h, q, k = p.compute, w.hidden, w.queries, w.keys
    norm_trained = t.language and not t.lora_rank
    norms = 2 * (4 * h + 4 + (p.residual * h if norm_trained else 0))
    if w.query_norm:
        norms += (4 + (e if norm_trained else 0)) * (q + k) + 4 * (q + k) // w.head
    inputs = _linear_inputs(t.language, t.lora_rank, p, ((h, 3), (h, 2)), e)
    inputs += _adapter_outputs(t.lora_rank, p, 7)
    output = q  # of the attention, kept by SDPA itself; an adapter that casts keeps a copy
    kept = e * (q + output) + 4 * w.heads
    if t.lora_rank and p.adapter_casts:
        kept += p.adapter_input * q
    elif batch.packing and not batch.packing.gathered and (t.language or t.lora_rank):
        kept += e * q  # outputs of the segments are joined to the next layer's input
    per_token = norms + inputs + kept + _gated_mlp(w, p, t) + _eager_scores(w, batch, p, t)
    return batch.tokens * per_token + _keys_and_values(w, batch, p, t) + _layer_mask(batch, p, t)


def _gated_mlp(w: Widths, p: Precision, t: Training) -> int:
    """Bytes per token that the wide part of a decoder layer's MLP keeps."""
    products = p.adapter_input if t.lora_rank else p.compute if t.language else 0
    return (3 * p.compute + products) * w.intermediate


def _keys_and_values(w: Widths, batch: MicroBatch, p: Precision, t: Training) -> int:
    """Bytes of keys and values as attention keeps them."""
    packing = batch.packing
    if packing is None:
        return batch.tokens * 2 * p.compute * _keys(w, batch, t)
    if packing.gathered:
        return packing.keys * 2 * p.compute * w.keys
    # The prompts' are views of those of the whole row, repeated for every query head; the branches' are copies.
    return (batch.tokens + sum(keys for _, keys in packing.branches)) * 2 * p.compute * w.queries


def vision_layer(w: Widths, batch: MicroBatch, p: Precision, t: Training) -> int:
    """Bytes one layer of the vision tower keeps for its backward without checkpointing."""
    e, v, f = p.compute, w.vision_hidden, w.vision_intermediate
    rank = t.lora_rank if t.lora_vision else 0
    weights = t.vision and not rank
    if w.vision_gated:
        norms = 2 * (4 * v + 4 + (e * v if weights else 0))
        inputs = _linear_inputs(weights, rank, p, ((v, 1), (v, 2)), e)
        mlp = 3 * e * f + (e * f if weights else 0)
        modules = 5
    else:
        norms = 2 * (e * v + 8)
        inputs = _linear_inputs(weights, rank, p, ((v, 1), (v, 1)), e)
        mlp = e * f + (e * f if weights else 0)
        modules = 4
    # The joint projection stays whole, because the values are a view of it; windows are joined by a copy.
    attention = (3 + 2 + 1) * e * v + (e * v if weights else 0) + 4 * w.vision_heads
    if rank:
        mlp += p.adapter_input * f
        attention += p.adapter_input * v
        inputs += _adapter_outputs(rank, p, modules)
    return batch.patches * (norms + inputs + attention + mlp)


def vision_ends(w: Widths, batch: MicroBatch, p: Precision, t: Training) -> int:
    """Bytes that patch embedding and mergers keep for their backward."""
    e, v = p.compute, w.vision_hidden
    rank = t.lora_rank if t.lora_vision else 0
    weights = t.vision and not rank
    norm = 4 * v + (e * v if weights else 0) if w.vision_gated else e * v
    merger = norm + e * v + (2 * e * v if weights or rank else 0)  # GELU's input; inputs of both matrices
    # In fp32 the convolution keeps the batch's own pixels; otherwise a converted copy.
    pixels = w.patch * e if weights and (e != 4 or batch.joined) else 0
    return batch.patches * (pixels + w.mergers * merger)


def kept(w: Widths, batch: MicroBatch, p: Precision, t: Training) -> tuple[int, int]:
    """Bytes of (language model, vision tower) that the whole forward keeps for its backward, without the head."""
    last_norm = batch.tokens * (4 * w.hidden + (p.residual * w.hidden if t.language and not t.lora_rank else 0))
    rotary = 2 * batch.tokens * w.head * p.residual
    if t.checkpointing:
        language = w.layers * batch.tokens * w.hidden * p.residual
    else:
        language = w.layers * decoder_layer(w, batch, p, t)
    leaves = t.checkpointing and t.lora_rank > 0  # embeddings that enable_input_require_grads makes part of the graph
    language += last_norm + rotary + shared_mask(batch, t) + (batch.tokens * w.hidden * p.residual if leaves else 0)
    if not t.vision_graph:
        return language, 0
    patches = batch.patches * w.vision_hidden * p.compute
    vision = w.vision_layers * (patches if t.checkpointing else vision_layer(w, batch, p, t))
    vision += 2 * batch.patches * (w.vision_hidden // w.vision_heads) * 4  # rotary sine and cosine
    if leaves and t.tower_marked:
        vision += patches
    return language, vision + vision_ends(w, batch, p, t)


def shared_mask(batch: MicroBatch, t: Training) -> int:
    """The attention mask all layers share: one byte per pair of positions, with SDPA or eager and any padding. Of a
    packed row: one per shape of branch; or where the gathered keys come from."""
    if batch.packing:
        return 8 * batch.packing.keys if batch.packing.gathered else sum(q * k for q, k in set(batch.packing.branches))
    return batch.samples * batch.length**2 if batch.padded and t.attention in ("sdpa", "eager") else 0


def _layer_mask(batch: MicroBatch, p: Precision, t: Training) -> int:
    """SDPA turns the mask into one of the queries' type, in every layer anew."""
    if batch.packing:
        return 0 if batch.packing.gathered else p.compute * sum(q * k for q, k in batch.packing.branches)
    return p.compute * batch.samples * batch.length**2 if batch.padded and t.attention == "sdpa" else 0


def _keys(w: Widths, batch: MicroBatch, t: Training) -> int:
    """Width in which keys are kept: with a mask, SDPA wants them repeated for every query head."""
    repeated = (batch.padded and t.attention == "sdpa") or t.attention == "eager"
    return w.queries if repeated else w.keys


def _eager_scores(w: Widths, batch: MicroBatch, p: Precision, t: Training) -> int:
    """Per token: eager attention keeps its probabilities, in fp32 and in the type of the values."""
    if t.attention != "eager":
        return 0
    return w.heads * batch.length * (4 if p.compute == 4 else 4 + p.compute)


def _linear_inputs(weights: bool, rank: int, p: Precision, groups: tuple[tuple[int, int], ...], e: int) -> int:
    """Bytes per token kept as inputs of linear layers; ``groups`` are (width, layers that read the same tensor).

    The layers of a group share their input, unless a conversion on the way gives each a copy: autocast's, from fp32
    norms, or peft's, from a 16-bit input to fp32 adapters.
    """
    if rank:
        copies = p.adapter_casts
        return sum(width * p.adapter_input * (layers if copies else 1) for width, layers in groups)
    if not weights:
        return 0
    return sum(width * e * (layers if p.casts else 1) for width, layers in groups)


def _adapter_outputs(rank: int, p: Precision, modules: int) -> int:
    return modules * rank * p.adapter_input


def forward_layer(w: Widths, batch: MicroBatch, p: Precision, t: Training) -> int:
    """Most bytes alive at once while one decoder layer is computed and nothing is kept: residual, its copy in the
    caller, the MLP's input and its three wide tensors."""
    e = p.compute
    mlp = 2 * w.hidden * p.residual + w.hidden * (p.residual + (e if p.casts else 0)) + 3 * w.intermediate * e
    rope = 2 * w.hidden * p.residual + e * (w.queries + 2 * w.keys) + 3 * p.residual * w.queries
    if t.lora_rank:
        mlp += w.intermediate * e  # the adapter's share, before it is added
    attention = batch.tokens * 2 * w.hidden * p.residual + _forward_attention(w, batch, p, t)
    return max(batch.tokens * mlp, batch.tokens * rope, attention)


def _forward_attention(w: Widths, batch: MicroBatch, p: Precision, t: Training) -> int:
    """Most bytes alive in attention while nothing is kept, the residual aside."""
    e, packing = p.compute, batch.packing
    if packing is None:
        own = e * (2 * w.queries + 2 * _keys(w, batch, t)) + _eager_scores(w, batch, p, t)
        return batch.tokens * own + _layer_mask(batch, p, t)
    own = batch.tokens * e * (2 * w.queries + 2 * w.keys)
    if packing.gathered:
        return own + _keys_and_values(w, batch, p, t)
    repeated = 2 * w.queries if w.keys < w.queries else 0
    joined = 2 * w.queries  # the segments' outputs in one tensor, and that in the order of the next layer
    largest = max((keys for _, keys in packing.branches), default=0)
    return own + e * (batch.tokens * (repeated + joined) + largest * 2 * w.queries)


def forward_vision(w: Widths, batch: MicroBatch, p: Precision) -> int:
    """The same for a layer of the vision tower; rotating queries and keys in fp32 needs most."""
    e, v, f = p.compute, w.vision_hidden, w.vision_intermediate
    rope = 2 * v * e + 3 * v * e + 4 * v * 5
    mlp = 3 * v * e + (3 if w.vision_gated else 2) * f * e
    return batch.patches * max(rope, mlp)


def backward_layer(w: Widths, batch: MicroBatch, p: Precision, t: Training, counts: Counts) -> int:
    """Bytes alive on top of what is kept while one decoder layer runs backward: gradients of the residual stream and
    of the MLP's wide tensors, one weight's gradient, and with checkpointing all that the layer keeps."""
    stream = batch.tokens * 2 * w.hidden * p.residual
    in_mlp = batch.tokens * 2 * w.intermediate * p.compute
    in_attention = _backward_attention(w, batch, p) - batch.tokens * _gated_mlp(w, p, t)  # by then the MLP is done
    again = decoder_layer(w, batch, p, t) if t.checkpointing else 0
    return again + stream + max(in_mlp, in_attention) + counts.largest_linear * p.gradient


def _backward_attention(w: Widths, batch: MicroBatch, p: Precision) -> int:
    """Gradients alive while attention over a packed row runs backward; those of a padded batch are fewer than the
    MLP's."""
    if batch.packing is None:
        return 0
    if batch.packing.gathered:
        return p.compute * (batch.tokens * (2 * w.queries + 2 * w.keys) + batch.packing.keys * 2 * w.keys)
    # Of output, queries, repeated keys and values, and one more of each that a segment's share is added from.
    largest = max((keys for _, keys in batch.packing.branches), default=0)
    return p.compute * w.queries * (6 * batch.tokens + 2 * largest)


def backward_vision(w: Widths, batch: MicroBatch, p: Precision, t: Training, counts: Counts) -> int:
    """The same for a layer of the vision tower."""
    if not t.vision_graph:
        return 0
    gradients = batch.patches * p.compute * (2 * w.vision_hidden + 2 * w.vision_intermediate)
    again = vision_layer(w, batch, p, t) if t.checkpointing else 0
    return again + gradients + (counts.largest_linear * p.gradient if t.vision else 0)


@dataclass(frozen=True)
class Head:
    """Bytes of TRL's fused head: ``kept`` for the backward, and most alive during forward and backward."""

    kept: int
    forward: int
    backward: int


def fused_head(w: Widths, batch: MicroBatch, p: Precision, trained: bool, triton: bool = True) -> Head:
    """TRL's fused head: logits exist for one tile of 4096 tokens x 32,768 words at a time, in forward and backward.

    Kept are the hidden states of the labelled positions. The backward adds up the gradients of hidden states and, when
    the head is trained, of its weight in fp32. Without Triton, on a CPU, a tile has fp32 copies as well.
    """
    rows, columns = min(batch.labelled, TILE_TOKENS), min(w.vocabulary, TILE_VOCABULARY)
    tile = rows * TILE_VOCABULARY * p.compute
    folding = 0 if triton else 4 * rows * columns * 4
    hidden = batch.labelled * w.hidden
    kept = hidden * p.residual
    gradients = 4 * hidden + (4 * w.vocabulary * w.hidden if trained else 0)
    piece = columns * w.hidden * (p.compute if p.trained != p.compute else 0)
    return Head(kept, kept + tile + folding + piece, gradients + tile + folding + piece)
