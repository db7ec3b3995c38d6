"""The reading task: one letter per picture, half of the pictures illegible once they are halved.

It is the smallest world in which "look again only if you must" has a right answer. An *easy* picture shows a solid
letter. A *hard* one shows the letter as a fine halftone print, the way a newspaper does: the dots average to the grey
of the paper. Halving such a picture with LANCZOS removes it, and here removes it exactly. The halving is a linear map
``x -> A x A^T`` and the print is projected onto what this map sends to zero, so nothing of the letter is left at low
resolution for a model to find, however long it trains: only rounding and noise, and noise does not know the letter.

Two settings move the price of not looking: ``legibility`` adds a solid letter back to hard pictures (0: half
resolution tells nothing, 1: hard reads like easy), and a shorter ``alphabet`` makes a blind guess luckier.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

ALPHABET = "AEHKSTXZ"
QUESTION = "Which letter?"


@dataclass(frozen=True)
class Look:
    """How pictures are drawn. Lengths in pixels of the full image, brightness in grey levels of 0 to 255."""

    side: int = 56  # full image; a multiple of twice the model's factor, so that the half needs no rounding either
    letter: tuple[int, int] = (42, 50)  # font size, smallest and largest
    stroke: int = 2  # added to both sides of the font's strokes; thick letters are learned sooner
    shift: int = 3  # largest move of the letter off the centre, along each axis
    paper: tuple[int, int] = (118, 138)  # mean grey of the background
    ink: tuple[int, int] = (50, 70)  # how much darker a solid letter is
    dots: tuple[int, int] = (45, 60)  # amplitude of the halftone print of a hard letter
    noise: float = 12.0  # standard deviation of the grain on every picture


def halve(image: PILImage.Image) -> PILImage.Image:
    """The picture with half of each side: a quarter of the pixels, and of the visual tokens."""
    return image.resize((image.width // 2, image.height // 2), PILImage.Resampling.LANCZOS)


@lru_cache
def _seen(side: int) -> np.ndarray:
    """What halving along one axis can see, as a projection (side, side): ``pinv(A) @ A`` for the resampling ``A``."""
    rows = PILImage.fromarray(np.eye(side, dtype=np.float32)).resize((side, side // 2), PILImage.Resampling.LANCZOS)
    halving = np.asarray(rows, dtype=np.float64)  # (side / 2, side): column i is the answer to a lone pixel i
    return np.linalg.pinv(halving) @ halving


def unseen(pattern: np.ndarray) -> np.ndarray:
    """The part of ``pattern`` (side, side) that halving maps to zero everywhere, borders of the letter included."""
    seen = _seen(len(pattern))
    return pattern - seen @ pattern @ seen.T


def _letter_mask(letter: str, look: Look, rng: np.random.Generator) -> np.ndarray:
    """A letter near the middle, (side, side) from 0.0 (paper) to 1.0 (ink)."""
    canvas = PILImage.new("L", (look.side, look.side), 0)
    font = ImageFont.load_default(size=int(rng.integers(look.letter[0], look.letter[1] + 1)))
    x, y = (look.side / 2 + float(move) for move in rng.integers(-look.shift, look.shift + 1, size=2))
    ImageDraw.Draw(canvas).text((x, y), letter, fill=255, font=font, anchor="mm", stroke_width=look.stroke)
    return np.asarray(canvas, dtype=np.float64) / 255.0


def draw(
    letter: str, hard: bool, rng: np.random.Generator, legibility: float = 0.0, look: Look | None = None
) -> PILImage.Image:
    """One full-resolution RGB picture of ``letter``; ``legibility`` in [0, 1] is used by hard pictures only.

    ``legibility`` is the solid letter's contrast as a share of an easy picture's. A reader sums it over a whole
    letter, so the useful range is low: a small trained network read 13% at 0, 39% at 0.03 and 96% at 0.1.
    """
    look = look or Look()
    mask = _letter_mask(letter, look, rng)
    paper, ink, dots = (rng.uniform(*span) for span in (look.paper, look.ink, look.dots))
    grey = paper - ink * (legibility if hard else 1.0) * mask
    if hard:
        y, x = np.indices(mask.shape)
        grey = grey + dots * unseen(mask * (1 - 2 * ((x + y) % 2)))
    grey = grey + rng.normal(0.0, look.noise, mask.shape)
    return PILImage.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8)).convert("RGB")


def make_rows(
    count: int,
    hard_share: float = 0.5,
    seed: int = 0,
    alphabet: str = ALPHABET,
    legibility: float = 0.0,
    look: Look | None = None,
) -> list[dict[str, Any]]:
    """``count`` rows, the same for the same arguments: letters in equal numbers, ``hard_share`` of them hard.

    Keys: ``id``, ``image`` (PIL RGB, full resolution), ``question``, ``answer`` (one letter), ``data_source``
    (``easy`` or ``hard``).

    Raises:
        ValueError: when a share or ``legibility`` lies outside [0, 1] or letters repeat.
    """
    if not 0 <= hard_share <= 1 or not 0 <= legibility <= 1:
        raise ValueError(f"{hard_share=} and {legibility=} must both lie between 0 and 1")
    if len(alphabet) < 2 or len(set(alphabet)) < len(alphabet):
        raise ValueError(f"{alphabet=} needs at least two letters, each of them once")
    rng = np.random.default_rng(seed)
    rows = []
    # Letters and kinds are dealt rather than rolled, so that a small set is balanced too; shuffling hides the pattern.
    for index, place in enumerate(rng.permutation(count)):
        hard, letter = bool(place < round(count * hard_share)), alphabet[place % len(alphabet)]
        rows.append(
            {
                "id": f"reading-{seed}-{index}",
                "image": draw(letter, hard, rng, legibility, look),
                "question": QUESTION,
                "answer": letter,
                "data_source": "hard" if hard else "easy",
            }
        )
    return rows


def make_dataset(count: int, hard_share: float = 0.5, seed: int = 0, **settings: Any) -> Dataset:
    """``make_rows`` as a dataset whose ``image`` column decodes to PIL pictures; stored as lossless PNG."""
    text = {name: Value("string") for name in ("id", "question", "answer", "data_source")}
    features = Features({"image": Image(), **text})
    return Dataset.from_list(make_rows(count, hard_share, seed, **settings), features=features)
