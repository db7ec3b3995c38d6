"""An answer in OpenAI's shapes. What OpenAI has no field for stands under ``vt_trl``."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from vt_trl.types import Rollout, RolloutStatus, Turn

_CUT = (RolloutStatus.TRUNCATED, RolloutStatus.CONTEXT_LIMIT)


@dataclass(frozen=True)
class Answer:
    """A finished episode and what it took.

    ``prompt_tokens``: all that the model read and had not written, each token once, visual ones included;
    ``completion_tokens``: all that it wrote, in every turn.
    """

    rollout: Rollout
    prompt_tokens: int
    completion_tokens: int

    @property
    def text(self) -> str:
        """The answer; when there is none, the last turn as it was written."""
        return self.rollout.turns[-1].text if self.rollout.answer is None else self.rollout.answer

    @property
    def finish_reason(self) -> str:
        return "length" if self.rollout.status in _CUT else "stop"

    @property
    def usage(self) -> dict[str, Any]:
        rollout = self.rollout
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "vt_trl": {
                "visual_tokens": rollout.visual_tokens,
                "asked": rollout.asked,
                "turns": len(rollout.turns),
                "status": rollout.status.value,
            },
        }


def turn_json(turn: Turn) -> dict[str, Any]:
    """A turn: ``token_ids`` as sampled, empty when another server sampled them."""
    return {
        "text": turn.text,
        "token_ids": list(turn.token_ids),
        "finished": turn.finished,
        "faults": [fault.value for fault in turn.faults],
    }


@dataclass(frozen=True)
class Replies:
    """The replies to one request: one completion, or the chunks of a stream."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, answer: Answer, turns: bool) -> dict[str, Any]:
        """``chat.completion``; with ``turns`` the turns under ``vt_trl``."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
        reply = self._head("chat.completion") | {"choices": [choice], "usage": answer.usage}
        return reply | ({"vt_trl": {"turns": [turn_json(turn) for turn in answer.rollout.turns]}} if turns else {})

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None, turn: Turn | None = None) -> bytes:
        """``chat.completion.chunk`` as an event; with ``turn`` that turn under ``vt_trl``."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        extra = {} if turn is None else {"vt_trl": {"turn": turn_json(turn)}}
        return event(self._head("chat.completion.chunk") | {"choices": [choice]} | extra)

    def usage_chunk(self, answer: Answer) -> bytes:
        return event(self._head("chat.completion.chunk") | {"choices": [], "usage": answer.usage})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(value)}\n\n".encode()
