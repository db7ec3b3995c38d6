"""``vt-trl compare A B [--policies P Q] [--models M N] [--common] [--json FILE]``"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vt-trl compare", description="Paired differences of two evaluations.")
    parser.add_argument("first", help="a folder of vt-trl evaluate")
    parser.add_argument("second", help="another one, or the same with --policies or --models")
    parser.add_argument("--policies", nargs=2, default=(), metavar=("FIRST", "SECOND"))
    parser.add_argument("--models", nargs=2, default=(), metavar=("FIRST", "SECOND"))
    parser.add_argument("--common", action="store_true", help="compare the rows that both have, and count the others")
    parser.add_argument("--json", default=None, help="write the numbers to this file, too")
    return parser


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from vt_trl.evaluation.compare import compare, print_comparison

    pairs = compare(options.first, options.second, options.policies, options.models, options.common)
    print_comparison(pairs)
    if options.json:
        Path(options.json).write_text(json.dumps(pairs, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
