"""``make ablation``: when does which penalty rule collapse? (VisionThink, arXiv 2507.13348, Figures 3a and 8.)

Every rule is trained from the same base model on the same rows; only ``penalty`` differs. A small grid then varies
what an expectation argument says must matter: how legible hard pictures are at low resolution (a lucky guess pays),
and how reliable the second turn is. Writes ``ablation.json`` (``{rule: [curves per seed]}``), a plot of it, and
``ablation_grid.json``. A run that was stopped goes on with the cells that are missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from demos.reading.__main__ import RECIPE, progress_bar
from demos.runs import kept, overrides, single_thread

RULES = ("none", "always", "paper", "released")
OUT = Path("docs/results")
_CURVES = {"request_rate_easy": "request_rate/easy", "request_rate_hard": "request_rate/hard", "accuracy": "accuracy"}
_SETTLED = 4  # logs at the end of a run that say where it settled


@dataclass(frozen=True)
class Cell:
    """One training run of the ablation."""

    rule: str
    seed: int
    legibility: float = 0.0
    reliability: float = 1.0


def outcome(easy: float, hard: float) -> str:
    """Where a policy settled, from its request rates on easy and hard pictures at the end."""
    if hard >= 0.8 and easy <= 0.2:
        return "selective"
    if easy >= 0.8 and hard >= 0.8:
        return "always asks"
    if easy <= 0.2 and hard <= 0.2:
        return "never asks"
    return "mixed"


def _world(work: Path, seed: int, legibility: float) -> Any:
    from demos.reading.stages import World

    return World.make(RECIPE, work / f"seed{seed}-legibility{legibility}", seed, eval_rows=1, legibility=legibility)


def prepare(work: Path, seed: int, legibility: float, warm_steps: int | None) -> None:
    """Train the base model of a seed and a legibility, and draw the rows that all rules train on."""
    from demos.reading import stages

    single_thread()
    world = _world(work, seed, legibility)
    stages.save_train_rows(world)
    if not (world.base / "model.safetensors").exists():
        stages.make_base(world, Progress(disable=True), warm_steps)


def run_cell(work: Path, cell: Cell, steps: int, log_every: int) -> dict[str, Any]:
    """Train one cell by the ordinary recipe path and return its curves; a cell that was finished is only read."""
    single_thread()
    world = _world(work, cell.seed, cell.legibility)
    output = world.out / f"{cell.rule}-reliability{cell.reliability}"
    return kept(output / f"curves-{steps}-{log_every}.json", partial(_curves, world, cell, output, steps, log_every))


def _curves(world: Any, cell: Cell, output: Path, steps: int, log_every: int) -> dict[str, Any]:
    from demos.reading import stages

    more = overrides(
        penalty=cell.rule,
        output_dir=output,
        logging_steps=log_every,
        environment="demos.reading.unreliable:UnreliableEnv",
        environment_args=json.dumps(world.settings["environment_args"] | {"reliability": cell.reliability}),
    )
    trainer = stages.run_grpo(world, Progress(disable=True), steps, more)
    logs = [log for log in trainer.state.log_history if "request_rate" in log]
    curves = {name: [log.get(key) for log in logs] for name, key in _CURVES.items()}
    return {"seed": cell.seed, "steps": [log["step"] for log in logs], **curves}


def settled(curves: dict[str, Any], name: str) -> float:
    known = [value for value in curves[name][-_SETTLED:] if value is not None]
    return sum(known) / len(known)


def run_all(options: argparse.Namespace, bar: Progress) -> dict[Cell, dict[str, Any]]:
    """Base models first, then every cell, ``--jobs`` at a time."""
    main = [Cell(rule, seed) for rule in RULES for seed in options.seeds]
    grid = [
        Cell(rule, options.seeds[0], legibility, reliability)
        for legibility in options.legibility
        for reliability in options.reliability
        for rule in RULES
    ]
    cells = list(dict.fromkeys([*main, *grid]))
    bases = list(dict.fromkeys((cell.seed, cell.legibility) for cell in cells))
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        task = bar.add_task("base models", total=len(bases), note="")
        for future in as_completed([pool.submit(prepare, options.work, *base, options.warm_steps) for base in bases]):
            future.result()
            bar.advance(task)
        task = bar.add_task("training runs", total=len(cells), note="")
        futures: dict[Future, Cell] = {
            pool.submit(run_cell, options.work, cell, options.steps, options.log_every): cell for cell in cells
        }
        results = {}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            bar.advance(task)
    return results


def write_results(options: argparse.Namespace, results: dict[Cell, dict[str, Any]], seconds: float) -> None:
    from demos.reading.stages import provenance
    from vt_trl.plots import plot_request_rates

    options.out.mkdir(parents=True, exist_ok=True)
    curves = {rule: [results[Cell(rule, seed)] for seed in options.seeds] for rule in RULES}
    rows = []
    for cell, result in results.items():
        easy, hard = settled(result, "request_rate_easy"), settled(result, "request_rate_hard")
        numbers = {"request_rate_easy": easy, "request_rate_hard": hard, "accuracy": settled(result, "accuracy")}
        rows.append({**asdict(cell), **{k: round(v, 4) for k, v in numbers.items()}, "outcome": outcome(easy, hard)})
    rows.sort(key=lambda row: (row["legibility"], -row["reliability"], RULES.index(row["rule"]), row["seed"]))
    about = {"steps": options.steps, "wall_seconds": round(seconds, 1), "jobs": options.jobs, **provenance()}
    _write(options.out / "ablation.json", curves)
    _write(options.out / "ablation_grid.json", {"cells": rows, "about": about})
    plot_request_rates(curves, options.out / "ablation.png")


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demos.reading.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=30, help="GRPO steps per run")
    parser.add_argument("--log-every", type=int, default=2)
    parser.add_argument("--warm-steps", type=int, default=None)
    parser.add_argument("--legibility", type=float, nargs="*", default=[0.0, 0.03])
    parser.add_argument("--reliability", type=float, nargs="*", default=[1.0, 0.6])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(argv)
    start = time.perf_counter()
    with progress_bar() as bar:
        results = run_all(options, bar)
    write_results(options, results, time.perf_counter() - start)


if __name__ == "__main__":
    main()
