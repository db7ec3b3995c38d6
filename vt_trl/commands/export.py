"""``vt-trl export RUN [--checkpoint N|best|last] [--merge] [--out DIR] [--dtype TYPE] [--push REPO [--private]]``"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vt_trl.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vt-trl export", description="A folder to load or publish.", allow_abbrev=False)
    parser.add_argument("run", help="output folder of a run, or one of its checkpoints")
    parser.add_argument("--checkpoint", help="a step, best or last (default: the final model, else the last)")
    parser.add_argument("--merge", action="store_true", help="add a LoRA adapter to the weights of its base")
    parser.add_argument("--out", help="folder to write, new or empty (default: RUN-export)")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="type of the weights (default: as saved, or as the base's when merging)",
    )
    parser.add_argument("--push", metavar="REPO_ID", help="push it to this repository of the Hub")
    parser.add_argument("--private", action="store_true", help="make the repository private when it is created")
    return parser


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Print where the folder is, and where it was pushed."""
    if options.private and not options.push:
        raise ConfigError("--private is set, but nothing is pushed; add --push REPO_ID, or leave it out.")
    from vt_trl.export import export

    out = export(
        options.run,
        options.checkpoint,
        merge=options.merge,
        out=options.out,
        dtype=options.dtype,
        push=options.push,
        private=options.private or None,
    )
    print(f"Written to {out}" + (f" and pushed to {options.push}" if options.push else ""))
