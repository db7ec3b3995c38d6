"""Boxes that a model writes: the frames they are written in, what can be wrong with one, and where it lies.

A box is ``(x1, y1, x2, y2)``. A model writes it in its own frame: pixels of the picture as shown to it, thousandths of
its sides, or shares of them. All frames are linear, so that the way to the original and back is exact up to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vt_trl.errors import ConfigError, DataError, did_you_mean
from vt_trl.images import MAX_ASPECT, Size
from vt_trl.types import Fault

Box = tuple[float, float, float, float]
FRAMES = {"shown_pixels": None, "per_mille": (1000.0, 1000.0), "unit": (1.0, 1.0)}  # name -> its sides
FRAME_WORDS = {  # how a prompt says it
    "shown_pixels": "in pixels of the image as it was shown",
    "per_mille": "in thousandths of the image's width and height, from 0 to 1000",
    "unit": "in shares of the image's width and height, from 0 to 1",
}


@dataclass(frozen=True)
class Sight:
    """How a model sees pictures, as far as an environment has to know.

    ``boxes``: the frame it writes boxes in; ``factor``: pixels per visual token and side; ``min_pixels`` and
    ``max_pixels``: what its image processor enlarges and shrinks to. The defaults are those of Qwen2.5-VL.
    """

    boxes: str = "shown_pixels"
    factor: int = 28
    min_pixels: int = 56 * 56
    max_pixels: int = 12_845_056

    def __post_init__(self) -> None:
        if self.boxes not in FRAMES:
            raise ConfigError(
                f"boxes is {self.boxes!r}.{did_you_mean(str(self.boxes), FRAMES)} Use one of {', '.join(FRAMES)}."
            )

    def sides(self, shown: Size) -> tuple[float, float]:
        """Width and height of a picture of ``shown`` pixels in the frame."""
        return FRAMES[self.boxes] or (float(shown[0]), float(shown[1]))

    def visual_tokens(self, size: Size) -> int:
        """Of a picture whose sides are on the grid."""
        return (size[0] // self.factor) * (size[1] // self.factor)

    def fit(self, width: float, height: float, least: int, most: int) -> Size:
        """The size on the grid nearest to a wanted one that takes ``least`` to ``most`` visual tokens.

        Within the image processor's own limits it is a size that the processor leaves alone, so that what is shown is
        what the model sees. Raises DataError where no such size exists.
        """
        least = max(least, math.ceil(self.min_pixels / self.factor**2))
        most = min(most, self.max_pixels // self.factor**2)
        wide, high = max(1, round(width / self.factor)), max(1, round(height / self.factor))
        if not least <= wide * high <= most:
            shrinks = wide * high > most
            side = math.sqrt((most if shrinks else least) / (width * height))
            turned = math.floor if shrinks else math.ceil
            wide, high = max(1, turned(width * side)), max(1, turned(height * side))
        wide, high = min(wide, MAX_ASPECT * high), min(high, MAX_ASPECT * wide)
        # Thin pictures, whose short side was rounded up. One step cannot jump from one bound over the other, as long
        # as one is at least twice the other.
        while wide * high > most and wide * high > 1:
            wide, high = (wide - 1, high) if wide >= high else (wide, high - 1)
        while wide * high < least:
            longer = wide + 1 <= MAX_ASPECT * high if wide >= high else high + 1 > MAX_ASPECT * wide
            wide, high = (wide + 1, high) if longer else (wide, high + 1)
        if wide * high > most:
            raise DataError(
                f"a picture of {width:.0f} x {height:.0f} pixels cannot be shown with {least} to {most} visual tokens"
            )
        return wide * self.factor, high * self.factor


def read_box(values: Any, sides: tuple[float, float], tolerance: float) -> Box | Fault:
    """A box from what a model wrote between the brackets, in its frame of ``sides``; or what is wrong with it.

    A coordinate may lie outside by ``tolerance`` of its side and is then moved to the edge; nothing else is mended.
    """
    if not isinstance(values, list):
        return Fault.BOX_NO_NUMBERS
    if len(values) > 1 and all(isinstance(value, list) for value in values):
        return Fault.SEVERAL_BOXES
    if len(values) != 4 or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return Fault.BOX_NO_NUMBERS
    try:
        numbers = [float(value) for value in values]
    except OverflowError:  # a whole number of more than 300 digits
        return Fault.BOX_NOT_FINITE
    if not all(map(math.isfinite, numbers)):
        return Fault.BOX_NOT_FINITE
    left, top, right, bottom = numbers
    if right < left or bottom < top:
        return Fault.BOX_REVERSED
    edges = [(value, side) for value, side in zip(numbers, (*sides, *sides), strict=True)]
    if any(value < -tolerance * side or value > (1 + tolerance) * side for value, side in edges):
        return Fault.BOX_OUTSIDE
    left, top, right, bottom = (min(max(value, 0.0), side) for value, side in edges)
    return Fault.BOX_EMPTY if left == right or top == bottom else (left, top, right, bottom)


def from_frame(box: Box, sides: tuple[float, float], region: Box) -> Box:
    """A box in a frame of ``sides`` on a picture that shows ``region`` of the original, in the original's pixels."""
    left, top, right, bottom = region
    across, down = (right - left) / sides[0], (bottom - top) / sides[1]
    return left + box[0] * across, top + box[1] * down, left + box[2] * across, top + box[3] * down


def to_frame(box: Box, sides: tuple[float, float], region: Box) -> Box:
    """The way back: a box in pixels of the original, in the frame of a picture that shows ``region`` of it."""
    left, top, right, bottom = region
    across, down = sides[0] / (right - left), sides[1] / (bottom - top)
    return (box[0] - left) * across, (box[1] - top) * down, (box[2] - left) * across, (box[3] - top) * down


def whole_pixels(box: Box, region: Box) -> tuple[int, int, int, int]:
    """The smallest box of whole pixels around a box, inside ``region`` (whole pixels too)."""
    left, top, right, bottom = (round(value, 6) for value in box)  # 8.000000001 is 8
    return (
        max(int(region[0]), math.floor(left)),
        max(int(region[1]), math.floor(top)),
        min(int(region[2]), math.ceil(right)),
        min(int(region[3]), math.ceil(bottom)),
    )


def area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes, from 0 to 1."""
    common = area((max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])))
    union = area(one) + area(other) - common
    return common / union if union else 0.0


def zoom_of(share: float) -> float:
    """How far a crop is enlarged, by its share of the picture's area: 2 below 1/8, 1 from 1/2, linear in between.

    Source: VLM-R3 (arXiv 2505.16192).
    """
    return min(2.0, max(1.0, 2.0 - (share - 0.125) / 0.375))
