"""The search task: coloured frames in a large picture, a letter in each, and a question about one colour.

Where the frames are is plain in the picture as it is shown, at half of each side. What stands in them is not: the
letters are halftone prints, which halving removes to the last trace (:func:`demos.reading.task.unseen`), however long
a model trains. A crop of the frame has the original's pixels, and there the letter is legible; a crop twice as wide is
halved again and shows as little as the whole picture.

The paper in a frame is tinted by where on the sheet it is, more red to the right and more green to the bottom, as the
grid of a map would tell a reader: a model of two layers has no other sense of place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from demos.reading.task import ALPHABET, unseen

GREY = 128.0  # of the paper
COLOURS = {"red": (225, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 225), "yellow": (225, 205, 40)}
QUESTION = "Which letter is in the {colour} frame?"


@dataclass(frozen=True)
class Sheet:
    """How a picture is drawn. Lengths in pixels of the original, brightness in grey levels of 0 to 255."""

    cells: int = 3  # per side
    cell: int = 56  # its side; shown at half of it, which is one visual token of 28 x 28
    ring: int = 6  # width of a frame
    letter: tuple[int, int] = (37, 42)  # font size, smallest and largest
    stroke: int = 2
    shift: int = 2  # largest move of a letter off the middle of its cell, along each axis
    tint: float = 55.0  # how far the paper in a frame is tinted, each way
    dots: tuple[int, int] = (62, 70)  # amplitude of the halftone prints
    noise: float = 6.0

    @property
    def side(self) -> int:
        return self.cells * self.cell


def _letter(letter: str, middle: tuple[float, float], side: int, rng: np.random.Generator, sheet: Sheet) -> np.ndarray:
    """A letter around ``middle`` (x, y), (side, side) from 0.0 (paper) to 1.0 (ink)."""
    mask = PILImage.new("L", (side, side), 0)
    font = ImageFont.load_default(size=int(rng.integers(sheet.letter[0], sheet.letter[1] + 1)))
    x, y = (at + float(rng.integers(-sheet.shift, sheet.shift + 1)) for at in middle)
    ImageDraw.Draw(mask).text((x, y), letter, fill=255, font=font, anchor="mm", stroke_width=sheet.stroke)
    return np.asarray(mask, dtype=np.float64) / 255.0


def _framed(paper: np.ndarray, colour: str, corner: tuple[int, int], place: tuple[int, int], sheet: Sheet) -> None:
    """Paint a frame with its ``corner`` (x, y) on ``paper``, in place, and tint what it holds by its ``place``."""
    left, top = corner
    outer, inner = (
        np.s_[top + edge : top + sheet.cell - edge, left + edge : left + sheet.cell - edge] for edge in (0, sheet.ring)
    )
    red, green = (sheet.tint * (2 * at / (sheet.cells - 1) - 1) for at in place)
    paper[outer] = COLOURS[colour]
    paper[inner] = GREY + red, GREY + green, GREY


def _finished(paper: np.ndarray, print_: np.ndarray, rng: np.random.Generator, sheet: Sheet) -> PILImage.Image:
    grey = paper + print_[..., None] + rng.normal(0.0, sheet.noise, print_.shape)[..., None]
    return PILImage.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))


def _halftone(ink: np.ndarray, rng: np.random.Generator, sheet: Sheet) -> np.ndarray:
    y, x = np.indices(ink.shape)
    return rng.uniform(*sheet.dots) * unseen(ink * (1 - 2 * ((x + y) % 2)))


def draw(
    places: Mapping[str, tuple[int, int]], letters: Mapping[str, str], rng: np.random.Generator, sheet: Sheet
) -> tuple[PILImage.Image, dict[str, list[float]]]:
    """A picture with a frame per colour at ``places`` (column, row), and where each letter's ink is, in pixels."""
    paper, ink, boxes = np.full((sheet.side, sheet.side, 3), GREY), np.zeros((sheet.side, sheet.side)), {}
    for colour, (column, row) in places.items():
        left, top = column * sheet.cell, row * sheet.cell
        _framed(paper, colour, (left, top), (column, row), sheet)
        middle = left + sheet.cell / 2, top + sheet.cell / 2
        mask = _letter(letters[colour], middle, sheet.side, rng, sheet)
        down, across = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        boxes[colour] = [float(one) for one in (across[0], down[0], across[-1] + 1, down[-1] + 1)]
        ink += mask
    return _finished(paper, _halftone(ink, rng, sheet), rng, sheet), boxes


