"""Pictures to patch tensors: each unique picture is preprocessed once, and looked up from then on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image


class ImageFeatures:
    """Patch tensors of pictures, computed once per picture object.

    The members of a group share the picture objects of their row, so identity is the key; the object is held so that
    its identity cannot be reused. Call :meth:`clear` between generation batches.
    """

    def __init__(self, image_processor: Any):
        self.image_processor = image_processor
        self._known: dict[int, tuple[Image.Image, torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def patches(self, image: Image.Image) -> torch.Tensor:
        """(patches, channels * temporal * patch * patch) float tensor, normalised as the model expects."""
        return self._get(image)[0]

    def grid(self, image: Image.Image) -> torch.Tensor:
        """(3,) int64: temporal, height and width in patches."""
        return self._get(image)[1]

    def visual_tokens(self, image: Image.Image) -> int:
        """How many placeholder tokens the picture takes: patches after the merger of the vision tower."""
        return int(self.grid(image).prod()) // self.image_processor.merge_size**2

    def preprocess(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`patches` and :meth:`grid`, computed anew."""
        inputs = self.image_processor(images=[image], return_tensors="pt")
        return inputs["pixel_values"], inputs["image_grid_thw"][0]

    def batch(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """``pixel_values`` (sum of patches, dim) and ``image_grid_thw`` (images, 3) in the order given."""
        return {
            "pixel_values": torch.cat([self.patches(image) for image in images]),
            "image_grid_thw": torch.stack([self.grid(image) for image in images]),
        }

    def forget(self, images: Sequence[Image.Image]) -> None:
        """Let go of these pictures; those that are not known are no error."""
        for image in images:
            self._known.pop(id(image), None)

    def clear(self) -> None:
        self._known.clear()

    def _get(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        entry = self._known.get(id(image))
        if entry is None:
            entry = (image, *self.preprocess(image))
            self._known[id(image)] = entry
        return entry[1], entry[2]


class ImageSizes(ImageFeatures):
    """For an engine that preprocesses pictures itself: only how many placeholders they take, from their sizes.

    Nothing is resized, normalised or held, which for thousands of pictures at a time is the larger part of the memory.
    """

    def visual_tokens(self, image: Image.Image) -> int:
        patches = self.image_processor.get_number_of_image_patches(image.height, image.width)
        return patches // self.image_processor.merge_size**2
