"""From tries to traces, the same for every step that writes some: judge, clean, choose, count, report.

A try is an episode that a writer has played. It becomes a trace when it is well-formed, right by the judge, on the
route that its row wants, and fit by the rules of :mod:`data_prep.hygiene`. Every other one is counted by source and
reason and kept in ``rejected.jsonl``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from data_prep.fates import counted
from data_prep.hygiene import Hygiene, clean_replies, trace_print
from data_prep.shards import UnitWriter, earlier_rows
from data_prep.work import picture_bytes
from vt_trl.data import episode_row
from vt_trl.dialogue import replay
from vt_trl.envs import Environment
from vt_trl.errors import DataError, JudgeOutage
from vt_trl.judges import JudgeReward
from vt_trl.judges.base import Judgement, Verdict
from vt_trl.rows import FEATURES
from vt_trl.types import Rollout, RolloutStatus

if TYPE_CHECKING:
    from datasets import Dataset

    from data_prep.rationales import RationaleFilters
    from data_prep.writers import Writer

REJECTED = "rejected.jsonl"
_ENOUGH = 4  # fewer tries say nothing about a share of failures


class WriterOutage(JudgeOutage):
    """Too many traces could not be had from the endpoint. Nothing of the unit was written; run it again."""


@dataclass(frozen=True)
class Try:
    """The ``sample``-th try at a row in a round; ``words`` of reasoning after hygiene, ``removed`` by it."""

    number: int
    attempt: int
    sample: int
    rollout: Rollout
    words: int = 0
    removed: int = 0


@dataclass
class Tracing:
    """What the units of a run share. Called with the numbers of a unit's rows and what writes its traces.

    ``keep``: of several good tries at a row the ``shortest``, or ``all``.
    """

    dataset: Dataset
    writer: Writer
    judge: JudgeReward
    environment: Callable[[], Environment]
    written_by: str
    attempts: int = 1
    samples: int = 1
    keep: str = "shortest"
    max_failed: float = 0.1
    steered: bool = False
    filters: RationaleFilters | None = None
    hygiene: Hygiene | None = None
    _kept: set[str] | None = field(default=None, init=False)  # prints of the traces so far

    def __call__(self, numbers: Sequence[int], out: UnitWriter) -> None:
        """Try the rows of one unit until each has a trace or no try is left."""
        rows = self._rows(numbers, out)
        accepted: dict[int, list[Try]] = {}
        for attempt in range(self.attempts):
            left = [number for number in rows if number not in accepted]
            if left:
                good = self._filtered(self._cleaned(self._right(left, rows, attempt, out), out), out)
                for one in self._chosen(good, out):
                    accepted.setdefault(one.number, []).append(one)
        out.counts.update(self.writer.counts)
        self.writer.counts.clear()
        for number, row in rows.items():
            out.counts[counted("row", row, "kept" if number in accepted else "no_trace")] += 1
            for one in accepted.get(number, []):
                out.add(trace_row(self.dataset[number], one.rollout, self.written_by))
                out.counts[counted("sample", row, "kept")] += 1
                out.counts.update({"words": one.words, "words_cut": one.removed, "traces_cut": one.removed > 0})

    def _rows(self, numbers: Sequence[int], out: UnitWriter) -> dict[int, dict[str, Any]]:
        """The rows that can be played, decoded."""
        rows: dict[int, dict[str, Any]] = {}
        for number in numbers:
            stored = self.dataset[number]
            try:
                decoded = episode_row(stored)
                self.environment().reset(decoded)
                rows[number] = decoded
            except DataError as error:
                out.counts[counted("row", stored, "bad_row")] += 1
                said = {"number": number, "id": stored.get("id"), "gold": stored.get("answer"), "attempt": 0}
                said |= {"sample": 0, "reason": "bad_row", "detail": error.reason, "replies": []}
                out.note(REJECTED, said)
        return rows

    def _right(
        self, left: Sequence[int], rows: Mapping[int, dict[str, Any]], attempt: int, out: UnitWriter
    ) -> list[Try]:
        """A round of tries: those that are well-formed, right and on their route."""
        groups = self.writer.write([rows[number] for number in left], attempt, self.samples)
        tries = [
            (number, sample, one)
            for number, group in zip(left, groups, strict=True)
            for sample, one in enumerate(group)
        ]
        check_outage([one for _, _, one in tries if isinstance(one, str)], len(tries), self.max_failed)
        judged = iter(self.judge.judged([one for _, _, one in tries if not isinstance(one, str)]))
        right = []
        for number, sample, one in tries:
            if isinstance(one, str):
                reject(out, number, rows[number], (attempt, sample), "writer_failed", one)
                continue
            reason = fault_of(one, next(judged), self.steered)
            if reason is None:
                right.append(Try(number, attempt, sample, one))
            else:
                reject(out, number, rows[number], (attempt, sample), reason, one.answer, one)
        return right

    def _cleaned(self, tries: Sequence[Try], out: UnitWriter) -> list[Try]:
        """Those that hygiene lets through, with their reasoning cut."""
        if self.hygiene is None:
            return list(tries)
        fit = []
        for one in tries:
            replies, cleaned = clean_replies(one.rollout, self.hygiene)
            reason, rollout = cleaned.reason, one.rollout
            if reason is None and replies != [turn.text for turn in rollout.turns]:
                try:
                    rollout = replay(self.environment(), one.rollout.row, replies).rollout()
                except DataError:
                    reason = "not_an_episode"
            if reason is None:
                fit.append(replace(one, rollout=rollout, words=cleaned.words, removed=cleaned.removed))
            else:
                self._reject(out, one, reason)
        return fit

    def _filtered(self, tries: Sequence[Try], out: UnitWriter) -> list[Try]:
        """The tries that a model lets through; the others are rejected with the filter's name."""
        if self.filters is None:
            return list(tries)
        reasons = self.filters.reasons([one.rollout for one in tries])
        failures = [str(one) for one in reasons if isinstance(one, Exception)]
        check_outage(failures, len(reasons), self.max_failed, "filters")
        kept = []
        for one, reason in zip(tries, reasons, strict=True):
            if reason is None:
                kept.append(one)
            elif isinstance(reason, Exception):
                self._reject(out, one, "filter_failed", str(reason))
            else:
                self._reject(out, one, reason)
        return kept

    def _chosen(self, tries: Sequence[Try], out: UnitWriter) -> list[Try]:
        """Of the good tries at each row the shortest, or all; a trace that is there already is not one more."""
        chosen: list[Try] = []
        seen: set[int] = set()
        for one in sorted(tries, key=lambda one: (one.number, one.words or _length(one.rollout), one.sample)):
            if self.keep == "shortest" and one.number in seen:
                self._reject(out, one, "not_shortest")
                continue
            if self.hygiene is not None and self.hygiene.dedupe:
                mine = trace_print(one.rollout.row["question"], [turn.text for turn in one.rollout.turns])
                if mine in self._prints(out):
                    self._reject(out, one, "duplicate")
                    continue
                self._prints(out).add(mine)
            seen.add(one.number)
            chosen.append(one)
        return chosen

    def _prints(self, out: UnitWriter) -> set[str]:
        """Prints of all traces so far; those of a run that goes on are read from its shards."""
        if self._kept is None:
            rows = earlier_rows(out, ("question", "replies"))
            self._kept = {trace_print(row["question"], row["replies"]) for row in rows}
        return self._kept

    @staticmethod
    def _reject(out: UnitWriter, one: Try, reason: str, detail: str | None = None) -> None:
        row = one.rollout.row
        reject(out, one.number, row, (one.attempt, one.sample), reason, detail or one.rollout.answer, one.rollout)


