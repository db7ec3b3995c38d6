"""How far judges agree: ``vt-trl judge-agreement --rows FILE --judges rule local label``.

``FILE`` holds one JSON object per line: question, answer (one accepted answer or a list), prediction; optionally id,
kind, and ``label`` (right or wrong, by a person), which can be compared like a judge under the name ``label``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vt_trl.errors import ConfigError, DataError
from vt_trl.judges import make_judge, make_judge_reward
from vt_trl.judges.base import Case, Judgement, Verdict

LABEL = "label"
_MODEL_OF = ("openai", "local")  # `openai=gpt-4o-mini` is short for its setting `model`


@dataclass(frozen=True)
class LabelledRow:
    """One prediction to judge, with a person's verdict if there is one."""

    id: str
    kind: str
    case: Case
    label: Verdict | None


@dataclass(frozen=True)
class Pair:
    """Two judges on the rows that both decided. ``kappa`` (Cohen 1960) is None when chance alone explains all."""

    first: str
    second: str
    both: int
    agreement: float | None
    kappa: float | None
    differ: list[int]  # row numbers


def read_rows(path: str | Path) -> list[LabelledRow]:
    """Rows of a JSON-lines file. Raises DataError naming the line that cannot be used."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    rows = [_row(line, number, str(path)) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise DataError(f"{path} holds no rows.")
    return rows


def _row(line: str, number: int, path: str) -> LabelledRow:
    try:
        data = json.loads(line)
        golds = [data["answer"]] if isinstance(data["answer"], str) else list(data["answer"])
        texts = [data["question"], *golds, data["prediction"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}, line {number}: needs question, answer and prediction ({error!r}).") from error
    if not golds or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{path}, line {number}: question, answer and prediction must be texts.")
    label = data.get("label")
    if label not in (None, "right", "wrong"):
        raise DataError(f"{path}, line {number}: label is {label!r}; it must be right or wrong.")
    case = Case.of(data["question"], golds, data["prediction"])
    return LabelledRow(str(data.get("id", number)), str(data.get("kind", "")), case, Verdict(label) if label else None)


def verdicts_of(rows: Sequence[LabelledRow], spec: str, settings: Mapping[str, Any]) -> list[Judgement]:
    """What the judge ``spec`` (``rule``, ``openai=MODEL``, ``module:Class``, ``label``) says of each row."""
    if spec == LABEL:
        missing = [row.id for row in rows if row.label is None]
        if missing:
            raise DataError(f"{len(missing)} rows have no label, the first of them {missing[0]!r}; leave out `label`.")
        return [Judgement(row.label) for row in rows]
    name, _, model = spec.partition("=")
    if model and name not in _MODEL_OF:
        raise ConfigError(f"judge is {spec!r}; only {' and '.join(_MODEL_OF)} take a model after `=`.")
    judge = make_judge(name, {**settings, **({"model": model} if model else {})})
    reward = make_judge_reward(judge, max_failed=1.0)
    try:
        return reward.judgements([row.case for row in rows])
    finally:
        reward.close()


def kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Cohen's kappa of two raters: agreement beyond what their own shares of right would give by chance."""
    if not first:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    p, q = sum(first) / len(first), sum(second) / len(second)
    chance = p * q + (1 - p) * (1 - q)
    return None if chance == 1 else (observed - chance) / (1 - chance)


def compare(first: str, second: str, verdicts: Mapping[str, Sequence[Judgement]]) -> Pair:
    both = [
        (number, a.verdict, b.verdict)
        for number, (a, b) in enumerate(zip(verdicts[first], verdicts[second], strict=True))
        if Verdict.FAILED not in (a.verdict, b.verdict)
    ]
    right = [[one is Verdict.RIGHT for one in side] for side in zip(*((a, b) for _, a, b in both), strict=True)]
    differ = [number for number, a, b in both if a is not b]
    agreement = 1 - len(differ) / len(both) if both else None
    return Pair(first, second, len(both), agreement, kappa(*right) if both else None, differ)


