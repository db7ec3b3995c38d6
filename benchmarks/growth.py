"""How the cost of an update grows with group size, request rate, picture, turn length and number of prompts.

    python -m benchmarks.growth --json docs/results/benchmark_growth.json --plot docs/results/growth.png

From one base (16 rollouts of one prompt, 40% of them asking, the lengths of :data:`BASE`) one thing at a time is
changed. For each point the forward and backward of stock TRL 1.16 and of vt_trl are measured, and the operations that
:mod:`benchmarks.step_flops` counts on paper are set beside them; as seconds they are divided by one speed for all
points of a way, fitted to its measurements.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from benchmarks.reporting import write
from benchmarks.step import timed
from benchmarks.step_flops import our_operations, stock_operations
from benchmarks.step_work import Ours, Sizes, Stock, Work, advantages, make_checkpoint, make_rollouts
from demos.reading.stages import provenance
from vt_trl.preflight.counts import count, widths
from vt_trl.recipe import RunArguments

BASE = Sizes(groups=1, members=16, rows=4, columns=11, text=38, turn=19, wrap=4)
RATE = 40
SWEEPS: dict[str, list[Any]] = {
    "group size": [4, 8, 16, 32],
    "request rate, %": [0, 10, 40, 80, 100],
    "visual tokens of the large picture": [(2, 6), (4, 6), (4, 11), (8, 11)],
    "tokens per turn": [5, 10, 19, 38, 76],
    "prompts": [1, 2, 4],
}


def points(sweeps: dict[str, list[Any]]) -> Iterator[tuple[str, float, Sizes, int]]:
    """(sweep, value on its axis, sizes, percent that ask)."""
    for name, values in sweeps.items():
        for value in values:
            sizes, rate = BASE, RATE
            if name == "group size":
                sizes = replace(BASE, members=value)
            elif name == "request rate, %":
                rate = value
            elif name == "tokens per turn":
                sizes = replace(BASE, turn=value)
            elif name == "prompts":
                sizes = replace(BASE, groups=value)
            else:
                sizes = replace(BASE, rows=value[0], columns=value[1])
                value = sizes.high
            yield name, value, sizes, rate


def seconds_of(work: Work, rollouts: list[Any], scale: torch.Tensor) -> float:
    work.preprocess(rollouts, scale)
    found = timed(work, "cpu", work.training_pass)
    work.zero()
    return found


def measure(folder: Path, sizes: Sizes, rate: int, repeats: int) -> dict[str, Any]:
    """Seconds of both ways in turns, and the operations of both."""
    rollouts = make_rollouts(folder, sizes, rate)
    ours = Ours(folder, sizes, sizes.members, "cpu", torch.float32)
    ways: dict[str, Work] = {"vt_trl": ours}
    ways["stock"] = Stock(folder, sizes, sizes.members, "cpu", torch.float32, banned=ours.trainer.banned_ids)
    scale = advantages(sizes)
    turns: list[dict[str, float]] = []
    for turn in range(repeats + 1):
        found = {name: seconds_of(work, rollouts, scale) for name, work in ways.items()}
        turns += [found] if turn else []  # the first one warms up
    config = AutoConfig.from_pretrained(folder)
    w, counts = widths(config), count(config, RunArguments(model="-", dataset="-", lora="none"))
    paper = {
        "stock": sum(stock_operations(w, counts, part).total for part in _groups(rollouts, sizes)),
        "vt_trl": sum(our_operations(w, counts, part).total for part in _groups(rollouts, sizes)),
    }
    ratios = [one["stock"] / one["vt_trl"] for one in turns]
    return {
        "seconds": {name: round(statistics.median(one[name] for one in turns), 4) for name in ways},
        "ratio": [round(f(ratios), 2) for f in (statistics.median, min, max)],
        "gflop": {name: round(value / 1e9, 2) for name, value in paper.items()},
        "ratio_on_paper": round(paper["stock"] / paper["vt_trl"], 2),
    }


def _groups(rollouts: list[Any], sizes: Sizes) -> list[list[Any]]:
    return [rollouts[start : start + sizes.members] for start in range(0, len(rollouts), sizes.members)]


def fit(found: list[dict[str, Any]]) -> dict[str, float]:
    """GFLOP of a forward per second of an update, by way: the speed with the least squared relative error."""
    speeds = {}
    for name in ("stock", "vt_trl"):
        slopes = [one["gflop"][name] / one["seconds"][name] for one in found]
        speeds[name] = round(sum(slope**2 for slope in slopes) / sum(slopes), 3)
    return speeds


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    torch.set_num_threads(options.threads or torch.get_num_threads())
    sweeps = {name: SWEEPS[name] for name in options.sweeps}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(Path(folder), "cpu")
        for name, value, sizes, rate in points(sweeps):
            found.append({"sweep": name, "value": value} | measure(checkpoint, sizes, rate, options.repeats))
    about = {"base": vars(BASE) | {"rate": RATE}, "repeats": options.repeats, "threads": torch.get_num_threads()}
    return {"command": command, **about, "gflop_per_second": fit(found), "points": found} | provenance()


def draw(report: dict[str, Any]) -> Any:
    """A row of ratios over a row of seconds, a column per sweep; lines are the model, dots measurements."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(one["sweep"] for one in report["points"]))
    figure = Figure(figsize=(3.1 * len(names), 5.6), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False, sharey="row")
    for column, name in enumerate(names):
        rows = [one for one in report["points"] if one["sweep"] == name]
        values = [one["value"] for one in rows]
        upper, lower = axes[:, column]
        upper.plot(values, [one["ratio_on_paper"] for one in rows], color="#4a4a4a", label="on paper")
        spread = [[abs(one["ratio"][0] - one["ratio"][side]) for one in rows] for side in (1, 2)]
        middle = [one["ratio"][0] for one in rows]
        upper.errorbar(values, middle, spread, fmt="o", color="#0072b2", label="measured")
        for way, colour in (("stock", "#d55e00"), ("vt_trl", "#0072b2")):
            speed = report["gflop_per_second"][way]
            lower.plot(values, [one["gflop"][way] / speed for one in rows], color=colour)
            lower.plot(values, [one["seconds"][way] for one in rows], "o", color=colour, label=way)
        lower.set_xlabel(name)
        upper.axhline(1, color="#bbbbbb", linewidth=0.7)
        for ax in (upper, lower):
            ax.grid(alpha=0.25)
    for ax in axes[:, 0]:  # at last: it also fixes the upper end
        ax.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("times faster than stock TRL")
    axes[1, 0].set_ylabel("seconds of forward and backward")
    for ax in axes[:, 0]:
        ax.legend(frameon=False)
    return figure


def print_report(report: dict[str, Any]) -> None:
    table = Table("", "", "stock s", "vt_trl s", "faster, x", "spread", "on paper, x", title="Forward and backward")
    for one in report["points"]:
        middle, low, high = one["ratio"]
        seconds = (f"{one['seconds'][way]:.3g}" for way in ("stock", "vt_trl"))
        cells = (one["sweep"], str(one["value"]), *seconds, f"{middle:.2f}", f"{low:.2f}-{high:.2f}")
        table.add_row(*cells, f"{one['ratio_on_paper']:.2f}")
    Console().print(table)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", nargs="+", choices=tuple(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument("--json", type=Path, default=None, help="write the report there")
    parser.add_argument("--plot", type=Path, default=None, help="draw it there (PNG or SVG)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns the report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse_args(argv)
    report = run(options, shlex.join(["python", "-m", "benchmarks.growth", *argv]))
    print_report(report)
    write(report, options.json)
    if options.plot is not None:
        draw(report).savefig(options.plot, dpi=110)
    return report


if __name__ == "__main__":
    main()
