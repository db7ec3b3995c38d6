"""The nouns of the library: turns, rollouts and how each of them can end.

Shapes: ``T`` tokens of one turn, ``C`` of one completion (all turns after the prompt), ``P`` of a prompt.
Nothing here knows a model, a trainer or a backend.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from PIL import Image

INSERTED = "inserted"  # role of what is put into the assistant's own turn, which then goes on


class RolloutStatus(StrEnum):
    """How an episode ended. Every rollout has exactly one; each is counted in the logs as ``status/<value>``."""

    ANSWERED = "answered"  # the policy gave an answer, right or wrong
    NO_ANSWER = "no_answer"  # the turn ended with neither a usable answer nor a call
    MALFORMED_CALL = "malformed_call"  # the last turn allowed was spent on a call that could not be run
    TURN_LIMIT = "turn_limit"  # a valid call, but no turn was left to use its result
    TRUNCATED = "truncated"  # a turn reached its token limit before it ended
    CONTEXT_LIMIT = "context_limit"  # the tool's reply would not fit into the completion
    REJECTED_IMAGE = "rejected_image"  # the tool's image could not be shown


class Fault(StrEnum):
    """What is wrong with one reply. A turn is well-formed when it has none; each is counted as ``fault/<value>``."""

    NO_MOVE = "no_move"  # neither an answer nor a call
    CALL_AND_ANSWER = "call_and_answer"
    SEVERAL_CALLS = "several_calls"
    SEVERAL_ANSWERS = "several_answers"
    BAD_JSON = "bad_json"  # the call is no JSON object with "name" and "arguments"
    WRONG_TOOL = "wrong_tool"
    WRONG_ARGUMENTS = "wrong_arguments"
    CALL_AFTER_IMAGE = "call_after_image"  # nothing more to show
    MISSING_THINK = "missing_think"
    EMPTY_THINK = "empty_think"
    EMPTY_ANSWER = "empty_answer"
    DOUBLED_TAGS = "doubled_tags"  # a tag opened or closed twice
    BROKEN_TAGS = "broken_tags"  # opened and not closed, closed and not opened, or out of order
    STRAY_TEXT = "stray_text"  # text outside the blocks
    TRUNCATED = "truncated"
    SEVERAL_BOXES = "several_boxes"
    BOX_NO_NUMBERS = "box_no_numbers"  # not four numbers: texts, fewer, more, none
    BOX_NOT_FINITE = "box_not_finite"  # NaN or infinite
    BOX_REVERSED = "box_reversed"  # x2 < x1 or y2 < y1
    BOX_EMPTY = "box_empty"  # x1 = x2 or y1 = y2
    BOX_OUTSIDE = "box_outside"  # beyond the picture by more than the tolerance
    BOX_TINY = "box_tiny"  # too small or too thin to be shown
    NO_SUCH_IMAGE = "no_such_image"
    OVER_BUDGET = "over_budget"  # its picture would take more visual tokens than are left


@dataclass(frozen=True)
class TextPart:
    """Plain text of a message. It can hold anything; the encoder never lets it become a control token."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """One image of a message: an RGB picture in shown pixels."""

    image: Image.Image


@dataclass(frozen=True)
class Message:
    """One chat message: ``role`` is ``system``, ``user``, ``assistant``, or :data:`INSERTED`."""

    role: str
    parts: tuple[TextPart | ImagePart, ...]

    @property
    def images(self) -> list[Image.Image]:
        return [part.image for part in self.parts if isinstance(part, ImagePart)]

    @property
    def text(self) -> str:
        """The message's text with an ``<image>`` marker where a picture stands; for logs, never for tokens."""
        return "".join(part.text if isinstance(part, TextPart) else "<image>" for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """The message as TRL and reward functions see it: ``{"role", "content"}`` with text content."""
        return {"role": self.role, "content": self.text}


@dataclass(frozen=True)
class Region:
    """A part of the row's ``picture``-th picture, from 0: ``(x1, y1, x2, y2)`` in pixels of the upright original."""

    picture: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Observation:
    """What the environment shows next.

    ``faults`` belong to the reply that led here; ``called``: it tried to call a tool; ``granted``: the call was run.
    ``regions``: the parts of pictures that a granted call shows.
    """

    messages: tuple[Message, ...]
    faults: tuple[Fault, ...] = ()
    called: bool = False
    granted: bool = False
    regions: tuple[Region, ...] = ()

    def parts(self, first: int) -> dict[int, Region]:
        """The region that each of its pictures shows, the first of them counted as ``first``; {} if that is open."""
        count = sum(len(one.images) for one in self.messages)
        return dict(enumerate(self.regions, start=first)) if count == len(self.regions) else {}


@dataclass(frozen=True)
class Done:
    """The end of an episode. ``answer`` is the text inside the answer tags, or None; ``detail`` is for logs only."""

    status: RolloutStatus
    answer: str | None = None
    faults: tuple[Fault, ...] = ()
    called: bool = False
    detail: str = ""


@dataclass(frozen=True)
class Turn:
    """One sampled reply. ``token_ids`` and ``logprobs`` have length T, the stop token included as sampled.

    ``logprobs`` are those of the sampling distribution (after temperature and token bans), or None per token when the
    backend could not tell. ``faults`` is what the environment found wrong with the reply.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    finished: bool  # False: the token limit cut the turn
    faults: tuple[Fault, ...] = ()

    @property
    def well_formed(self) -> bool:
        return not self.faults


@dataclass
class Rollout:
    """One episode, in tokens and in words; finished, unless its ``status`` is None (``RolloutRunner.watch``).

    ``prompt_ids`` (P,); ``completion_ids``, ``loss_mask`` and ``logprobs`` (C,): the loss mask is 1 exactly on sampled
    tokens; ``logprobs`` is 0.0 where the mask is 0. ``images`` are in the order of their placeholder runs in
    ``prompt_ids + completion_ids``.
    """

    row: dict[str, Any]
    prompt_ids: list[int]
    completion_ids: list[int]
    loss_mask: list[int]
    logprobs: list[float | None]
    images: list[Image.Image]
    messages: list[Message]  # the whole dialogue, prompt included
    prompt_messages: int  # how many of ``messages`` are the prompt
    turns: list[Turn]
    status: RolloutStatus | None
    answer: str | None = None
    asked: bool = False  # a tool call was granted
    attempted: bool = False  # a tool call was tried, granted or not
    detail: str = ""
    visual_tokens: int = 0  # image tokens in prompt and completion together
    regions: list[Region] = field(default_factory=list)  # parts that were cropped and shown, in order
    parts: dict[int, Region] = field(default_factory=dict)  # the same by the picture that shows it, index into images

    @property
    def well_formed(self) -> bool:
        """True when every turn is (VisionThink, Section 3.3: the format reward is for the whole trajectory)."""
        return self.status is RolloutStatus.ANSWERED and all(turn.well_formed for turn in self.turns)

    @property
    def faults(self) -> list[Fault]:
        return [fault for turn in self.turns for fault in turn.faults]
