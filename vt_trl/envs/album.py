"""The pictures of a row, and every view of them that has been shown: which part, how large, under which number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vt_trl.boxes import Box, Sight, area, zoom_of
from vt_trl.errors import DataError
from vt_trl.images import MAX_ASPECT, Size
from vt_trl.types import Fault, Region


@dataclass(frozen=True)
class View:
    """A picture as shown: part ``region`` (whole pixels of the original) of the row's ``picture``-th, at ``size``."""

    picture: int
    region: tuple[int, int, int, int]
    size: Size
    cropped: bool = False

    @property
    def regions(self) -> tuple[Region, ...]:
        return (Region(self.picture, tuple(map(float, self.region))),) if self.cropped else ()


@dataclass(frozen=True)
class Bounds:
    """Visual tokens of an opening picture, of a crop, and of all pictures of an episode together (None: no limit)."""

    opening: tuple[int, int]
    crop: tuple[int, int]
    episode: int | None = None


class Album:
    """The originals of one row and the views shown so far, numbered from 1 as the policy counts them.

    ``scale``: how many times smaller than in full each side of an opening picture is. Forks of an episode share the
    pixels that were made, so that members of a group who ask for the same part get the same picture object.
    """

    def __init__(self, originals: Sequence[Image.Image], sight: Sight, bounds: Bounds, scale: float = 1.0):
        self.originals, self.sight, self.bounds = list(originals), sight, bounds
        self.views: tuple[View, ...] = ()
        self._made: dict[View, Image.Image] = {}
        most = bounds.opening[1]
        if bounds.episode is not None and originals:
            most = min(most, bounds.episode // len(originals))
        for number, image in enumerate(self.originals):
            region = (0, 0, *image.size)
            full = self.full_size(region)
            size = sight.fit(full[0] / scale, full[1] / scale, min(bounds.opening[0], most), most)
            self.add(View(number, region, size))

    @property
    def spent(self) -> int:
        """Visual tokens of all views."""
        return sum(self.sight.visual_tokens(view.size) for view in self.views)

    def add(self, view: View) -> Image.Image:
        """Note a view as shown, and give its pixels (Lanczos)."""
        self.views = (*self.views, view)  # never changed in place: forks share what came before
        if view not in self._made:
            original = self.originals[view.picture]
            self._made[view] = original.resize(view.size, Image.Resampling.LANCZOS, box=view.region)
        return self._made[view]

    def images(self) -> list[Image.Image]:
        return [self._made[view] for view in self.views]

    def find(self, number: Any) -> View | Fault:
        """The view of a number; without one the only picture, where there is one."""
        if number is None and len(self.originals) == 1:
            return self.views[0]
        if not isinstance(number, int) or isinstance(number, bool):
            return Fault.WRONG_ARGUMENTS
        return self.views[number - 1] if 1 <= number <= len(self.views) else Fault.NO_SUCH_IMAGE

    def full_size(self, region: Box) -> Size:
        """The size at which a part of an original is shown in full."""
        return self.sight.fit(region[2] - region[0], region[3] - region[1], *self.bounds.opening)

    def crop(self, picture: int, region: tuple[int, int, int, int], least_side: int) -> View | Fault:
        """The view of a part, enlarged by its share of the picture; or why it cannot be shown."""
        width, height = region[2] - region[0], region[3] - region[1]
        if min(width, height) < least_side or max(width, height) > MAX_ASPECT * min(width, height):
            return Fault.BOX_TINY
        original = self.originals[picture]
        zoom = zoom_of(area(region) / (original.width * original.height))
        try:
            size = self.sight.fit(width * zoom, height * zoom, *self.bounds.crop)
        except DataError:
            return Fault.BOX_TINY
        return View(picture, region, size, cropped=True)

    def affordable(self, view: View) -> bool:
        budget = self.bounds.episode
        return budget is None or self.spent + self.sight.visual_tokens(view.size) <= budget
