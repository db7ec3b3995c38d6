"""``vt-trl prepare filter DIR --out DIR``: keep rows worth training on; count what is dropped by reason and source."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

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
    parser.add_argument("--band", nargs="+", choices=("easy", "medium", "hard"), help="keep rows of these bands")
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
    from data_prep.fates import report_of, show_fates
    from data_prep.filtering import DROPPED, Filters, filter_set
    from data_prep.finding import find
    from data_prep.units import totals

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
        bands=tuple(options.band or ()),
        pass_rate=options.pass_rate,
        min_pass=options.min_pass,
        max_pass=options.max_pass,
        max_per_source=options.max_per_source,
        max_share=options.max_share,
        seed=options.seed,
    )
    found = find(options.source, options.split, options.files)
    manifest = filter_set(found, Path(options.out), filters, workers=options.workers)
    report = report_of(totals(manifest))
    (Path(options.out) / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show_fates(report)
    print(f"dropped rows: {Path(options.out) / DROPPED}")


if __name__ == "__main__":
    main(parser(), run)
