"""``vt-trl loop RECIPE [--status | --dry-run] [options] [--stage.option value ...]``"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "vt-trl loop", description="Stages in a row, round after round.", allow_abbrev=False
    )
    parser.add_argument("recipe", help="a YAML with stages (docs/loop.md); `--stage.option value` overrides a line")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--status", action="store_true", help="show what is done, with figures, and run nothing")
    what.add_argument(
        "--dry-run", action="store_true", help="check everything, show the plan and its size, run nothing"
    )
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage (of the last round, or r1.STAGE)")
    parser.add_argument(
        "--again", metavar="STAGE", nargs="+", default=[], help="run these again though nothing changed"
    )
    parser.add_argument("--remove-stale", action="store_true", help="remove outdated outputs, do not set them aside")
    parser.add_argument("--gpu-gib", type=float, help="dry run: memory of one GPU in GiB, to say whether it fits")
    return parser


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Exit status 0; 130 or 143 when SIGINT or SIGTERM ended it in order."""
    if options.status:
        from vt_trl.loop.show import show_status

        show_status(options.recipe, overrides)
        return 0
    if options.dry_run:
        from vt_trl.loop.show import show_plan

        show_plan(options.recipe, overrides, options.gpu_gib)
        return 0
    from vt_trl.loop.driver import BROKEN_OFF, TERMINATED, run_loop
    from vt_trl.loop.process import Stopped
    from vt_trl.loop.show import show_end

    try:
        manifest = run_loop(
            options.recipe,
            overrides,
            until=options.until,
            again=options.again,
            remove_stale=options.remove_stale,
        )
    except Stopped as stopped:
        print(f"{stopped}: the loop has ended in order; the same command goes on.", file=sys.stderr)
        return TERMINATED if stopped.number == signal.SIGTERM else BROKEN_OFF
    show_end(manifest)
    return 0
