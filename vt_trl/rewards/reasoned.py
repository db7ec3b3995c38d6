"""A right answer earns this only with reasoning in front of it (OpenVLThinker, arXiv 2503.17352).

Weighed 0.5 next to an accuracy of 0.5, as in the preset ``openvlthinker``: right 1, right without a word of reasoning
0.5, wrong 0. Accuracy stays a reward of its own, so a judge can decide it and it is logged as what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vt_trl.rewards.region import only_when_right, reasoning


@only_when_right
def reasoned_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1.0 for a right answer with something between the think tags or between them and the answer, else 0.0."""
    return [float(any(reasoning(_before_answers(messages)))) for messages in completions]


def _before_answers(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, each without its answer and what follows."""
    return [{**one, "content": str(one["content"]).partition("<answer>")[0]} for one in messages]
