"""Tables in Markdown pages, made from committed result files and put between two markers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def span(values: Sequence[float]) -> str:
    """Least and most of the seeds, ``0.97-0.99``, or the one figure that they share."""
    low, high = min(values), max(values)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}-{high:.2f}"


def made_on(report: Mapping[str, Any]) -> str:
    """Machine, versions and date of a report, for the line below its table."""
    versions = ", ".join(f"{name} {report['versions'][name]}" for name in ("torch", "transformers", "trl"))
    return f"{report['machine']}; {versions}; {report['date']}"


def put_between(text: str, start: str, end: str, table: str) -> str:
    """``text`` with what stands between two markers replaced. Raises ValueError when they are not there."""
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"The text has no pair of markers {start} and {end}.")
    return f"{before}{start}\n{table}\n{end}{after}"


def table_parser(name: str, about: str) -> argparse.ArgumentParser:
    """``python -m NAME [--write PAGE]``."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=about)
    parser.add_argument("--write", type=Path, help="a file whose table to replace; otherwise it is printed")
    return parser


def show_table(page: Path | None, table: str, start: str, end: str) -> None:
    """Print a table, or put it into a page."""
    if page is None:
        print(table)
    else:
        text = page.read_text(encoding="utf-8")
        page.write_text(put_between(text, start, end, table), encoding="utf-8")
