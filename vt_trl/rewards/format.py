"""The format reward: 1 when every turn of the episode is well-formed, else 0 (VisionThink weighs it 0.5)."""

from __future__ import annotations

from typing import Any

from vt_trl.envs.reply import parse_reply
from vt_trl.types import Rollout


def format_reward(
    completions: list[list[dict[str, Any]]], rollout: list[Rollout] | None = None, **columns: Any
) -> list[float]:
    """One score in {0, 1} per completion.

    With vt_trl's trainer the environment's own verdict is used (``rollout``). With stock TRL the assistant turns are
    parsed: all but the last must be a clean call, the last a clean answer.
    """
    if rollout is not None:
        return [float(one.well_formed) for one in rollout]
    return [float(_well_formed(messages)) for messages in completions]


def _well_formed(messages: list[dict[str, Any]]) -> bool:
    replies = [parse_reply(str(message["content"])) for message in messages if message["role"] == "assistant"]
    clean = bool(replies) and not any(reply.faults for reply in replies)
    return clean and all(reply.call for reply in replies[:-1]) and replies[-1].answer is not None
