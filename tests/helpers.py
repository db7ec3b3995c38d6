"""Environments and scripts that several tests share."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

from PIL import Image

from vt_trl.boxes import Sight
from vt_trl.envs import Environment, LookEnv, ResizeEnv, ZoomEnv
from vt_trl.generation.base import Request, Sample
from vt_trl.types import Done, Observation, Rollout, RolloutStatus, Turn

CALL = '<think>too small</think><tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'
SHORT_PROMPTS = {
    "system": "Tool",
    "task": "{question}",
    "before_image": "Full:",
    "after_image": "Go",
    "call_refused": "No. {reason}",
}


def environment_of_its_own(**more: str) -> dict[str, str]:
    """For a process that a test starts: without what an engine in this process has told vLLM of its rank and port."""
    told = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in told} | more


def answer(text: str) -> str:
    return f"<think>seen</think><answer>{text}</answer>"


class AsksFirst(ResizeEnv):
    """Takes whatever the policy says first as a call and whatever it says next as its answer.

    A random model makes no calls, but alignment must be tested with a second picture in the completion.
    """

    def step(self, reply: str, truncated: bool = False) -> Observation | Done:
        if self.turn == 0:
            return super().step(CALL)
        return Done(RolloutStatus.ANSWERED, answer=reply)


class _BoxFirst:
    """As AsksFirst: the first thing said is taken as a call for the left half of the first picture.

    Whatever is said next ends the episode, every other time as the right answer, so that a group has a spread.
    """

    answers = itertools.count()

    def reset(self, row: Mapping[str, Any]) -> Observation:
        self.gold = next(iter(row["answer"]), "nobody knows")  # a question that is asked has no answer yet
        return super().reset(row)

    def step(self, reply: str, truncated: bool = False) -> Observation | Done:
        if self.turn == 0:
            width, height = self.album.originals[0].size
            end = "" if self.shape == "inline" else "</think>"
            return super().step(f"<think>There: {end}{self.call_text((0, 0, width // 2, height))}")
        right = next(self.answers) % 2
        return Done(RolloutStatus.ANSWERED, answer=self.gold) if right else Done(RolloutStatus.NO_ANSWER)


class ZoomsFirst(_BoxFirst, ZoomEnv):
    """``zoom`` with a forced first look."""


class LooksFirst(_BoxFirst, LookEnv):
    """``look`` with a forced first look."""


class Boxes(ZoomEnv):
    """A random model writes no boxes: two letters end a turn that has ``least`` characters, and a box stands for it.

    The box is the upper left quarter; the last of ``turns`` is the answer.
    """

    def __init__(self, sight: Sight, turns: int, least: int):
        super().__init__(sight=sight, shape="inline", turns=turns)
        self.stop_texts, self.least = ("e", "a"), least

    def goes_on(self, text: str) -> bool:
        return len(text) < self.least

    def step(self, reply: str, truncated: bool = False) -> Observation | Done:
        if self.turn == self.max_turns - 1:
            return Done(RolloutStatus.ANSWERED, reply)
        sides = self.sight.sides(self.album.views[0].size)
        box = {"bbox_2d": [0, 0, sides[0] / 2, sides[1] / 2]}
        return super().step(f"<think>{json.dumps(box)}", truncated)


def booked(
    env: Environment, row: Mapping[str, Any], replies: Sequence[str], truncated: bool = False
) -> tuple[Rollout, list[Observation]]:
    """The episode as the rollout loop would book it, and what was shown; ``truncated`` concerns the last reply."""
    env.reset(row)
    turns, shown, regions, asked, attempted = [], [], [], False, False
    for index, reply in enumerate(replies):
        outcome = env.step(reply, truncated=truncated and index == len(replies) - 1)
        turns.append(Turn(reply, (), (), True, outcome.faults))
        attempted = attempted or outcome.called
        if isinstance(outcome, Observation):
            asked = asked or outcome.granted
            regions += outcome.regions
            shown.append(outcome)
    assert isinstance(outcome, Done), "the episode is still open"
    done = (outcome.status, outcome.answer, asked, attempted)
    return Rollout({"id": "r"}, [], [], [], [], [], [], 0, turns, *done, regions=regions), shown


class Script:
    """Plays given replies back through a tokenizer: ``choose(member, turn) -> text`` for the member-th rollout."""

    def __init__(self, tokenizer: Any, choose: Callable[[int, int], str], logprob: float | None = None):
        self.tokenizer, self.choose, self.logprob = tokenizer, choose, logprob
        self.turns: dict[int, int] = {}
        self.requests: list[Request] = []

    def __call__(self, request: Request) -> Sample:
        self.requests.append(request)
        turn = self.turns.get(request.request_id, 0)
        self.turns[request.request_id] = turn + 1
        text = self.choose(request.request_id, turn)
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = (*ids, self.tokenizer.eos_token_id)
        return Sample(request.request_id, ids, (self.logprob,) * len(ids), finished=True)


def png(colour, size=(40, 30)) -> bytes:
    stream = BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def row(number: int = 0, **changes) -> dict:
    base = {
        "id": f"r{number}",
        "image": f"images/{number}.png",
        "question": f"What is {number}?",
        "answer": str(number),
    }
    return base | changes
