"""A stage for tests of the loop, as a module of the user's own: quick, and as disobedient as it is told to be."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("loop_stage")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--text", default="", help="what it writes")
    parser.add_argument("--read", nargs="*", default=[], type=Path, help="folders whose result is joined to it")
    parser.add_argument("--score", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--say-variables", nargs="*", default=[], help="print them, as no program should")
    parser.add_argument("--steps", type=int, default=0, help="steps of a tenth of a second, each kept when done")
    parser.add_argument("--kill-driver-at", type=int, default=None, help="the step in which it kills its parent, once")
    parser.add_argument("--stubborn", action="store_true", help="does not end on SIGTERM")
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out.parent / f".{options.out.name}.starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    for name in options.say_variables:
        print(name, os.environ[name])
    for step in range(options.steps):
        kept = options.out / f"step-{step}"
        if kept.exists():
            continue
        killed = options.out.parent / f".{options.out.name}.killed"
        if step == options.kill_driver_at and not killed.exists():
            killed.touch()
            os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(0.1)
        kept.write_text(f"{os.getpid()}")
        print(f"step {step}", flush=True)
    if options.fail:
        print("last words", file=sys.stderr)
        sys.exit(3)
    read = "".join((place / "result.txt").read_text() for place in options.read)
    (options.out / "result.txt").write_text(f"{read}{options.text}")
    if options.score is not None:
        (options.out / "metrics.json").write_text(
            json.dumps({"score": options.score, "share/easy": options.score / 2})
        )


if __name__ == "__main__":
    main()
