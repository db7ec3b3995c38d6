"""The environment contract: messages and pictures in, a reply out, never a token id.

A third-party environment is one small class::

    class Guess(Environment):
        def reset(self, row):
            return self.show(user(row["image"], row["question"]))

        def step(self, reply, truncated=False):
            return Done(RolloutStatus.ANSWERED, answer=reply.strip())

and one line of YAML, ``environment: my_module:Guess``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from PIL import Image

from vt_trl.errors import DataError
from vt_trl.types import Done, ImagePart, Message, Observation, TextPart


class Environment(ABC):
    """One episode at a time: ``reset`` shows the task, ``step`` judges a reply's form and shows what comes next.

    ``reset`` runs once per row; the members of a group then each get a :meth:`fork`, so work on the picture is done
    once. An environment never raises on what a policy wrote: every reply leads to an Observation or to Done.
    """

    max_turns: int = 1
    max_image_pixels: int | None = None  # of the largest picture it shows; None: what the image processor allows
    stop_texts: tuple[str, ...] = ()  # texts at which a turn may end, besides the family's stop token
    sighted: bool = False  # it is built with ``sight``, how the model sees pictures (:class:`vt_trl.boxes.Sight`)
    max_pictures: int = 1  # of a row, in training; further ones make a bad row
    # Whatever a group's members do, a tool shows all of them the same picture objects (the memory estimate asks).
    same_replies: bool = False
    any_pictures: bool = False  # it also plays rows whose ``images`` are several or none (:func:`pictures_of`)

    @abstractmethod
    def reset(self, row: Mapping[str, Any]) -> Observation:
        """Start an episode on a checked data row (``image`` is an RGB picture). Raises ``DataError`` on a bad row."""

    @abstractmethod
    def step(self, reply: str, truncated: bool = False) -> Observation | Done:
        """Answer a reply (text without the stop token). ``truncated``: the token limit cut it."""

    def goes_on(self, text: str) -> bool:
        """Whether a turn that has just written one of ``stop_texts`` is not over yet. ``text``: the turn so far."""
        return False

    @property
    def max_images(self) -> int:
        """The most pictures in one context, those of the opening included."""
        return self.max_turns

    def fork(self) -> Environment:
        """An independent copy right after ``reset``. Override when ``step`` changes a field in place."""
        return copy.copy(self)

    def gold_replies(self, row: Mapping[str, Any]) -> list[list[str]]:
        """Reply sequences that solve the row, one list per route; used by :meth:`validate`. May be empty."""
        return []

    def validate(self, row: Mapping[str, Any]) -> list[Done]:
        """Play every gold route and return how each ended, so that a test can demand full marks of them.

        Raises ``RuntimeError`` when a route ends early or leaves the episode open.
        """
        ends = []
        for replies in self.gold_replies(row):
            episode = self.fork()
            episode.reset(row)
            for index, reply in enumerate(replies):
                outcome = episode.step(reply)
                last = index == len(replies) - 1
                if isinstance(outcome, Done) != last:
                    raise RuntimeError(
                        f"{type(self).__name__}: gold reply {index + 1} of {len(replies)} "
                        f"{'left the episode open' if last else 'ended the episode'}: {reply!r}"
                    )
            ends.append(outcome)
        return ends

    @staticmethod
    def show(*messages: Message) -> Observation:
        return Observation(tuple(messages))


def pictures_of(row: Mapping[str, Any]) -> list[Image.Image]:
    """The pictures of a row: its ``images`` where it has that list (empty: a text alone), else its only ``image``."""
    images = row.get("images")
    return [row["image"]] if images is None else list(images)


def check_pictures(environment: Environment, row: Mapping[str, Any]) -> None:
    """Raise DataError for a row with several pictures where the environment would show one of them only."""
    count = len(row.get("images") or ())
    if count > 1 and not environment.any_pictures:
        raise DataError(f"row id {row.get('id')!r} has {count} pictures, and {type(environment).__name__} takes one")


def message(role: str, *parts: str | Image.Image) -> Message:
    """A message from texts and pictures in order; empty texts are left out."""
    built = [TextPart(part) if isinstance(part, str) else ImagePart(part) for part in parts if part != ""]
    return Message(role, tuple(built))


def user(*parts: str | Image.Image) -> Message:
    return message("user", *parts)


def system(text: str) -> Message:
    return message("system", text)
