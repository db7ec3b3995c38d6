"""VisionThink's environment (arXiv 2507.13348, Section 3): a quarter of the pixels first, all of them on request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vt_trl.envs.base import Environment, pictures_of, system, user
from vt_trl.envs.reply import ToolCall, parse_reply
from vt_trl.envs.turns import TurnsEnv, end_of
from vt_trl.errors import ConfigError
from vt_trl.images import ResolutionRule, Views
from vt_trl.prompts import DIRECT_PROMPTS, Prompts
from vt_trl.types import Done, Fault, Observation, RolloutStatus


class ResizeEnv(TurnsEnv):
    """Two turns: the picture at half of each side, then either an answer or a call for the full picture.

    A call that cannot be run is explained to the policy, which then has its second turn without the picture. Settings:
    ``prompts`` replaces texts (:class:`~vt_trl.prompts.Prompts`), the rest goes to ``ResolutionRule``.

    Several pictures are all shown low, in their order before the question, and one call shows all of them in full. A
    question without a picture has one turn and the texts of :class:`DirectEnv`, since there is nothing to call for.
    """

    any_pictures = True
    same_replies = True  # the full view, of which forks share one
    tool_name = "resize_image"
    tool_arguments = {"action": "resize"}
    max_turns = 2

    def __init__(self, prompts: Mapping[str, str] | None = None, **resolution: int):
        self.prompts = Prompts.from_settings(prompts)
        self.rule = ResolutionRule(**resolution)
        self.max_image_pixels = self.rule.max_pixels

    def reset(self, row: Mapping[str, Any]) -> Observation:
        self.all_views = [self.rule.views(image) for image in pictures_of(row)]
        self.shown = False
        if not self.all_views:
            self.turn = self.max_turns - 1  # the only turn is the last one
            return self.show(system(DIRECT_PROMPTS.system), user(DIRECT_PROMPTS.question(row["question"])))
        self.turn = 0
        low = [views.low for views in self.all_views]
        return self.show(system(self.prompts.system), user(*low, "\n", self.prompts.question(row["question"])))

    @property
    def views(self) -> Views:
        """Of the first picture, mostly the only one."""
        return self.all_views[0]

    def resolve(self, call: ToolCall) -> tuple[bool | None, tuple[Fault, ...]]:
        if call.name != self.tool_name:
            return None, (Fault.WRONG_TOOL,)
        if call.arguments != self.tool_arguments:
            return None, (Fault.WRONG_ARGUMENTS,)
        return True, (Fault.CALL_AFTER_IMAGE,) if self.shown else ()  # after it there is no turn left to use it

    def grant(self, wanted: bool, faults: tuple[Fault, ...]) -> Observation:
        self.shown = True
        images = [self.tool_image(), *(views.full for views in self.all_views[1:])]
        shown = user(self.prompts.before_image, *images, self.prompts.after_image)
        return Observation((shown,), faults, called=True, granted=True)

    def tool_image(self):
        """The picture a granted call shows; of several the first."""
        return self.views.full

    def gold_replies(self, row: Mapping[str, Any]) -> list[list[str]]:
        answer = f"<think>It is legible.</think><answer>{row['answer'][0]}</answer>"
        call = '<tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'
        return [[answer], [f"<think>It is too small to read.</think>{call}", answer]]


class DirectEnv(Environment):
    """One turn at a fixed resolution: VisionThink-General, and the always-full and always-low controls.

    ``resolution`` is ``full`` or ``low``; other settings as for :class:`ResizeEnv`, whose resolution rule it shares.
    Several pictures stand in their order before the question.
    """

    any_pictures = True
    max_turns = 1

    def __init__(self, resolution: str = "full", prompts: Mapping[str, str] | None = None, **settings: int):
        if resolution not in ("full", "low"):
            raise ConfigError(f"resolution is {resolution!r}; it must be 'full' or 'low'.")
        self.resolution = resolution
        self.prompts = Prompts.from_settings(prompts, base=DIRECT_PROMPTS)
        self.rule = ResolutionRule(**settings)
        self.max_image_pixels = self.rule.max_pixels

    def reset(self, row: Mapping[str, Any]) -> Observation:
        images = [getattr(self.rule.views(image), self.resolution) for image in pictures_of(row)]
        gap = "\n" if images else ""
        return self.show(system(self.prompts.system), user(*images, gap, self.prompts.question(row["question"])))

    def step(self, reply: str, truncated: bool = False) -> Done:
        if truncated:
            return Done(RolloutStatus.TRUNCATED, faults=(Fault.TRUNCATED,))
        parsed = parse_reply(reply)
        if parsed.wants_call:
            status = RolloutStatus.TURN_LIMIT if parsed.call else RolloutStatus.MALFORMED_CALL
            return Done(status, faults=parsed.faults, called=True)
        return end_of(parsed)

    def gold_replies(self, row: Mapping[str, Any]) -> list[list[str]]:
        return [[f"<think>It is legible.</think><answer>{row['answer'][0]}</answer>"]]


class SingleEnv(DirectEnv):
    """One turn, the picture in full within ``max_pixels``, no tool: what OpenVLThinker trains (arXiv 2503.17352).

    :class:`DirectEnv` with that paper's bound of 262,144 pixels; smaller pictures are left as small as they are.
    """

    def __init__(
        self,
        prompts: Mapping[str, str] | None = None,
        max_pixels: int = 262_144,
        min_pixels: int = 56 * 56,
        **settings: int,
    ):
        if "resolution" in settings:
            raise ConfigError("resolution is set, which environment `single` does not have; set environment: direct.")
        super().__init__("full", prompts, max_pixels=max_pixels, min_pixels=min_pixels, **settings)
