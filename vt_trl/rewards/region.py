"""Rewards for looking: a crop was really made, the reasoning has some length, the crop is where the answer stands.

Numbers of two versions: VLM-R3 as published (arXiv 2505.16192) and as its code was released. What counts as a crop is
the environment's word (``Rollout.regions``), not a text that looks like a box.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from vt_trl.boxes import overlap
from vt_trl.envs.inline import without_boxes
from vt_trl.rewards.accuracy import accuracy_reward
from vt_trl.types import Rollout

PER_BOX, MOST_FOR_BOXES = 0.5, 0.5

_MOVE = re.compile(r"<(answer|tool_call)>.*?(?:</\1>|\Z)", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer|tool_call)>")


def only_when_right(reward: Callable[..., list[float]]) -> Callable[..., list[float]]:
    """A reward that only right answers earn.

    By itself it asks the rule of :func:`accuracy_reward`, or takes ``correct``, a bool per completion. The trainer
    takes the inner function (``.ungated``) and lets its own correctness reward decide, a judge for instance.
    """

    @functools.wraps(reward)
    def gated(completions: Sequence[Any], correct: Sequence[bool] | None = None, **columns: Any) -> list[float]:
        if correct is None:
            correct = [score > 0.5 for score in accuracy_reward(completions, **columns)]
        scores = reward(completions, **columns)
        return [score if right else 0.0 for score, right in zip(scores, correct, strict=True)]

    reward.only_when_right = True
    gated.ungated = reward
    return gated


@only_when_right
def region_reward(completions: Sequence[Any], rollout: Sequence[Rollout], **columns: Any) -> list[float]:
    """0.5 per crop that was made and shown, at most 0.5, for a right answer. The same part twice counts once."""
    return [min(MOST_FOR_BOXES, PER_BOX * len(set(one.regions))) for one in rollout]


def iou_reward(
    completions: Sequence[Any],
    rollout: Sequence[Rollout],
    region: Sequence[Sequence[float] | None] | None = None,
    **columns: Any,
) -> list[float]:
    """Intersection over union of the best crop with the row's gold ``region``, from 0 to 1.

    0.0 for rows without a region, where it says nothing. The gold region is one of the row's first picture.
    """
    golds = region if region is not None else [None] * len(rollout)
    return [
        max((overlap(crop.box, tuple(gold)) for crop in one.regions if crop.picture == 0), default=0.0)
        if gold is not None and len(gold)
        else 0.0
        for one, gold in zip(rollout, golds, strict=True)
    ]


def length_reward_paper(completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.001 per character of reasoning, at most 0.25 (VLM-R3 as published)."""
    return [min(0.25, 0.001 * sum(map(len, reasoning(messages)))) for messages in completions]


def length_reward_released(completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.01 per character of the shortest segment of reasoning, at most 0.10 (VLM-R3's released code)."""
    return [min(0.10, 0.01 * min(map(len, reasoning(messages)), default=0)) for messages in completions]


def reasoning(messages: Sequence[dict[str, Any]]) -> list[str]:
    """The reasoning of each reply: its text without answer, call, boxes, tags, and space around it."""
    found = []
    for message in messages:
        if message["role"] == "assistant":
            found.append(without_boxes(_TAG.sub("", _MOVE.sub("", str(message["content"])))).strip())
    return found
