"""How many weights a model has, which of them are trained, and the widths its activations depend on.

Nothing is estimated here: the model is built on PyTorch's ``meta`` device, where tensors have shapes and no storage,
with the same classes, adapter settings and freezing as a run, and its parameters are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig

from vt_trl.families import family_of
from vt_trl.recipe import RunArguments


@dataclass(frozen=True)
class Counts:
    """Numbers of weights. ``language``, ``vision`` and ``embedding`` are the model's own, without an adapter.

    ``embedding`` holds the token embedding and, where it is a tensor of its own, the output head. ``trained_matrices``
    are the trained weights that autocast would copy to 16 bits: linear and convolution weights, not the embedding and
    not the head, which TRL's fused head converts piece by piece. ``largest`` is the largest single tensor and
    ``largest_linear`` the largest trained weight of a linear layer inside the towers.
    """

    language: int
    vision: int
    embedding: int
    adapter: int
    language_matrices: int  # of the language model's linear layers, which QLoRA holds in 4 bits
    trained: int
    trained_vision: int
    trained_matrices: int
    largest: int
    largest_linear: int
    layer: int  # of one layer of the language model, with its adapter
    vision_layer: int
    head_trained: bool
    # transformers' enable_input_require_grads, which TRL calls for adapters with checkpointing, marks the output of
    # the patch embedding too, where the tower names one: then a gradient runs through a tower that nobody trains.
    tower_marked: bool

    @property
    def base(self) -> int:
        """Weights of the model without an adapter."""
        return self.language + self.vision + self.embedding

    @property
    def total(self) -> int:
        return self.base + self.adapter


@dataclass(frozen=True)
class Widths:
    """Sizes of the two towers, by the names papers use; ``vision_gated`` tells a gated MLP from a plain one."""

    hidden: int
    intermediate: int
    layers: int
    queries: int  # attention heads x head width
    keys: int  # key-value heads x head width
    heads: int
    head: int  # width of one attention head
    query_norm: bool  # queries and keys are normalised per head (Qwen3)
    vocabulary: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    vision_gated: bool  # Qwen2.5-VL: gate, up, down and RMSNorm; Qwen3-VL: two matrices and LayerNorm
    full_attention: int  # vision layers that attend to the whole picture, the others to windows
    window: int  # patches per attention window of the others
    mergers: int  # one, and one per deepstack level
    patch: int  # values per patch: channels x frames x side x side
    side: int  # pixels per patch and side
    merge: int  # patches per side that become one visual token

    @property
    def factor(self) -> int:
        """Pixels per visual token and side: 28 for Qwen2.5-VL, 32 for Qwen3-VL."""
        return self.side * self.merge

    @property
    def keys_and_values(self) -> int:
        """Numbers the attention of one token leaves in a key-value cache, over all layers."""
        return 2 * self.layers * self.keys


def count(config: PretrainedConfig, run: RunArguments) -> Counts:
    """Count the weights of ``config`` as ``run`` would train it. Raises ConfigError for a family nobody has taught us.

    Takes about a tenth of a second without and a second with an adapter on all layers of a 7B model.
    """
    return _count(_Key(config), run.lora, run.lora_r, run.train_vision)


def widths(config: PretrainedConfig) -> Widths:
    """The sizes that activations depend on, read from a configuration of a supported family."""
    text, vision = config.get_text_config(), config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    full = getattr(vision, "fullatt_block_indexes", None)
    merge = vision.spatial_merge_size
    window = (getattr(vision, "window_size", 0) // vision.patch_size) ** 2
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
    return Widths(
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=text.num_hidden_layers,
        queries=head * text.num_attention_heads,
        keys=head * text.num_key_value_heads,
        heads=text.num_attention_heads,
        head=head,
        query_norm=text.model_type.startswith("qwen3"),
        vocabulary=text.vocab_size,
        vision_hidden=vision.hidden_size,
        vision_intermediate=vision.intermediate_size,
        vision_layers=vision.depth,
        vision_heads=vision.num_heads,
        vision_gated=full is not None,
        full_attention=vision.depth if full is None else len(full),
        window=window,
        mergers=1 + len(getattr(vision, "deepstack_visual_indexes", None) or ()),
        patch=channels * vision.temporal_patch_size * vision.patch_size**2,
        side=vision.patch_size,
        merge=merge,
    )


class _Key:
    """A configuration object as a cache key, by identity: comparing two by content takes longer than counting."""

    def __init__(self, config: PretrainedConfig):
        self.config = config

    def __hash__(self) -> int:
        return id(self.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.config is other.config


@lru_cache(maxsize=32)  # advice tries many settings of one model
def _count(key: _Key, lora: str, rank: int, train_vision: bool) -> Counts:
    from peft import get_peft_model

    from vt_trl.run import freeze_vision, lora_config  # run.py calls the preflight

    family = family_of(key.config)
    run = RunArguments(model="-", dataset="-", lora=lora, lora_r=rank, train_vision=train_vision)
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(key.config)
        adapter = lora_config(run, family)
        if adapter is not None:
            model = get_peft_model(model, adapter)
        elif not train_vision:
            freeze_vision(model, family)
    return _tally(model, family.vision_module)


def _tally(model: Any, vision_module: str) -> Counts:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tower = base.get_submodule(vision_module)
    ends = [base.get_input_embeddings().weight, base.get_output_embeddings().weight]
    of_tower = {id(weight) for weight in tower.parameters()}
    of_ends = {id(weight) for weight in ends}
    numbers = dict.fromkeys(("language", "vision", "embedding", "adapter"), 0)
    language_matrices = 0
    for name, weight in model.named_parameters():
        in_base = "vision" if id(weight) in of_tower else "embedding" if id(weight) in of_ends else "language"
        kind = "adapter" if "lora_" in name else in_base
        numbers[kind] += weight.numel()
        language_matrices += weight.numel() if kind == "language" and weight.ndim == 2 else 0
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [weight for weight in trained if weight.ndim > 1 and id(weight) not in of_ends]
    linear = [weight.numel() for weight in matrices if weight.ndim == 2]
    return Counts(
        **numbers,
        language_matrices=language_matrices,
        trained=sum(weight.numel() for weight in trained),
        trained_vision=sum(weight.numel() for weight in trained if id(weight) in of_tower),
        trained_matrices=sum(weight.numel() for weight in matrices),
        largest=max(weight.numel() for weight in base.parameters()),
        largest_linear=max(linear, default=0),
        layer=_size(base.get_decoder().layers[0]),
        vision_layer=_size(tower.blocks[0]),
        head_trained=ends[1].requires_grad,
        tower_marked=_input_embeddings(tower),
    )


def _input_embeddings(tower: Any) -> bool:
    try:
        return tower.get_input_embeddings() is not None
    except NotImplementedError:
        return False


def _size(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
