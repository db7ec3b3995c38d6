"""Where a policy looked: the parts of pictures it was shown, as boxes on the pictures they were taken from."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from vt_trl.boxes import Box, to_frame
from vt_trl.envs.base import pictures_of
from vt_trl.types import Rollout

_SIDES = (1.0, 1.0)  # boxes are kept in shares, so that they fit a picture that was kept smaller, too


@dataclass(frozen=True)
class Part:
    """A box on a picture: edges in shares of its sides. ``number``: of the look that showed it, from 1."""

    number: int
    left: float
    top: float
    right: float
    bottom: float


def looks_of(rollout: Rollout) -> tuple[dict[int, int], dict[int, tuple[Part, ...]]]:
    """``({image: number of the look that it shows}, {image: the parts to draw on it})``, by index into the images.

    A part is drawn on the row's picture as it was first shown, and on every earlier part that holds it. Pictures are
    known by their order: where the opening shows another number of them than the row has, nothing is drawn on them.
    """
    if not rollout.parts:
        return {}, {}
    shows: dict[int, tuple[int, Box]] = {}  # image -> which of the row's pictures, and which part of it
    originals = pictures_of(rollout.row)
    if sum(len(one.images) for one in rollout.messages[: rollout.prompt_messages]) == len(originals):
        shows = {index: (index, (0.0, 0.0, *image.size)) for index, image in enumerate(originals)}
    numbers: dict[int, int] = {}
    drawn: dict[int, list[Part]] = defaultdict(list)
    for number, (index, region) in enumerate(sorted(rollout.parts.items()), start=1):
        for earlier, (picture, whole) in shows.items():
            if picture == region.picture and _holds(whole, region.box):
                drawn[earlier].append(Part(number, *to_frame(region.box, _SIDES, whole)))
        shows[index], numbers[index] = (region.picture, region.box), number
    return numbers, {index: tuple(parts) for index, parts in drawn.items()}


def _holds(whole: Box, part: Box) -> bool:
    return all(whole[edge] <= part[edge] and part[edge + 2] <= whole[edge + 2] for edge in (0, 1))
