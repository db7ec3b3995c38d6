"""What vLLM must be told alike, in this process or behind HTTP, so that it samples what training scores."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from PIL import Image
from trl.generation.vllm_generation import VLLMGeneration

from vt_trl.quantized import is_quantized, whole_weights

BAN = -100.0  # what is added to the logit of a banned token: e^-100 of its probability is left


def content_id(image: Image.Image) -> str:
    """Size, mode and a hash of the pixels. vLLM trusts it: of two pictures with one id it only shows the first."""
    digest = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
    return f"{image.width}x{image.height}-{image.mode}-{digest}"


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
