"""One cell of a seed: SFT, GRPO and what they came to. Cells run in processes of their own, side by side."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from rich.progress import Progress

from demos.runs import kept, single_thread, write_page
from demos.searching import stages

CELLS = ("crops", "no_crops", "no_sft")  # the longest first


def run_cell(world: stages.World, cell: str, sft_steps: int | None, grpo_steps: int | None) -> dict[str, Any]:
    """Train and measure one cell of a seed; one that was finished is only read. Steps: None for the recipe's."""
    single_thread()
    return kept(world.out / f"{cell}.json", partial(_train, world, cell, sft_steps, grpo_steps))


def _train(world: stages.World, cell: str, sft_steps: int | None, grpo_steps: int | None) -> dict[str, Any]:
    bar = Progress(disable=True)
    environment = stages.BLIND if cell == "no_crops" else "zoom"
    started, figures, model = time.perf_counter(), {}, world.base
    if cell != "no_sft":
        model = world.out / f"{cell}-sft"
        stages.run_sft(world, model, environment, sft_steps)
    figures["before"] = stages.measure(world, model, environment, bar, cell)
    trained = world.out / f"{cell}-grpo"
    trainer = stages.run_grpo(world, model, trained, environment, grpo_steps, bar, cell)
    figures["after"] = stages.measure(world, trained, environment, bar, cell)
    figures["grpo_steps"] = trainer.state.global_step
    logs = [log for log in trainer.state.log_history if "reward" in log]
    names = ("accuracy", "request_rate", "reward")
    figures["curve"] = {name: [round(float(log[name]), 4) for log in logs if name in log] for name in names}
    figures["seconds"] = round(time.perf_counter() - started, 1)
    if cell == "crops":
        facts = {name: value for name, value in figures.items() if name != "curve"}
        write_page(world.out / "report.html", "vt_trl: learning where to look", facts, trainer)
    return figures