def _length(rollout: Rollout) -> int:
    return sum(len(turn.text) for turn in rollout.turns)


def fault_of(rollout: Rollout, judgement: Judgement, steered: bool) -> str | None:
    """Why a try is no trace, or None. Form comes first: a right answer in a wrong form would teach the form."""
    if rollout.faults:
        return f"malformed/{rollout.faults[0]}"
    if rollout.status is not RolloutStatus.ANSWERED:
        return f"status/{rollout.status}"
    if judgement.verdict is not Verdict.RIGHT:
        return "wrong" if judgement.verdict is Verdict.WRONG else "judge_failed"
    wanted = rollout.row.get("needs_full")
    return "wrong_route" if steered and wanted is not None and wanted != rollout.asked else None


def trace_row(stored: Mapping[str, Any], rollout: Rollout, model: str) -> dict[str, Any]:
    """The stored row with what the writer said; columns that rows do not define are left behind."""
    from data_prep.rationales import frame_free

    row = {name: value for name, value in stored.items() if name in FEATURES}
    said = {"replies": [turn.text for turn in rollout.turns], "route": "asked" if rollout.asked else "direct"}
    said |= frame_free(rollout)
    return {**row, "image": picture_bytes(stored["image"]), **said, "written_by": model}


def reject(
    out: UnitWriter,
    number: int,
    row: Mapping[str, Any],
    place: tuple[int, int],
    reason: str,
    detail: str | None,
    rollout: Rollout | None = None,
) -> None:
    """Count a try that is no trace, by source and reason, and keep what was said. ``place``: round and sample."""
    out.counts[counted("sample", row, reason)] += 1
    said = {"number": number, "id": row.get("id"), "gold": row.get("answer"), "attempt": place[0], "sample": place[1]}
    replies = [turn.text for turn in rollout.turns] if rollout else []
    out.note(REJECTED, said | {"reason": reason, "detail": detail, "replies": replies})


def check_outage(failures: Sequence[str], tries: int, most: float, who: str = "writer") -> None:
    """Raise WriterOutage when too large a share of the tries of a round could not be had."""
    if failures and (tries >= _ENOUGH or len(failures) == tries) and len(failures) / tries > most:
        raise WriterOutage(
            f"{len(failures)} of {tries} requests to the {who} failed, more than --max-failed ({most:.0%}) allows. "
            f"The last error: {failures[-1]}. Mend it and run the same command again: finished shards are kept."
        )


def hygiene_report(counts: Counter[str], traces: int) -> dict[str, float | int]:
    """``{traces_cut, words_cut, mean_words}`` of a run's traces."""
    cut = {name: counts.get(name, 0) for name in ("traces_cut", "words_cut")}
    return cut | {"mean_words": counts.get("words", 0) / traces if traces else 0.0}
