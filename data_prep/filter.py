"""``vt-trl prepare filter DIR --out DIR``: keep rows worth training on; count what is dropped by reason and source."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from data_prep import main
from vt_trl.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vt-trl prepare filter", description="Keep the rows worth training on.")
    parser.add_argument("source", metavar="DIR", help="rows: a prepared or saved set, Parquet, or tables and pictures")
    parser.add_argument("--out", required=True, help="folder for the rows, dropped.jsonl and report.json")
    parser.add_argument("--unique", action="store_true", help="drop questions without one short answer, by rules")
    parser.add_argument("--max-answer-words", type=int, default=12, help="longest answer that counts as short")
    parser.add_argument("--judge", metavar="MODEL", help="ask a model at an OpenAI-compatible endpoint about the rest")
    parser.add_argument(
        "--judge-args", default="{}", help="its settings as JSON (docs/judges.md): '{\"base_url\": ...}'"
    )
    parser.add_argument("--dedupe", action="store_true", help="drop the same question about the same picture")
    parser.add_argument("--pass-rate", metavar="COLUMN[/N]", help="drop what is always right or never, by this column")
    parser.add_argument("--min-pass", type=float, default=0.0, help="rates up to this are too hard")
    parser.add_argument("--max-pass", type=float, default=1.0, help="rates from this on are too easy")
    parser.add_argument("--max-per-source", type=int, help="most rows of one data_source")
    parser.add_argument("--max-share", type=float, help="largest share of one data_source among what is kept")
    parser.add_argument("--seed", type=int, default=0, help="of the choice among the rows of a source")
    parser.add_argument("--split", help="of a source with several")
    parser.add_argument("--files", help="pattern inside the source")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 0: none but this one")
    return parser


def run(options: argparse.Namespace) -> None:
    from data_prep.filtering import DROPPED, Filters, filter_set
    from data_prep.finding import find

    try:
        settings = json.loads(options.judge_args)
    except ValueError as error:
        raise ConfigError(f"--judge-args is no JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ConfigError("--judge-args must be a JSON object of settings.")
    filters = Filters(
        unique=options.unique,
        judge=options.judge,
        judge_args=settings,
        max_words=options.max_answer_words,
        dedupe=options.dedupe,
        pass_rate=options.pass_rate,
        min_pass=options.min_pass,
        max_pass=options.max_pass,
        max_per_source=options.max_per_source,
        max_share=options.max_share,
        seed=options.seed,
    )
    found = find(options.source, options.split, options.files)
    manifest = filter_set(found, Path(options.out), filters, workers=options.workers)
    report = report_of(manifest)
    (Path(options.out) / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _show(report)
    print(f"dropped rows: {Path(options.out) / DROPPED}")


def report_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Counts of a filtered set: ``{all, kept, dropped: {reason: count}, sources: {source: {fate: count}}}``."""
    from data_prep.units import totals

    sources: dict[str, Counter[str]] = {}
    for name, count in totals(manifest).items():
        source, tab, fate = name.rpartition("\t")
        if tab:
            sources.setdefault(source, Counter())[fate] += count
    fates = sum(sources.values(), Counter())
    kept = fates.pop("kept", 0)
    return {
        "all": kept + fates.total(),
        "kept": kept,
        "dropped": dict(fates.most_common()),
        "sources": {source: dict(counts) for source, counts in sorted(sources.items())},
    }


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{report['kept']} of {report['all']} rows kept")
    reasons = list(report["dropped"])
    for name in ("source", "kept", *reasons):
        table.add_column(escape(name), justify="left" if name == "source" else "right")
    for source, counts in report["sources"].items():
        table.add_row(escape(source), *(str(counts.get(fate, 0)) for fate in ("kept", *reasons)))
    table.add_row("all", str(report["kept"]), *(str(report["dropped"][fate]) for fate in reasons), style="bold")
    Console().print(table)


if __name__ == "__main__":
    main(parser(), run)
