"""Looking again as often as the turns allow: parts of a picture (``zoom``), larger scales, or both (``look``)."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from vt_trl.boxes import Sight, to_frame
from vt_trl.envs.album import Album, Bounds, View
from vt_trl.envs.base import message, pictures_of, system, user
from vt_trl.envs.inline import STOP, boxes_in, parse_segment
from vt_trl.envs.reply import Reply, ToolCall, parse_reply
from vt_trl.envs.tools import BOX_KEY, ScaleTool, Tool, ZoomTool
from vt_trl.envs.turns import TurnsEnv
from vt_trl.errors import ConfigError, DataError
from vt_trl.images import ResolutionRule
from vt_trl.look_prompts import LookPrompts
from vt_trl.types import INSERTED, Fault, Message, Observation

SHAPES = ("tool_call", "inline")


class LookEnv(TurnsEnv):
    """Several turns with tools that show a part of a picture or a larger scale of it; several pictures per question.

    Args:
        prompts: texts to replace (:class:`~vt_trl.look_prompts.LookPrompts`).
        sight: how the model sees pictures; given by whoever knows the model. ``boxes`` replaces its frame.
        shape: ``tool_call`` (a call is a turn of its own) or ``inline`` (a box inside the reasoning; zoom alone).
        tools: ``zoom``, ``resize`` or both.
        turns: replies at most, the answer included.
        pictures: of one question at most.
        max_pixels, min_pixels: area of a picture shown in full.
        start_scale: each side of a picture is shown that many times smaller at first.
        crop_tokens: least and most visual tokens of a crop.
        max_visual_tokens: of all pictures of an episode; a call whose picture would take more is refused.
        tolerance: share of a side by which a box may lie outside the picture; it is moved to the edge then.
        min_box_side: least side of a part, in pixels of the original.
    """

    any_pictures = True
    sighted = True
    fixed: Mapping[str, Any] = {}  # settings that a subclass does not offer

    def __init__(
        self,
        prompts: Mapping[str, str] | None = None,
        sight: Sight | None = None,
        boxes: str | None = None,
        shape: str = "tool_call",
        tools: Sequence[str] = ("zoom", "resize"),
        turns: int = 8,
        pictures: int = 4,
        max_pixels: int = 2048 * 2048,
        min_pixels: int = 56 * 56,
        start_scale: float = 2.0,
        crop_tokens: Sequence[int] = (4, 1024),
        max_visual_tokens: int | None = None,
        tolerance: float = 0.01,
        min_box_side: int = 8,
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "sight", "__class__")}
        self.settings = {name: value for name, value in given.items() if name not in self.fixed}  # JSON, for a card
        sight = sight or Sight()
        self.sight = replace(sight, boxes=boxes) if boxes else sight
        self.rule = ResolutionRule(max_pixels=max_pixels, min_pixels=min_pixels)
        numbers = {"turns": turns, "pictures": pictures, "min_box_side": min_box_side}
        if max_visual_tokens is not None:
            numbers["max_visual_tokens"] = max_visual_tokens
        _check(numbers, tolerance, start_scale, crop_tokens, shape, tools)
        cell = self.sight.factor**2
        opening = max(1, -(-min_pixels // cell)), max(1, max_pixels // cell)
        self.bounds = Bounds(opening, (crop_tokens[0], crop_tokens[1]), max_visual_tokens)
        self.start_scale, self.shape, self.max_turns, self.max_pictures = start_scale, shape, turns, pictures
        self.max_image_pixels = max(opening[1], crop_tokens[1]) * cell
        self.numbered = pictures > 1 or "resize" in tools  # more than one picture a call could mean
        known = {"zoom": ZoomTool(self.numbered, tolerance, min_box_side), "resize": ScaleTool(self.numbered)}
        self.tools: dict[str, Tool] = {known[name].name: known[name] for name in tools}
        base = LookPrompts.usual(shape, list(self.tools.values()), self.sight.boxes, self.max_turns)
        self.prompts = LookPrompts.from_settings(prompts, base=base)
        self.stop_texts = (STOP,) if shape == "inline" else ()

    @property
    def max_images(self) -> int:
        return self.max_pictures + self.max_turns - 1

    def reset(self, row: Mapping[str, Any]) -> Observation:
        originals = pictures_of(row)
        if not 1 <= len(originals) <= self.max_pictures:
            raise DataError(
                f"the row has {len(originals)} pictures, and the environment takes 1 to {self.max_pictures}; "
                f"set `pictures` in environment_args of `look`"
            )
        self.turn, self.said = 0, ()
        self.album = Album(originals, self.sight, self.bounds, self.start_scale)
        parts = [part for number in range(len(originals)) for part in self._labelled(number)]
        return self.show(system(self.prompts.system), user(*parts, self.prompts.question(row["question"])))

    def fork(self) -> LookEnv:
        twin = copy.copy(self)
        twin.album = copy.copy(self.album)  # with the pixels made so far, which forks share
        return twin

    def _labelled(self, index: int) -> tuple[Image.Image, str]:
        """The ``index``-th view and the text that follows it."""
        label = self.prompts.labelled(index + 1, self.album.views[index].size)
        return self.album.images()[index], label

    def parse(self, reply: str) -> Reply:
        if self.shape == "tool_call":
            return parse_reply(reply)
        said, self.said = self.said, (*self.said, reply)
        return parse_segment(said, reply)

    def goes_on(self, text: str) -> bool:
        return not boxes_in(text)

    def resolve(self, call: ToolCall) -> tuple[View | None, tuple[Fault, ...]]:
        tool = self.tools.get(call.name)
        if tool is None:
            return None, (Fault.WRONG_TOOL,)
        view = tool.look(call.arguments, self.album)
        if isinstance(view, View) and not self.album.affordable(view):
            view = Fault.OVER_BUDGET
        return (None, (view,)) if isinstance(view, Fault) else (view, ())

    def grant(self, wanted: View, faults: tuple[Fault, ...]) -> Observation:
        whole = not wanted.cropped and wanted.size == self.album.full_size(wanted.region)
        self.album.add(wanted)
        image, label = self._labelled(len(self.album.views) - 1)
        if self.shape == "inline":
            shown = message(INSERTED, self.prompts.before_image, image, self.prompts.after_image)
        else:
            label = label + self.prompts.at_full * whole if self.numbered else ""
            shown = user(self.prompts.before_image, image, label, self.prompts.after_image)
        return Observation((shown,), faults, called=True, granted=True, regions=wanted.regions)

    def refuse(self, faults: tuple[Fault, ...]) -> Message:
        text = self.prompts.refusal(faults)
        return message(INSERTED, text) if self.shape == "inline" else user(text)

    def call_text(self, box: Sequence[float]) -> str:
        """A call for a part of the first picture, ``box`` in pixels of its upright original, as this policy writes it.

        Pixels and thousandths are whole numbers, as models write them.
        """
        view = self.album.views[0]
        numbers = to_frame(tuple(box), self.sight.sides(view.size), view.region)
        values = [round(one, 4) if self.sight.boxes == "unit" else round(one) for one in numbers]
        if self.shape == "inline":
            return json.dumps({BOX_KEY: values})
        arguments = {BOX_KEY: values} | ({"image": 1} if self.numbered else {})
        return f"<tool_call>{json.dumps({'name': ZoomTool.name, 'arguments': arguments})}</tool_call>"

    def trace(self, row: Mapping[str, Any], segments: Sequence[str], crops: Sequence[float]) -> list[str]:
        """The replies of a rationale, as this environment's policy would write it.

        ``segments``: n + 1 texts of reasoning; ``crops``: four numbers for each of the n looks between them, in pixels
        of the upright original. Raises DataError where the two do not fit, or the environment has no zoom.
        """
        if ZoomTool.name not in self.tools:
            raise DataError("the trace looks at parts of the picture, and the environment has no zoom; set tools")
        if len(crops) != 4 * (len(segments) - 1):
            raise DataError(
                f"{len(segments)} segments need {4 * (len(segments) - 1)} numbers in crops, not {len(crops)}"
            )
        self.reset(row)
        calls = [self.call_text(crops[at : at + 4]) for at in range(0, len(crops), 4)]
        *before, last = segments
        close = f"</think><answer>{row['answer'][0]}</answer>"
        if self.shape == "tool_call":
            said = [f"<think>{text}</think>{call}" for text, call in zip(before, calls, strict=True)]
            return [*said, f"<think>{last}{close}"]
        replies = [*(f"{text} {call}" for text, call in zip(before, calls, strict=True)), f"{last}{close}"]
        return [f"<think>{replies[0]}", *replies[1:]]

    def gold_replies(self, row: Mapping[str, Any]) -> list[list[str]]:
        """An answer at once, and one after as many looks as turns allow: at the gold region or at all of it."""
        close = f"<answer>{row['answer'][0]}</answer>"
        direct = f"<think>It is legible.</think>{close}"
        if not hasattr(self, "album"):
            self.reset(row)
        looks = self.max_turns - 1
        if ZoomTool.name in self.tools:
            view = self.album.views[0]
            call = self.call_text(row.get("region") or view.region)
        else:
            arguments = {"scale": "full"} | ({"image": 1} if self.numbered else {})
            call = f"<tool_call>{json.dumps({'name': ScaleTool.name, 'arguments': arguments})}</tool_call>"
            looks = min(looks, 1)
        if not looks:
            return [[direct]]
        if self.shape == "inline":
            return [[direct], [f"<think>Closer: {call}", *[f" Again: {call}"] * (looks - 1), f" Now.</think>{close}"]]
        return [[direct], [*[f"<think>It is too small to read.</think>{call}"] * looks, direct]]


class ZoomEnv(LookEnv):
    """A picture in full, and up to ``turns - 1`` parts of it that the policy asks for (VLM-R3, arXiv 2505.16192)."""

    any_pictures = False
    fixed = {"tools": ("zoom",), "pictures": 1, "start_scale": 1.0}

    def __init__(
        self, prompts: Mapping[str, str] | None = None, max_pixels: int = 3_211_264, turns: int = 8, **settings: Any
    ):
        for name in self.fixed:
            if name in settings:
                raise ConfigError(f"{name} is set, which environment `zoom` does not have; set environment: look.")
        super().__init__(prompts, max_pixels=max_pixels, turns=turns, **settings, **self.fixed)


def _check(
    numbers: Mapping[str, int],
    tolerance: float,
    start_scale: float,
    crop_tokens: Sequence[int],
    shape: str,
    tools: Sequence[str],
) -> None:
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} is {value!r}; it is a whole number from 1.")
    if not 0 <= tolerance < 0.5:
        raise ConfigError(f"tolerance is {tolerance}; it is a share of a side, from 0 to below 0.5 (0.01 by default).")
    if not start_scale >= 1:
        raise ConfigError(f"start_scale is {start_scale}; pictures are shown that many times smaller, so 1 or more.")
    if len(crop_tokens) != 2 or not all(type(one) is int for one in crop_tokens) or crop_tokens[0] < 1:
        raise ConfigError(f"crop_tokens is {crop_tokens!r}; give the least and the most, e.g. [4, 1024].")
    if crop_tokens[1] < 2 * crop_tokens[0]:
        raise ConfigError(f"crop_tokens is {crop_tokens!r}; the most must be at least twice the least.")
    if shape not in SHAPES:
        raise ConfigError(f"shape is {shape!r}; use {' or '.join(SHAPES)}.")
    if not tools or len(set(tools)) != len(tools) or not set(tools) <= {"zoom", "resize"}:
        raise ConfigError(f"tools is {tools!r}; use zoom, resize or both.")
    if shape == "inline" and tuple(tools) != ("zoom",):
        raise ConfigError("shape is inline, where only boxes can be written; set tools: [zoom], or shape: tool_call.")
