"""Which rows of a set are worth training on: difficulty, unique answers, no duplicates, balanced sources.

The filters run in that order, and a row is dropped for the first that applies, so that counts add up. The first pass
reads every row once and keeps its texts (some 100 bytes per row); the second writes kept and dropped rows apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.finding import Found
from data_prep.hashes import pixel_hash, text_hash
from data_prep.importing import UNIT_ROWS, Reader, reader_of, set_aside
from data_prep.likeness import cap_for_share, duplicates, over_cap
from data_prep.reading import Unit, open_table
from data_prep.shards import UnitWriter
from data_prep.uniqueness import MAX_WORDS, ask_all, open_question, unique_answer
from data_prep.units import in_order, results, run_units
from vt_trl.errors import ConfigError
from vt_trl.judges.base import Verdict
from vt_trl.rows import examine

DROPPED = "dropped.jsonl"


def rate_column(text: str) -> tuple[str, float]:
    """Column of a pass rate and what to divide it by: ``COLUMN``, or ``COLUMN/N`` for a count of N."""
    name, _, of = text.partition("/")
    if not name or (of and not (of.isdigit() and int(of) > 0)):
        raise ConfigError(f"--pass-rate is {text!r}; write COLUMN, or COLUMN/N for a count of N.")
    return name, float(of or 1)


def rate_of(value: Any, divisor: float) -> float | None:
    """A pass rate from 0 to 1, or None for a value that is none."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value / divisor <= 1
    return value / divisor if good else None


@dataclass(frozen=True)
class Filters:
    """Which filters run, and their settings.

    Args:
        unique: drop questions without one short answer, by rules.
        judge: a model that is asked about what the rules leave; ``judge_args`` are those of the openai judge.
        max_words: longest answer that counts as short.
        dedupe: drop a row whose picture has an earlier row with the same question.
        bands: keep rows of these bands only, as `prepare difficulty` writes them into the column ``band``.
        pass_rate: column with a share of right answers, or ``column/N`` with how many of N were right.
        min_pass, max_pass: kept are rates between the two, both excluded: by default neither 0 nor 1.
        max_per_source, max_share: most rows of one source, and its largest share of what is kept.
        seed: of the choice among the rows of a source.
    """

    unique: bool = False
    judge: str | None = None
    judge_args: Mapping[str, Any] = field(default_factory=dict)
    max_words: int = MAX_WORDS
    dedupe: bool = False
    bands: tuple[str, ...] = ()
    pass_rate: str | None = None
    min_pass: float = 0.0
    max_pass: float = 1.0
    max_per_source: int | None = None
    max_share: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        chosen = (self.unique, self.judge, self.dedupe, self.bands, self.pass_rate)
        if not any((*chosen, self.max_per_source, self.max_share)):
            raise ConfigError(
                "no filter is set; choose --unique, --judge, --dedupe, --band, --pass-rate, --max-per-source or "
                "--max-share."
            )
        if self.max_per_source is not None and self.max_per_source < 1:
            raise ConfigError(f"--max-per-source is {self.max_per_source}; it must be 1 or more.")
        if not 0 <= self.min_pass < self.max_pass <= 1:
            raise ConfigError(f"--min-pass {self.min_pass} and --max-pass {self.max_pass} leave nothing between them.")

    def fingerprint(self) -> dict[str, Any]:
        """All settings; of the model's endpoint only a hash, since an address can hold a password."""
        settings = {name: value for name, value in asdict(self).items() if name != "judge_args"}
        return settings | {"judge": self.judge and unique_answer(self.judge, self.judge_args).fingerprint()}

    def rate(self) -> tuple[str, float] | None:
        """Column of the pass rate and what to divide it by."""
        return None if self.pass_rate is None else rate_column(self.pass_rate)


@dataclass(frozen=True)
class Looked:
    """What the first pass keeps of a unit of R rows; ``reasons`` by row number for those that are out already."""

    order: np.ndarray  # (R,) uint64: hash of seed and id
    pixels: np.ndarray  # (R,) uint64
    sources: list[str]
    questions: pa.Array
    answers: pa.Array
    reasons: dict[int, str]


