"""Cheap judge first: what it leaves open goes to the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from vt_trl.judges.base import Case, Judge, Judgement, Verdict


class CascadeJudge(Judge):
    """Asks ``first`` (a rule) and hands every case it could not decide to ``second`` (an LLM)."""

    name = "cascade"

    def __init__(self, first: Judge, second: Judge):
        self.first, self.second = first, second
        self.remote = first.remote or second.remote
        self._counts: Counter[str] = Counter()

    def open(self) -> None:
        self.first.open()
        self.second.open()

    def fingerprint(self) -> dict[str, Any]:
        return {"name": self.name, "first": self.first.fingerprint(), "second": self.second.fingerprint()}

    def counts(self) -> Counter[str]:
        """``by_rule``: cases that never reached the second judge."""
        return self._counts + self.first.counts() + self.second.counts()

    async def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        judgements = await self.first.judge(cases)
        left = [index for index, one in enumerate(judgements) if one.verdict is Verdict.FAILED]
        self._counts["by_rule"] += len(cases) - len(left)
        second = await self.second.judge([cases[index] for index in left]) if left else []
        for index, judgement in zip(left, second, strict=True):
            judgements[index] = judgement
        return judgements

    async def close(self) -> None:
        await self.first.close()
        await self.second.close()
