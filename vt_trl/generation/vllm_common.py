"""What vLLM must be told alike, in this process or behind HTTP, so that it samples what training scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from PIL import Image
from trl.generation.vllm_generation import VLLMGeneration

from vt_trl.generation.base import Request, SamplingSettings
from vt_trl.images import content_id
from vt_trl.quantized import is_quantized, whole_weights

BAN = -100.0  # what is added to the logit of a banned token: e^-100 of its probability is left


class ImageIds:
    """``content_id``, once per image object; holding the object keeps its ``id()`` from being given to another."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Image.Image, str]] = {}

    def __call__(self, image: Image.Image) -> str:
        if id(image) not in self._known:
            self._known[id(image)] = (image, content_id(image))
        return self._known[id(image)][1]

    def clear(self) -> None:
        self._known.clear()


def sampling_fields(
    settings: SamplingSettings, request: Request, stop_ids: Sequence[int], banned_ids: Sequence[int]
) -> dict[str, Any]:
    """vLLM's ``SamplingParams`` of a turn by name, but for the kind of its output."""
    return {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": settings.min_p or 0.0,
        "repetition_penalty": settings.repetition_penalty,
        "max_tokens": request.max_new_tokens,
        "seed": request.seed,
        "logprobs": 0,  # the sampled token's only
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,  # or the checkpoint's generation_config.json would stop turns as well
        "logit_bias": dict.fromkeys(banned_ids, BAN) or None,
        "stop": list(request.stop) or None,
        "include_stop_str_in_output": bool(request.stop),
        "detokenize": bool(request.stop),  # only to find stop texts: the tokens are what we take
        "skip_special_tokens": False,
    }


def pixel_limits(processing_class: Any) -> dict[str, Any] | None:
    """The image processor's size limits, for vLLM's own copy of it, which it loads from the checkpoint.

    In pixels; None for processors that bound sizes otherwise, where the checkpoint's settings then stand.
    """
    size = getattr(getattr(processing_class, "image_processor", None), "size", None) or {}
    limits = {edge: size.get(edge) for edge in ("shortest_edge", "longest_edge")}
    return {"size": limits} if all(limits.values()) else None


class EngineWeights(VLLMGeneration):
    """TRL's gathering of weights, and what it lacks: a base in 4 bits under an adapter."""

    def _weight_dtype(self) -> torch.dtype:
        """What training computes in: accelerate's mixed precision, else the model's own type."""
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        return mixed or next(weight.dtype for weight in self.model.parameters() if weight.is_floating_point())

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        if is_peft_model(self.model) and is_quantized(self.model):
            return whole_weights(self.model, self._weight_dtype())
        return super()._iter_named_params()
