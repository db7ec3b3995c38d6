"""What vLLM must be told alike, in this process or behind HTTP, so that it samples what training scores."""

from __future__ import annotations

import hashlib
from typing import Any

from PIL import Image

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
