"""Fixed policies to measure a learned one against, as environments: the full picture for all rows, or for a share.

``always-full`` and ``always-low`` are :class:`~vt_trl.envs.resize.DirectEnv`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from vt_trl.envs.base import message
from vt_trl.envs.resize import DirectEnv, ResizeEnv
from vt_trl.errors import ConfigError
from vt_trl.types import Observation


class AlwaysAskEnv(ResizeEnv):
    """The dialogue of ``ResizeEnv`` with its first turn already taken: the call for the full picture has been made.

    What asking costs and brings when nothing decides about it. The call counts as asked and granted.
    """

    def reset(self, row: Mapping[str, Any]) -> Observation:
        opening = super().reset(row)
        if not self.all_views:
            return opening
        call = json.dumps({"name": self.tool_name, "arguments": self.tool_arguments})
        said = f"<think>It is too small to read.</think><tool_call>{call}</tool_call>"
        shown = self.step(said)
        messages = (*opening.messages, message("assistant", said), *shown.messages)
        return Observation(messages, called=True, granted=True)

    def gold_replies(self, row: Mapping[str, Any]) -> list[list[str]]:
        return super().gold_replies(row)[:1]


class ShareEnv(DirectEnv):
    """One turn; a random ``share`` of the rows is shown in full, the others low.

    Which ones follows from ``seed`` and the row's id alone, so that every run and every model draws the same.
    """

    def __init__(self, share: float, seed: int = 0, prompts: Mapping[str, str] | None = None, **settings: int):
        if not 0 <= share <= 1:
            raise ConfigError(f"share is {share}; it is a share of the rows, from 0 to 1.")
        super().__init__(prompts=prompts, **settings)
        self.share, self.seed = share, seed

    def reset(self, row: Mapping[str, Any]) -> Observation:
        self.resolution = "full" if draw(str(row.get("id", "")), self.seed) < self.share else "low"
        return super().reset(row)


def draw(id: str, seed: int) -> float:
    """A number from 0 to below 1 for a row, the same on every machine and in any order of rows."""
    digest = hashlib.blake2b(f"{seed}:{id}".encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
