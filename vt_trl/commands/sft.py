"""``vt-trl sft RECIPE [--key value ...]``"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vt-trl sft", description="Fine-tune on traces.", allow_abbrev=False)
    parser.add_argument("recipe", help="a YAML file, such as recipes/sft_lora.yaml; `--key value` overrides a line")
    return parser


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from vt_trl.sft import sft

    sft(options.recipe, overrides)
