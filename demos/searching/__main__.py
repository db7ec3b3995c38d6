"""``make demo-zoom``: a tiny model learns on a CPU where to look, and two ablations show what it takes.

From one base model that looks at nothing, for each seed: SFT on rationales with one look, then GRPO with crops. Beside
it the same two stages with boxes that show nothing, and GRPO without the SFT stage. Writes ``zoom.json`` and per seed
``report.html``. A run that was stopped goes on with the cells that are missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from demos.reading.__main__ import progress_bar


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demos.searching", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/demo_zoom"))
    parser.add_argument("--json", type=Path, default=None, help="where the figures go (default: OUT/zoom.json)")
    parser.add_argument("--base-steps", type=int, default=None, help="steps of the base model (default: Schooling's)")
    parser.add_argument("--sft-steps", type=int, default=None, help="default: the recipe's max_steps")
    parser.add_argument("--grpo-steps", type=int, default=None, help="default: the recipe's max_steps")
    parser.add_argument("--eval-rows", type=int, default=256, help="held-out pictures")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    return parser.parse_args(argv)


def run_base(options: argparse.Namespace, bar: Any) -> None:
    """Make the base model, unless it is there."""
    from demos.searching import stages

    base = options.out / "base"
    if (base / "model.safetensors").exists() and not (base / "unfinished").exists():
        return
    base.mkdir(parents=True, exist_ok=True)
    (base / "unfinished").touch()  # the untrained model is written first
    stages.make_base(base, bar, **({} if options.base_steps is None else {"steps": options.base_steps}))
    (base / "unfinished").unlink()


def run_all(options: argparse.Namespace) -> dict[tuple[int, str], dict[str, Any]]:
    """The base model first, with all threads, then every cell, ``--jobs`` at a time."""
    import torch

    from demos.searching import stages
    from demos.searching.cells import CELLS, run_cell  # of a module that a spawned process finds, unlike __main__

    torch.set_num_threads(options.jobs)
    base, results = options.out / "base", {}
    worlds = {seed: stages.World(options.out / f"seed{seed}", base, seed, options.eval_rows) for seed in options.seeds}
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with progress_bar() as bar, ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        run_base(options, bar)
        for world in worlds.values():  # before the cells, which share them
            stages.save_rationales(world)
            stages.save_train_rows(world)
        task = bar.add_task("training runs", total=len(options.seeds) * len(CELLS), note="")
        futures = {
            pool.submit(run_cell, world, cell, options.sft_steps, options.grpo_steps): (seed, cell)
            for cell in CELLS
            for seed, world in worlds.items()
        }
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            bar.advance(task)
    return results


def report_of(options: argparse.Namespace, results: dict[tuple[int, str], dict[str, Any]]) -> dict[str, Any]:
    """The figures of every seed, and what the demo promises against them."""
    from demos.reading.stages import provenance
    from demos.searching.cells import CELLS

    seeds = []
    for seed in options.seeds:
        crops, blind, raw = (results[seed, cell] for cell in CELLS)
        figures = {
            "seed": seed,
            "accuracy_before": crops["before"]["accuracy"],
            "accuracy_after": crops["after"]["accuracy"],
            "crop_hits": crops["after"]["crop_hits"],
            "accuracy_without_crops": blind["after"]["accuracy"],
            "accuracy_without_sft": raw["after"]["accuracy"],
            "accuracy_base": raw["before"]["accuracy"],
        }
        seeds.append(
            figures | {"targets_met": targets(figures), "cells": {cell: results[seed, cell] for cell in CELLS}}
        )
    return {"seeds": seeds, "sizes": {"eval_rows": options.eval_rows}, **provenance()}


def targets(figures: dict[str, Any]) -> dict[str, bool]:
    """What the demo promises of a seed, as measured."""
    before, after = figures["accuracy_before"], figures["accuracy_after"]
    return {
        "GRPO adds 20 points to the warm start": after - before >= 0.20,
        "80% of the crops hold the letter": figures["crop_hits"] >= 0.80,
        "without crops 15 points less": after - figures["accuracy_without_crops"] >= 0.15,
        "without SFT it does not get going": figures["accuracy_without_sft"] - figures["accuracy_base"] < 0.20,
    }


def print_summary(report: dict[str, Any], path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    names = [name for name, value in report["seeds"][0].items() if isinstance(value, float)]
    table = Table(title="Accuracy on held-out pictures, greedy, and share of crops that hold the letter")
    for column in ("seed", *names):
        table.add_column(column.removeprefix("accuracy_"))
    for figures in report["seeds"]:
        table.add_row(str(figures["seed"]), *(f"{figures[name]:.3f}" for name in names))
    console = Console()
    console.print(table)
    for figures in report["seeds"]:
        for target, met in figures["targets_met"].items():
            word = "[green]met[/]    " if met else "[red]missed[/] "
            console.print(f"{word}seed {figures['seed']}: {target}", highlight=False)
    console.print(f"{path}, {report['wall_seconds']} s")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the demo; returns the report."""
    options = parse_args(argv)
    started = time.perf_counter()
    # Idle threads sleep instead of spinning: next to other programs, spinning made a step ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    results = run_all(options)
    report = report_of(options, results) | {"wall_seconds": round(time.perf_counter() - started, 1)}
    path = options.json or options.out / "zoom.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_summary(report, path)
    return report


if __name__ == "__main__":
    main()
