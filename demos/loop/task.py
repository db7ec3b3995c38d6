"""The adding task: up to four digits in a picture, and their sum modulo 5.

A picture of 56 x 56 pixels holds two to four digits in reading order, each in a square of 28 x 28, one visual
token of a Qwen2.5-VL. A tiny network hardly finds the answer at once; with the running sums written down
(``3+4=2+1=3``) each step is one of 25 sums of two digits. The contrast differs from picture to picture, and the faint
ones are hard to read, so that reading can fail as well as reasoning.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

QUESTION = "The sum modulo 5?"
MODULUS = 5  # the digits are those below it
SIDE = 28  # pixels of a digit's square: one visual token


@dataclass(frozen=True)
class Look:
    """How pictures are drawn; lengths in pixels, brightness in grey levels of 0 to 255."""

    font: tuple[int, ...] = (23, 25)  # font sizes
    shift: int = 1  # largest move of a digit off the centre of its square, along each axis
    paper: tuple[int, int] = (150, 190)  # mean grey of the background
    ink: tuple[int, int] = (11, 70)  # how much darker the digits of one picture are
    noise: float = 14.0  # standard deviation of the grain


@lru_cache(maxsize=1024)
def _glyph(digit: str, size: int, right: int, down: int) -> np.ndarray:
    """A digit in its square, (28, 28) from 0.0 (paper) to 1.0 (ink), moved off the centre."""
    canvas = PILImage.new("L", (SIDE, SIDE), 0)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=size)
    pen.text((SIDE / 2 + right, SIDE / 2 + down), digit, fill=255, font=font, anchor="mm", stroke_width=1)
    return np.asarray(canvas, dtype=np.float64) / 255.0


def draw(digits: str, rng: np.random.Generator, look: Look | None = None) -> PILImage.Image:
    """An RGB picture (56 x 56) of one to four ``digits``, with one contrast for all of them."""
    look = look or Look()
    moves = rng.integers(-look.shift, look.shift + 1, size=(len(digits), 2))
    sizes = rng.choice(look.font, size=len(digits))
    mask = np.zeros((2 * SIDE, 2 * SIDE))
    for place, (digit, size, move) in enumerate(zip(digits, sizes, moves, strict=True)):
        top, left = SIDE * (place // 2), SIDE * (place % 2)
        mask[top : top + SIDE, left : left + SIDE] = _glyph(digit, int(size), *map(int, move))
    grey = rng.uniform(*look.paper) - rng.uniform(*look.ink) * mask + rng.normal(0.0, look.noise, mask.shape)
    return PILImage.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8)).convert("RGB")


def running_sums(digits: str) -> str:
    """The steps: ``"341"`` gives ``"3+4=2+1=3"``, every sum modulo 5."""
    total, text = int(digits[0]), digits[0]
    for digit in digits[1:]:
        total = (total + int(digit)) % MODULUS
        text += f"+{digit}={total}"
    return text


def make_rows(
    count: int, lengths: tuple[int, ...], seed: int = 0, look: Look | None = None, same: bool = False
) -> list[dict[str, Any]]:
    """``count`` rows, the same for the same arguments; as many of each length, in shuffled order.

    With ``same`` all digits of a picture are the same one. Keys: ``id``, ``image`` (PIL RGB), ``question``, ``answer``
    (one digit), ``data_source`` (``"4 digits"``) and ``digits``, which no stage of the loop reads.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for index, place in enumerate(rng.permutation(count)):
        length = lengths[place % len(lengths)]
        digits = "".join(map(str, rng.integers(0, MODULUS, size=length)))
        digits = digits[0] * length if same else digits
        rows.append(
            {
                "id": f"adding-{seed}-{index}",
                "image": draw(digits, rng, look),
                "question": QUESTION,
                "answer": str(sum(map(int, digits)) % MODULUS),
                "data_source": f"{length} digits",
                "digits": digits,
            }
        )
    return rows


def make_dataset(count: int, lengths: tuple[int, ...], seed: int = 0, look: Look | None = None) -> Dataset:
    """:func:`make_rows` as stored rows, without ``digits``; pictures as lossless PNG."""
    text = {name: Value("string") for name in ("id", "question", "answer", "data_source")}
    rows = [{name: row[name] for name in ("image", *text)} for row in make_rows(count, lengths, seed, look)]
    return Dataset.from_list(rows, features=Features({"image": Image(), **text}))
