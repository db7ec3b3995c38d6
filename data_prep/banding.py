"""Rows with their difficulty and band, and the report of a round: bands by source, and what has moved."""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Features, Value

from data_prep.bands import NAMES, Measured, Ruler, drift
from data_prep.fates import counted
from data_prep.shards import UnitWriter
from data_prep.speaking import Prices, spent
from data_prep.units import run_units
from data_prep.work import picture_bytes
from vt_trl.commands.options import json_option
from vt_trl.data import load_rows
from vt_trl.errors import DataError
from vt_trl.rows import FEATURES
from vt_trl.sources import EMBEDDED

if TYPE_CHECKING:
    from datasets import Dataset

REPORT, REJECTED = "report.json", "rejected.jsonl"
COLUMNS = {"difficulty": "float64", "band": "string", "pass_rate": "float64", "rating": "float64"}


@dataclass(frozen=True)
class Round:
    """An earlier round: measures and band of each row by id, and its ruler where the report still has it."""

    rows: dict[str, tuple[Measured, str | None]]
    ruler: Ruler | None


def earlier_round(folder: Path) -> Round:
    """What an earlier run wrote. Raises DataError for a folder that is none."""
    rows = load_rows(str(folder))
    missing = sorted(set(COLUMNS) - set(rows.column_names))
    if missing:
        raise DataError(
            f"--before {folder} has no column {missing[0]!r}; name a folder of `vt-trl prepare difficulty`"
        )
    known = {
        row["id"]: (Measured(row["pass_rate"], row["rating"]), row["band"])
        for row in rows.select_columns(["id", *COLUMNS]).to_list()
    }
    try:
        ruler = Ruler.read(json.loads((folder / REPORT).read_text(encoding="utf-8"))["ruler"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # rows alone can be compared, too
        ruler = None
    return Round(known, ruler)


def write_rows(
    options: argparse.Namespace,
    dataset: Dataset,
    measured: Sequence[Measured],
    ruler: Ruler,
    made_of: Mapping[str, Any],
) -> None:
    """All rows with their difficulty; one whose picture cannot be read goes to ``rejected.jsonl``."""
    rows = dataset.cast_column("image", EMBEDDED)
    features = Features({**FEATURES, **rows.features, **FEATURES, **{name: Value(t) for name, t in COLUMNS.items()}})
    for name in ("image_error", "images"):
        features.pop(name, None)

    def work(unit: Sequence[int], writer: UnitWriter) -> None:
        for number in unit:
            row, one = rows[number], measured[number]
            error = row.get("image_error") or (one.reason if one.reason.startswith("bad row") else "")
            if error:
                writer.counts[counted("row", row, "bad_row")] += 1
                writer.note(REJECTED, {"number": number, "id": row["id"], "reason": "bad_row", "detail": error})
                continue
            difficulty = ruler.difficulty(one)
            found = {"difficulty": difficulty, "band": ruler.band(difficulty)}
            found |= {"pass_rate": one.pass_rate, "rating": one.rating}
            kept = {name: value for name, value in row.items() if name in features}
            writer.add({**kept, "image": picture_bytes(row["image"]), **found})
            writer.counts[counted("row", row, "kept")] += 1

    size = options.unit_rows
    units = [range(at, min(at + size, len(rows))) for at in range(0, len(rows), size)]
    run_units(options.out, units, work, made_of=made_of, features=features, title="rows written", keep=(REJECTED,))


def make_report(
    options: argparse.Namespace,
    dataset: Dataset,
    measured: Sequence[Measured],
    ruler: Ruler,
    counts: Counter[str],
    before: Round | None,
) -> dict[str, Any]:
    """Numbers of a round: bands by source, undecided rows by reason, means, and the drift since ``before``."""
    bands = [ruler.band(ruler.difficulty(one)) for one in measured]
    sources: dict[str, Counter[str]] = {}
    for source, band in zip(dataset["data_source"], bands, strict=True):
        sources.setdefault(source or "", Counter())[band or "undecided"] += 1
    reasons = [one.reason.partition(":")[0] for one, band in zip(measured, bands, strict=True) if band is None]
    found: dict[str, Any] = {
        "rows": len(measured),
        "bands": {name: bands.count(name) for name in NAMES[3]},
        "undecided": dict(Counter(reasons).most_common()),
        "sources": {source: dict(found) for source, found in sorted(sources.items())},
        "mean": {name: _mean([getattr(one, name) for one in measured]) for name in ("pass_rate", "rating")},
        "ruler": ruler.as_dict(),
    }
    if options.rater_model:
        prices = Prices.of(json_option(options.rater_args, "--rater-args").get("prices"), "--rater-args")
        found["spent"] = {"rater": spent(counts, "rater", options.rater_model, prices)}
    if before is not None:
        now = {id: (one, band) for id, one, band in zip(dataset["id"], measured, bands, strict=True)}
        found["drift"] = {"before": options.before.name} | drift(before.rows, now, before.ruler)
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [one for one in values if one is not None]
    return statistics.fmean(known) if known else None


def show(report: Mapping[str, Any]) -> None:
    """Bands by source, and the table of transitions."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(stderr=True)
    names = [*NAMES[3], "undecided"]
    table = Table("source", *names, title=f"{report['rows']} rows by band")
    for source, found in report["sources"].items():
        table.add_row(escape(source), *(str(found.get(name, 0)) for name in names))
    console.print(table)
    moved = report.get("drift")
    if moved:
        bands = list(moved["transitions"])
        table = Table("before \\ now", *bands, title=f"{moved['rows']} rows of both rounds")
        for one in bands:
            table.add_row(one, *(str(moved["transitions"][one][other]) for other in bands))
        console.print(table)
        for name, shift in moved["mean_shift"].items():
            if shift is not None:
                console.print(f"mean {name}: {shift:+.3f} since then")
