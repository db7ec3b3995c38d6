"""What every judge speaks: a case goes in, a judgement comes out, and "could not tell" is not "wrong".

A judge of your own is one class with one method, named in a recipe as ``judge: my_module:MyJudge``::

    class Contains(Judge):
        async def judge(self, cases):
            return [Judgement.of(case.golds[0] in case.prediction) for case in cases]
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any


class Verdict(StrEnum):
    """What a judge says. ``FAILED`` (outage, refusal, unreadable reply, no rule fits) is never a score."""

    RIGHT = "right"
    WRONG = "wrong"
    FAILED = "failed"


@dataclass(frozen=True)
class Judgement:
    """A verdict; ``detail`` says why it failed or how it was found, for logs only, free of keys."""

    verdict: Verdict
    detail: str = ""

    @classmethod
    def of(cls, right: bool, detail: str = "") -> Judgement:
        return cls(Verdict.RIGHT if right else Verdict.WRONG, detail)

    @classmethod
    def failed(cls, detail: str) -> Judgement:
        return cls(Verdict.FAILED, detail)

    @property
    def score(self) -> float | None:
        """1.0, 0.0, or None for FAILED, which drops the whole group."""
        return {Verdict.RIGHT: 1.0, Verdict.WRONG: 0.0}.get(self.verdict)


@dataclass(frozen=True)
class Case:
    """One prediction to judge: a question, the accepted answers (one or more) and the policy's answer.

    All three are untrusted text. ``Case.of`` gives texts that differ only in spacing or Unicode composition the same
    form, so that they are asked about once.
    """

    question: str
    golds: tuple[str, ...]
    prediction: str

    @classmethod
    def of(cls, question: str, golds: str | Iterable[str], prediction: str) -> Case:
        accepted = [golds] if isinstance(golds, str) else golds
        return cls(_plain(question), tuple(_plain(gold) for gold in accepted), _plain(prediction))

    @cached_property
    def key(self) -> str:
        """A hash of the three texts, the same on every machine (32 hex digits)."""
        text = json.dumps([self.question, self.golds, self.prediction])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _plain(text: str) -> str:
    """One form for texts that look alike: composed characters, single spaces. Case and signs keep their meaning.

    A lone surrogate, which JSON can smuggle in and no encoder takes, becomes a question mark.
    """
    return " ".join(unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode()).split())


class Judge(ABC):
    """Decides whether predictions are right.

    ``judge`` gets distinct cases and returns one judgement each, in their order. It never raises for what a case
    holds or for a server that is down: that is ``FAILED``, with the last error as detail. ``ConfigError`` for settings
    that cannot work belongs into ``__init__``.
    """

    name: str = "judge"
    remote: bool = False  # waits on a network, not on this machine: scoring may start while the policy generates

    def open(self) -> None:  # noqa: B027 - most judges have nothing to load
        """Load or connect. Called before the first ``judge``; raises ConfigError when that cannot work."""

    @abstractmethod
    async def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        """Judge distinct cases."""

    def fingerprint(self) -> dict[str, Any]:
        """Everything but the case that a verdict depends on (JSON values): part of the key of the cache."""
        return {"name": self.name}

    @property
    def cached(self) -> bool:
        """Whether verdicts are worth keeping on disk."""
        return True

    def counts(self) -> Counter[str]:
        """Running totals worth logging, such as ``requests`` and ``retries``."""
        return Counter()

    async def close(self) -> None:  # noqa: B027 - most judges have nothing to close
        """Give back connections and memory."""
