"""``vt-trl train RECIPE [--key value ...]``"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vt-trl train", description="Train a recipe.", allow_abbrev=False)
    parser.add_argument("recipe", help="a YAML file, see recipes/README.md; `--key value` overrides a line of it")
    return parser


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Exit status 0, or 143 when SIGTERM ended the run in order."""
    from vt_trl.resume import TERMINATED
    from vt_trl.run import train

    return TERMINATED if train(options.recipe, overrides).end_in_order.asked else 0