def draw_frame(letter: str, colour: str, solid: bool, rng: np.random.Generator, sheet: Sheet) -> PILImage.Image:
    """One frame alone, as if cut out of a picture; ``solid``: printed without dots, legible at any size."""
    paper = np.full((sheet.cell, sheet.cell, 3), GREY)
    _framed(paper, colour, (0, 0), tuple(int(one) for one in rng.integers(sheet.cells, size=2)), sheet)
    ink = _letter(letter, (sheet.cell / 2, sheet.cell / 2), sheet.cell, rng, sheet)
    return _finished(paper, -70.0 * ink if solid else _halftone(ink, rng, sheet), rng, sheet)


def make_rows(
    count: int, seed: int = 0, sheet: Sheet | None = None, frames: int = len(COLOURS)
) -> list[dict[str, Any]]:
    """``count`` rows, the same for the same arguments: the letters asked for, colours and cells in equal numbers.

    Keys: those of :mod:`vt_trl.rows`; ``region`` is the box of the letter's ink, in pixels of the original, ``cell``
    (column, row) that of its frame, and ``colour`` the frame's. ``frames``: how many a picture has.
    """
    sheet, rng, rows = sheet or Sheet(), np.random.default_rng(seed), []
    colours, cells = list(COLOURS), sheet.cells**2
    dealt = [rng.permutation(count) for _ in range(3)]  # dealt, not rolled: a small set is balanced, too
    for index in range(count):
        asked, letter, place = (int(one[index]) for one in dealt)
        colour = colours[asked % len(colours)]
        taken = [place % cells, *(int(one) for one in rng.permutation(cells) if one != place % cells)]
        others = [one for one in colours if one != colour]
        order = [colour, *others][:frames]
        places = {name: divmod(cell, sheet.cells)[::-1] for name, cell in zip(order, taken[: len(order)], strict=True)}
        letters = {name: ALPHABET[int(rng.integers(len(ALPHABET)))] for name in order}
        letters[colour] = ALPHABET[letter % len(ALPHABET)]
        image, boxes = draw(places, letters, rng, sheet)
        rows.append(
            {
                "id": f"search-{seed}-{index}",
                "image": image,
                "question": QUESTION.format(colour=colour),
                "answer": letters[colour],
                "data_source": colour,
                "region": list(boxes[colour]),
                "cell": list(places[colour]),
                "colour": colour,
            }
        )
    return rows


def frame_box(row: Mapping[str, Any], sheet: Sheet, scale: float = 1.0) -> list[float]:
    """The box of the frame that was asked for, [x1, y1, x2, y2]; ``scale`` 1: in pixels of the original."""
    column, line = row["cell"]
    return [one * sheet.cell * scale for one in (column, line, column + 1, line + 1)]


def make_dataset(rows: list[dict[str, Any]]) -> Dataset:
    """Rows as a dataset whose ``image`` column decodes to PIL pictures; further columns of traces are kept."""
    known: dict[str, Any] = {
        "image": Image(),
        "region": List(Value("float64")),
        "segments": List(Value("string")),
        "crops": List(Value("float64")),
    }
    names = [name for name in rows[0] if name not in ("cell", "colour")]
    features = Features({name: known.get(name, Value("string")) for name in names})
    return Dataset.from_list([{name: row[name] for name in names} for row in rows], features=features)
