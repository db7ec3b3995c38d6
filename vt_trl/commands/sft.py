"""``vt-trl sft RECIPE [--key value ...]``"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vt-trl sft", description="Fine-tune on traces.", allow_abbrev=False)
    parser.add_argument("recipe", help="a YAML file, such as recipes/sft_lora.yaml; `--key value` overrides a line")
    return parser


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Exit status 0, or 143 when SIGTERM ended the run in order."""
    from vt_trl.resume import TERMINATED
    from vt_trl.sft import sft

    return TERMINATED if sft(options.recipe, overrides).end_in_order.asked else 0
