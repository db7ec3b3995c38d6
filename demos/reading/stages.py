"""The stages of the demo, each a short function on a :class:`World`; ``ablation.py`` uses them too."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import TrainerCallback

from demos.reading.task import ALPHABET, make_dataset
from demos.reading.warmstart import WarmStart, warm_start
from demos.runs import overrides
from vt_trl import __version__
from vt_trl.data import episode_row
from vt_trl.evaluation import Evaluation, play_rows
from vt_trl.generation.base import SamplingSettings
from vt_trl.inference import PolicyModel
from vt_trl.policies import parse_policy
from vt_trl.yaml_file import read_yaml

EVAL_HARD_SHARE = 0.25
TRAIN_HARD_SHARE = 0.5
TRAIN_ROWS = 2048
_SEEDS = {"warm": 1000, "train": 2000, "eval": 3000}  # disjoint pictures; each also depends on the run's seed


@dataclass(frozen=True)
class World:
    """Where things lie, what the recipe says, and the held-out rows (decoded)."""

    recipe: Path
    settings: dict[str, Any]
    out: Path
    seed: int
    eval_rows: list[dict[str, Any]]
    task: dict[str, Any]  # settings of the reading task: legibility, alphabet

    @classmethod
    def make(cls, recipe: Path, out: Path, seed: int, eval_rows: int, **task: Any) -> World:
        out.mkdir(parents=True, exist_ok=True)
        held_out = make_dataset(eval_rows, EVAL_HARD_SHARE, _SEEDS["eval"] + seed, **task)
        return cls(recipe, read_yaml(recipe), out, seed, [episode_row(row) for row in held_out], task)

    @property
    def base(self) -> Path:
        return self.out / "base"

    @property
    def grpo(self) -> Path:
        return self.out / "grpo"

    def rows(self, purpose: str, count: int, hard_share: float):
        return make_dataset(count, hard_share, _SEEDS[purpose] + self.seed, **self.task)


def make_base(world: World, bar: Progress, steps: int | None = None, **settings: Any) -> None:
    """Train the stand-in for an instruction-tuned checkpoint and save it at ``world.base``.

    ``settings`` are those of :class:`WarmStart`; ``steps=None`` leaves its default.
    """
    settings = WarmStart(**settings | ({} if steps is None else {"steps": steps}))
    task = bar.add_task("warm start", total=settings.steps, note="drawing pictures")
    rows = [episode_row(row) for row in world.rows("warm", settings.rows, 0.5)]

    def advance(done: int, loss: float) -> None:
        bar.update(task, completed=done, note=f"loss {loss:.2f}")

    prompts = world.settings["environment_args"]["prompts"]
    warm_start(world.base, rows, prompts, settings, world.seed, advance)


def _evaluate(world: World, model_path: Path, policy: str, bar: Progress, label: str, **settings: Any) -> Evaluation:
    sampled = settings.pop("sampled", False)
    limits = {name: world.settings[name] for name in ("max_turn_tokens", "max_completion_length")}
    model = PolicyModel(model_path, dtype="float32", device="cpu", **limits)
    args = world.settings["environment_args"] | settings
    task = bar.add_task(label, total=len(world.eval_rows), note="")
    return play_rows(
        model.runner(parse_policy(policy).environment(args)),
        world.eval_rows,
        SamplingSettings(temperature=1.0 if sampled else 0.0),
        progress=lambda count: bar.advance(task, count),
    )


def measure_controls(world: World, bar: Progress) -> dict[str, Any]:
    """Reading directly at a fixed resolution: what asking can win, and what it costs."""
    full = _evaluate(world, world.base, "always-full", bar, "control: always full")
    low = _evaluate(world, world.base, "always-low", bar, "control: always low")
    return {
        "always_full_accuracy": full.rate("correct"),
        "always_low_accuracy": low.rate("correct"),
        "visual_tokens_always_full": full.rate("visual_tokens"),
        "control": {
            "hard_low_accuracy": low.rate("correct", "hard"),
            "hard_full_accuracy": full.rate("correct", "hard"),
            "easy_low_accuracy": low.rate("correct", "easy"),
            "easy_full_accuracy": full.rate("correct", "easy"),
            "chance": 1 / len(world.task.get("alphabet", ALPHABET)),
        },
    }


def measure(world: World, model_path: Path, label: str, bar: Progress) -> dict[str, float]:
    """Greedy evaluation of the two-turn policy on the held-out rows, and its sampled request rates."""
    greedy = _evaluate(world, model_path, "two-turn", bar, label)
    sampled = _evaluate(world, model_path, "two-turn", bar, f"{label}, sampled", sampled=True)
    return {
        "accuracy": greedy.rate("correct"),
        "accuracy_easy": greedy.rate("correct", "easy"),
        "accuracy_hard": greedy.rate("correct", "hard"),
        "request_rate_easy": greedy.rate("asked", "easy"),
        "request_rate_hard": greedy.rate("asked", "hard"),
        "visual_tokens_mean": greedy.rate("visual_tokens"),
        "format_rate": greedy.rate("well_formed"),
        "sampled_request_rate_easy": sampled.rate("asked", "easy"),
        "sampled_request_rate_hard": sampled.rate("asked", "hard"),
    }


class ProgressCallback(TrainerCallback):
    """Shows the training on a rich progress bar, and keeps the rollouts of the latest steps for the report."""

    def __init__(self, bar: Progress, label: str, keep_steps: int = 10):
        self.bar, self.label, self.keep_steps = bar, label, keep_steps
        self.trainer: Any = None
        self.episodes: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.bar.add_task(self.label, total=state.max_steps, note="")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "reward" in logs:
            rates = [f"{name} {logs.get(f'request_rate/{name}', float('nan')):.2f}" for name in ("easy", "hard")]
            note = f"reward {float(logs['reward']):.2f}, asks: {', '.join(rates)}"
            self.bar.update(self.task, completed=state.global_step, note=note)


def save_train_rows(world: World) -> Path:
    """Draw the rows GRPO trains on, once, and return their folder."""
    rows = world.out / "train"
    if not rows.exists():
        world.rows("train", TRAIN_ROWS, TRAIN_HARD_SHARE).save_to_disk(rows)
    return rows


def run_grpo(world: World, bar: Progress, steps: int | None = None, more: Sequence[str] = (), label: str = "GRPO"):
    """Train the recipe by the path of ``vt-trl train``; returns the trainer. The model is saved at ``world.grpo``."""
    from vt_trl.run import train

    rows = save_train_rows(world)
    given = overrides(
        model=world.base, dataset=rows, output_dir=world.grpo, seed=world.seed, disable_tqdm=True, max_steps=steps
    )
    return train(world.recipe, [*given, *more], callbacks=[ProgressCallback(bar, label)])


def provenance() -> dict[str, Any]:
    """Machine, versions and date, for every figure that leaves this machine."""
    names = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    return {
        "machine": f"{os.cpu_count()} x {platform.machine()} CPU, {platform.system()}, no GPU used",
        "versions": {"vt_trl": __version__, "python": platform.python_version()} | {n: version(n) for n in names},
        "date": datetime.date.today().isoformat(),
    }


def targets(report: dict[str, Any]) -> dict[str, bool]:
    """What the demo promises, as measured."""
    before, after, control = report["before"], report["after"], report["control"]
    return {
        "request_rate_hard >= 0.90": after["request_rate_hard"] >= 0.90,
        "request_rate_easy <= 0.10": after["request_rate_easy"] <= 0.10,
        "accuracy >= 0.95 x always full": after["accuracy"] >= 0.95 * report["always_full_accuracy"],
        "visual tokens <= 0.60 x always full": after["visual_tokens_mean"]
        <= 0.60 * report["visual_tokens_always_full"],
        "no preference before": abs(before["request_rate_easy"] - before["request_rate_hard"]) < 0.2,
        "hard is at chance at low resolution": abs(control["hard_low_accuracy"] - control["chance"]) <= 0.10,
        "hard is legible at full resolution": control["hard_full_accuracy"] >= 0.90,
    }


def print_summary(report: dict[str, Any], path: Path, page: Path) -> None:
    table = Table(title="Held-out pictures, greedy")
    for column in ("", "before", "after"):
        table.add_column(column)
    for name in report["after"]:
        table.add_row(name, f"{report['before'][name]:.3f}", f"{report['after'][name]:.3f}")
    console = Console()
    console.print(table)
    for target, met in report["targets_met"].items():
        console.print(("[green]met[/]    " if met else "[red]missed[/] ") + target, highlight=False)
    console.print(f"{path} and {page}, {report['wall_seconds']} s")
