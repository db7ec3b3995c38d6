"""Rollouts without a barrier on colocated vLLM, against the same loop in rounds and against TRL's own tool loop.

    python -m benchmarks.rollout --json FILE

One group of 16 rollouts of a random Qwen2.5-VL per repeat, 40% of which ask for the larger picture. A random model
neither stops nor calls by itself: lengths of turns are drawn from a log-normal distribution and forced, and whoever
goes on has a call put at the end of its turn. All variants get the same pictures and lengths, sample the same number
of tokens, and run on the same engine, with new weights each time. ``ratio_rounds``: seconds of the loop with a barrier
after each round of turns, by those of ours; ``ratio_trl``: those of TRL's loop, by ours. Both are medians over the
repeats, which are interleaved. Seconds are the processor's where there is no GPU: one process then does all the work,
and other programs on the machine disturb a clock more. ``..._clock`` are the same ratios by the clock, ``..._steps``
those of the engine's steps, and ``steps_of_1000_plans`` the quartiles of the latter over 1000 draws of lengths.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.reporting import show, write
from benchmarks.rollout_parts import Lengths, Plan, World, check, phrases
from demos.reading.stages import provenance
from vt_trl.tiny import build_tiny
from vt_trl.versions import versions

SYNCS = 5  # weight syncs that are timed, of each kind
SIMULATED = 1000  # plans whose steps are counted on paper, to see whether those that were run are usual ones


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything the report says, but for machine, versions and date."""
    from benchmarks.rollout_trl import TRLLoop

    lengths = Lengths(options.median, options.sigma, options.longest)
    rng = np.random.default_rng(options.seed)
    plans = [Plan.draw(options.group, options.share, lengths, rng) for _ in range(max(options.repeats, SIMULATED))]
    model = build_tiny(folder / "model", corpus=phrases(), hidden_size=options.width, layers=options.layers)
    world = World(model, options.group)
    trl = TRLLoop(world)
    variants: dict[str, Callable[[dict[str, Any], Plan], Any]] = {
        "ours": lambda row, plan: check(world.roll_out("free", row, plan), plan),
        "rounds": lambda row, plan: check(world.roll_out("rounds", row, plan), plan),
        "trl": trl.roll_out,
    }
    runs = []
    warm_up = Plan(((lengths.shortest,) * 2,) * options.group)
    for number, plan in enumerate([warm_up, *plans[: options.repeats]]):
        row = world.row(options.seed + number)
        run: dict[str, Any] = {"sampled": plan.sampled, "least_steps": plan.steps}
        names = [*variants]
        for name in names[number % 3 :] + names[: number % 3]:
            run[name] = timed(world, lambda name=name, row=row, plan=plan: variants[name](row, plan))
        runs.append(run)
    syncs = {"ours": world.engine.sync_weights, "trl": trl.sync_weights}
    seconds = {name: [timed(world, sync)["seconds"] for _ in range(SYNCS)] for name, sync in syncs.items()}
    expected = np.quantile([plan.steps[1] / plan.steps[0] for plan in plans], (0.25, 0.5, 0.75)).round(3).tolist()
    return summary(runs[1:], seconds, options) | {"steps_of_1000_plans": expected}


def timed(world: World, act: Callable[[], Any]) -> dict[str, float]:
    """Seconds, those by the clock, and steps of the engine."""
    with world.counting() as step:
        processor, clock = time.process_time(), time.perf_counter()
        act()
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
    seconds = clock if world.gpu else processor
    return {"seconds": round(seconds, 3), "clock": round(clock, 3), "steps": step.call_count}


def summary(
    runs: Sequence[dict[str, Any]], syncs: dict[str, list[float]], options: argparse.Namespace
) -> dict[str, Any]:
    """Medians and spread over the repeats."""
    report: dict[str, Any] = {}
    for name in ("rounds", "trl"):
        for what, suffix in (("seconds", ""), ("clock", "_clock"), ("steps", "_steps")):
            ratios = [run[name][what] / run["ours"][what] for run in runs]
            report[f"ratio_{name}{suffix}"] = round(statistics.median(ratios), 3)
            report[f"ratio_{name}{suffix}_spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
    for name in ("ours", "rounds", "trl"):
        report[f"seconds_{name}"] = round(statistics.median(run[name]["seconds"] for run in runs), 2)
    report |= {f"sync_seconds_{name}": round(statistics.median(seconds), 3) for name, seconds in syncs.items()}
    settings = ("group", "share", "median", "sigma", "longest", "width", "layers", "repeats", "seed")
    report["settings"] = {name: getattr(options, name) for name in settings}
    return report | {"threads": torch.get_num_threads(), "runs": list(runs)}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__.splitlines()[0])
    parser.add_argument("--group", type=int, default=16, help="rollouts of one prompt, all at the same time")
    parser.add_argument("--share", type=float, default=0.4, help="of the rollouts that ask for the larger picture")
    parser.add_argument("--median", type=float, default=64, help="of the lengths of turns, in tokens")
    parser.add_argument("--sigma", type=float, default=0.9, help="of the logarithm of lengths")
    parser.add_argument("--longest", type=int, default=512, help="turn, in tokens")
    parser.add_argument("--width", type=int, default=384, help="of the model")
    parser.add_argument("--layers", type=int, default=6, help="of the model")
    parser.add_argument("--repeats", type=int, default=7, help="each with lengths and a picture of its own")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and pictures")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns the report."""
    options = parse_args(argv)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; read where there is no GPU
    with tempfile.TemporaryDirectory() as folder:
        report = measure(options, Path(folder)) | provenance()
    report["versions"] = versions() | report["versions"]
    if torch.cuda.is_available():
        report["machine"] = torch.cuda.get_device_name()
    show("Rollouts without a barrier", report, hidden=("versions", "settings", "runs"))
    write(report, options.json)
    return report


if __name__ == "__main__":
    main()
