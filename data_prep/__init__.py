"""From published sets to rows worth training on: ``vt-trl prepare STEP`` or ``python -m data_prep.STEP``.

A step has ``parser()``, an argparse parser without slow imports, and ``run(options)``, which returns the exit status
or None. Rows: :mod:`vt_trl.rows`; how they are written: :mod:`data_prep.shards`; for users: ``docs/data.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from vt_trl.commands import Command

STEPS: dict[str, Command] = {
    "check": Command("every bad row with every reason, set aside, none lost", "data_prep.check"),
    "difficulty": Command("how hard each row is for a model, in bands, and what has moved", "data_prep.difficulty"),
    "distill": Command("seed traces by a captioner and a reasoner, for vt-trl sft", "data_prep.distill"),
    "filter": Command(
        "keep unique answers, one row of each, balanced, neither too easy nor too hard", "data_prep.filter"
    ),
    "import": Command("a published set, or files of your own, in the columns of rows", "data_prep.import"),
    "select": Command("rows that need the full picture, and rows for which low is enough", "data_prep.select"),
    "traces": Command("cold-start traces, written by a strong model, for vt-trl sft", "data_prep.traces"),
    "vlir": Command("rationales with looks, in VLIR's layout, as traces for vt-trl sft", "data_prep.vlir"),
}


def main(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int | None]) -> None:
    """Run one step as a program of its own: ``python -m data_prep.STEP``."""
    from vt_trl.cli import explained

    sys.exit(explained(lambda: run(parser.parse_args())))