def filter_set(
    found: Found, out: Path, filters: Filters, *, workers: int = 0, unit_rows: int = UNIT_ROWS
) -> dict[str, Any]:
    """Write what passes to ``out`` and the rest, with one reason each, to ``out/dropped.jsonl``; returns the manifest.

    Raises ConfigError for settings that cannot work, DataError for a source that cannot be read, JudgeOutage.
    """
    made_of = {
        "step": "filter",
        "files": found.fingerprint(),
        "filters": filters.fingerprint(),
        "unit_rows": unit_rows,
    }

    def plan(folder: Path) -> list[tuple[Unit, Reader, Mapping[int, str]]]:
        table = open_table(found.files, unit_rows, folder)
        reader = reader_of(table, found)
        rate = filters.rate()
        if rate and rate[0] not in reader.extras:
            raise ConfigError(f"--pass-rate: there is no column {rate[0]!r}, only {sorted(reader.features)}.")
        if filters.bands and "band" not in reader.extras:
            raise ConfigError("--band: there is no column 'band'; `vt-trl prepare difficulty` writes it.")
        looked = in_order(results(partial(_look, reader, filters), table.units, workers), len(table.units))
        dropped = _decide(looked, filters)
        spans = [range(unit[0].start, unit[-1].start + unit[-1].rows) for unit in table.units]
        mine = [{number: dropped[number] for number in span if number in dropped} for span in spans]
        return [(unit, reader, reasons) for unit, reasons in zip(table.units, mine, strict=True)]

    return run_units(out, plan, _write, made_of=made_of, workers=workers, title="filter", keep=[DROPPED])


def _look(reader: Reader, filters: Filters, unit: Unit) -> Looked:
    order, pixels, sources, questions, answers, reasons = [], [], [], [], [], {}
    for number, _, row in reader.rows(unit):
        found = examine(row, decode=filters.dedupe)
        reason = f"bad row: {'; '.join(found.reasons)}" if found.reasons else _alone(row, filters)
        if reason:
            reasons[number] = reason
        order.append(text_hash(f"{filters.seed}:{row['id']}"))
        pixels.append(pixel_hash(found.picture) if found.picture else 0)
        sources.append(row["data_source"])
        questions.append(row["question"])
        answers.append(row["answer"])
    texts = pa.array(questions, pa.string()), pa.array(answers, pa.list_(pa.string()))
    return Looked(np.array(order, np.uint64), np.array(pixels, np.uint64), sources, *texts, reasons)


def _alone(row: Mapping[str, Any], filters: Filters) -> str | None:
    """Why a row is out by itself: too easy, too hard, or without a unique answer."""
    rate = filters.rate()
    if rate:
        share = rate_of(row[rate[0]], rate[1])
        if share is None:
            return f"no pass rate: {rate[0]} is {row[rate[0]]!r}"
        if share <= filters.min_pass:
            return f"too hard: pass rate {share:.3g}"
        if share >= filters.max_pass:
            return f"too easy: pass rate {share:.3g}"
    if filters.bands and row["band"] not in filters.bands:
        return f"other band: {row['band']}" if row["band"] else "no band"
    why = open_question(row, filters.max_words) if filters.unique or filters.judge else None
    return f"no unique answer, by rule: {why}" if why else None


def _decide(looked: Sequence[Looked], filters: Filters) -> dict[int, str]:
    """The reason of every row that is dropped, those of the first pass included."""
    dropped = {number: reason for part in looked for number, reason in part.reasons.items()}
    sources = [source for part in looked for source in part.sources]
    questions = pa.chunked_array([part.questions for part in looked])
    answers = pa.chunked_array([part.answers for part in looked])
    alive = np.ones(len(sources), bool)

    def drop(more: Mapping[int, str]) -> None:
        dropped.update(more)
        alive[list(more)] = False

    drop(dict(dropped))
    if filters.dedupe:
        pixels = np.concatenate([part.pixels for part in looked])
        drop(duplicates(pixels, lambda n: questions[n].as_py(), lambda n: answers[n].as_py(), alive))
    if filters.judge:
        left = np.flatnonzero(alive).tolist()
        asked = [(questions[number].as_py(), answers[number].as_py()) for number in left]
        judgements = ask_all(unique_answer(filters.judge, filters.judge_args), asked)
        words = {Verdict.WRONG: "no unique answer, by model", Verdict.FAILED: "the model gave no verdict"}
        verdicts = [(number, one) for number, one in zip(left, judgements, strict=True) if one.verdict in words]
        drop({number: f"{words[one.verdict]}: {one.detail}".rstrip(": ") for number, one in verdicts})
    order = np.concatenate([part.order for part in looked])
    if filters.max_per_source:
        over = over_cap(sources, order, alive, filters.max_per_source)
        drop(dict.fromkeys(over, f"over the cap: {filters.max_per_source} rows per source"))
    if filters.max_share:
        counts = Counter(sources[number] for number in np.flatnonzero(alive).tolist())
        over = over_cap(sources, order, alive, cap_for_share(counts, filters.max_share))
        drop(dict.fromkeys(over, f"over the share: {filters.max_share} of all rows per source"))
    return dropped


def _write(job: tuple[Unit, Reader, Mapping[int, str]], writer: UnitWriter) -> None:
    unit, reader, dropped = job
    writer.features = reader.features
    for number, record, row in reader.rows(unit):
        reason = dropped.get(number)
        fate = "kept" if reason is None else reason.split(":")[0]
        writer.counts[f"{row['data_source']}\t{fate}"] += 1
        if reason is None:
            writer.add(row)
        else:
            set_aside(writer, DROPPED, number, record, row, [reason])