def judge_agreement(
    path: str | Path,
    judges: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    json_file: str | Path | None = None,
    show: int = 40,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compare judges on a file of rows, print tables and return the report (also as ``json_file``).

    ``settings``: by judge name. Raises ConfigError and DataError for what cannot work.
    """
    if len(judges) < 2 or len(set(judges)) < len(judges):
        raise ConfigError(f"judges are {list(judges)}; give two or more different ones.")
    settings = settings or {}
    for name in settings:
        if name not in judges:
            raise ConfigError(f"judge-args has {name!r}, which is not among the judges {list(judges)}.")
    rows = read_rows(path)
    verdicts = {spec: verdicts_of(rows, spec, settings.get(spec, {})) for spec in judges}
    pairs = [compare(a, b, verdicts) for a, b in combinations(judges, 2)]
    report = {
        "rows_file": Path(path).name,
        "rows": len(rows),
        "judges": {spec: _counts(found) for spec, found in verdicts.items()},
        "pairs": [_as_json(pair, rows, verdicts) for pair in pairs],
    }
    _print(console or Console(), report, show)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _counts(judgements: Sequence[Judgement]) -> dict[str, Any]:
    counts = Counter(one.verdict.value for one in judgements)
    details = Counter(one.detail for one in judgements if one.verdict is Verdict.FAILED)
    common = details.most_common(1)
    return {verdict.value: counts[verdict.value] for verdict in Verdict} | {
        "coverage": 1 - counts["failed"] / len(judgements),
        "commonest_failure": common[0][0] if common else None,
    }


def _as_json(pair: Pair, rows: Sequence[LabelledRow], verdicts: Mapping[str, Sequence[Judgement]]) -> dict[str, Any]:
    differ = [
        {
            "id": rows[number].id,
            "kind": rows[number].kind,
            "question": rows[number].case.question,
            "answer": list(rows[number].case.golds),
            "prediction": rows[number].case.prediction,
            **{name: verdicts[name][number].verdict.value for name in (pair.first, pair.second)},
        }
        for number in pair.differ
    ]
    return {
        "judges": [pair.first, pair.second],
        "both_decided": pair.both,
        "agreement": pair.agreement,
        "kappa": pair.kappa,
        "differ": differ,
    }


def _print(console: Console, report: Mapping[str, Any], show: int) -> None:
    table = Table(title=f"{report['rows']} rows of {report['rows_file']}")
    for column in ("judge", "right", "wrong", "failed", "coverage", "commonest failure"):
        table.add_column(column)
    for name, one in report["judges"].items():
        counts = (str(one[verdict.value]) for verdict in Verdict)
        table.add_row(name, *counts, f"{one['coverage']:.1%}", one["commonest_failure"] or "")
    console.print(table)
    table = Table(title="Where both decided")
    for column in ("judges", "rows", "agreement", "Cohen's kappa", "differ"):
        table.add_column(column)
    for pair in report["pairs"]:
        figures = [("none" if pair[name] is None else f"{pair[name]:.3f}") for name in ("agreement", "kappa")]
        names = " / ".join(pair["judges"])
        table.add_row(names, str(pair["both_decided"]), *figures, str(len(pair["differ"])))
    console.print(table)
    for pair in report["pairs"]:
        _print_differences(console, pair, show)


def _print_differences(console: Console, pair: Mapping[str, Any], show: int) -> None:
    if not pair["differ"] or show < 1:
        return
    first, second = pair["judges"]
    table = Table(title=f"{first} and {second} differ")
    for column in ("id", "question", "answer", "prediction", first, second):
        table.add_column(column, overflow="fold")
    for row in pair["differ"][:show]:
        texts = [_plain(text) for text in (row["question"], " | ".join(row["answer"]), row["prediction"])]
        table.add_row(_plain(row["id"]), *texts, row[first], row[second])
    console.print(table)
    if len(pair["differ"]) > show:
        console.print(f"... and {len(pair['differ']) - show} more; --show N shows more, --json FILE holds all.")


def _plain(text: str) -> str:
    """Text from a file, without what could command the terminal or rich's markup."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:300]))
