"""Ways to look again: a part of a picture, or a picture at a larger scale. A tool reads arguments and picks a view.

It never raises on what a policy wrote: wrong arguments are faults.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from vt_trl.boxes import FRAME_WORDS, from_frame, read_box, whole_pixels
from vt_trl.envs.album import Album, View
from vt_trl.types import Fault

BOX_KEY = "bbox_2d"
_IMAGE = {"type": "integer", "description": "Number of an image shown before; images are numbered from 1."}


class Tool(ABC):
    """A tool of one name; ``numbered``: its argument ``image`` says which picture, else it is always the first."""

    name: str
    keys: tuple[str, ...]
    required: tuple[str, ...]

    def __init__(self, numbered: bool = False):
        self.numbered = numbered

    def look(self, arguments: Mapping[str, Any], album: Album) -> View | Fault:
        """The view that a call asks for, or what is wrong with its arguments."""
        allowed = {*self.keys, *(("image",) if self.numbered else ())}
        if not set(self.required) <= set(arguments) <= allowed:
            return Fault.WRONG_ARGUMENTS
        view = album.find(arguments.get("image", None if self.numbered else 1))
        return view if isinstance(view, Fault) else self._look(arguments, view, album)

    @abstractmethod
    def _look(self, arguments: Mapping[str, Any], view: View, album: Album) -> View | Fault: ...

    @abstractmethod
    def properties(self, frame: str) -> dict[str, Any]:
        """The arguments as a JSON schema's properties; ``frame``: the one that boxes are written in."""

    def signature(self, frame: str) -> dict[str, Any]:
        """The tool as a prompt declares it."""
        properties = self.properties(frame) | ({"image": _IMAGE} if self.numbered else {})
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.__doc__,
                "parameters": {"type": "object", "properties": properties, "required": list(self.required)},
            },
        }


class ZoomTool(Tool):
    """Shows a part of an image again, enlarged."""

    name, keys, required = "zoom_image", (BOX_KEY, "label"), (BOX_KEY,)

    def __init__(self, numbered: bool = False, tolerance: float = 0.01, least_side: int = 8):
        super().__init__(numbered)
        self.tolerance, self.least_side = tolerance, least_side

    def _look(self, arguments: Mapping[str, Any], view: View, album: Album) -> View | Fault:
        if not isinstance(arguments.get("label", ""), str):
            return Fault.WRONG_ARGUMENTS
        sides = album.sight.sides(view.size)
        box = read_box(arguments[BOX_KEY], sides, self.tolerance)
        if isinstance(box, Fault):
            return box
        region = whole_pixels(from_frame(box, sides, view.region), view.region)
        return album.crop(view.picture, region, self.least_side)

    def properties(self, frame: str) -> dict[str, Any]:
        where = f"The part as [x1, y1, x2, y2], {FRAME_WORDS[frame]}."
        return {
            BOX_KEY: {"type": "array", "items": {"type": "number"}, "description": where},
            "label": {"type": "string", "description": "What is there; may be left out."},
        }


class ScaleTool(Tool):
    """Shows an image again at a larger scale."""

    name, keys, required = "resize_image", ("scale",), ("scale",)

    def _look(self, arguments: Mapping[str, Any], view: View, album: Album) -> View | Fault:
        scale = arguments["scale"]
        full = album.full_size(view.region)
        number = isinstance(scale, int | float) and not isinstance(scale, bool) and 1 < scale < math.inf
        if not number and scale != "full":
            return Fault.WRONG_ARGUMENTS
        if full[0] * full[1] <= view.size[0] * view.size[1]:
            return Fault.CALL_AFTER_IMAGE
        size = full
        if number and scale < math.sqrt(full[0] * full[1] / (view.size[0] * view.size[1])):
            size = album.sight.fit(view.size[0] * scale, view.size[1] * scale, *album.bounds.opening)
        return View(view.picture, view.region, size, view.cropped)

    def properties(self, frame: str) -> dict[str, Any]:
        what = 'How many times wider and higher than it was shown, such as 1.5, 2 or 4, or "full" for all there is.'
        return {"scale": {"type": ["number", "string"], "description": what}}
