"""``vt-trl play RECIPE [--row N] [--pictures FOLDER] [--key value ...]``"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vt-trl play", description="Answer as the policy.", allow_abbrev=False)
    parser.add_argument("recipe", help="a YAML file; `--key value` overrides a line of it")
    parser.add_argument("--row", type=int, default=0, help="number of the row to play, from 0")
    parser.add_argument("--pictures", default=None, help="folder for the pictures shown (default: a temporary one)")
    return parser


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from vt_trl.play import play

    play(options.recipe, overrides, row=options.row, folder=options.pictures)
