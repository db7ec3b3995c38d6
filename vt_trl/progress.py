"""How far a run is, on the terminal: a bar that names the phase, or one plain line per log where there is no terminal.

``disable_tqdm: true`` switches it off. Only the main process says anything.
"""

from __future__ import annotations

import atexit
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import ProgressCallback, TrainerCallback

FIGURES = ("reward", "request_rate", "accuracy")
PHASES = ("rollout", "score", "update")
_WINDOW = 20  # steps that seconds per step are averaged over


def add_progress(trainer: Any) -> RunProgress:
    """Put ours in the place of transformers' bar, unless there is none: switched off, or a notebook's own."""
    progress = RunProgress()
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(progress)
    return progress


class RunProgress(TrainerCallback):
    """Step, total, seconds per step, time left, the phase, and the latest reward, request rate and accuracy."""

    def __init__(self, console: Console | None = None, clock: Any = time.monotonic):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.clock = clock
        self._bar: Progress | None = None
        self._phase, self._figures = "", ""
        self._ends: deque[tuple[int, float]] = deque(maxlen=_WINDOW + 1)  # step, and when it ended

    def enter(self, phase: str) -> None:
        """Say what the run does now, such as ``rollout``."""
        self._phase = phase
        self._draw()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._ends.clear()
        self._ends.append((state.global_step, self.clock()))
        if not state.is_world_process_zero:
            return
        if self.console.is_terminal:
            columns = [TextColumn("{task.fields[phase]:<10}", markup=False), BarColumn(bar_width=24)]
            columns += [MofNCompleteColumn(), TextColumn("{task.fields[note]}", markup=False)]
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, phase="", note="")
            self._bar.start()
            atexit.register(self._bar.stop)  # an error that ends the run must leave the cursor visible
        else:
            self.console.print(f"training from step {state.global_step} to {state.max_steps}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._ends.append((state.global_step, self.clock()))
        self._draw(state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.enter("evaluate")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero or not any(name in logs for name in (*FIGURES, "eval_reward")):
            return
        prefix = "eval_" if "eval_reward" in logs else ""
        self._figures = figures(logs, prefix)
        self._draw(state)
        if self._bar is None:
            self.console.print(" | ".join(part for part in self._line(state, logs, prefix) if part))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._draw(state)
            self._bar.stop()
            atexit.unregister(self._bar.stop)
            self._bar = None

    def _line(self, state: Any, logs: Mapping[str, Any], prefix: str) -> list[str]:
        """A log in one line: the pace and the phases' seconds in training, the figures always."""
        step = f"{'evaluation at ' if prefix else ''}step {state.global_step}/{state.max_steps}"
        if prefix:
            return [step, self._figures]
        seconds = [(name, logs.get(f"time/{name}_seconds")) for name in PHASES]
        spent = ", ".join(f"{name} {value:.1f} s" for name, value in seconds if value is not None)
        return [step, self._pace(state), self._figures, spent]

    def _pace(self, state: Any) -> str:
        """Seconds per step over the last 20 steps and the time left at that pace; empty before the first step."""
        if len(self._ends) < 2:  # or a log outside of training
            return ""
        (first, start), (last, end) = self._ends[0], self._ends[-1]
        seconds = (end - start) / (last - first)
        left = timedelta(seconds=round(seconds * max(0, state.max_steps - state.global_step)))
        return f"{seconds:.1f} s/step, {left} left"

    def _draw(self, state: Any = None) -> None:
        if self._bar is None:
            return
        changes: dict[str, Any] = {"phase": self._phase}
        if state is not None:
            changes |= {"completed": state.global_step, "note": f"{self._pace(state)}  {self._figures}"}
        self._bar.update(self._task, **changes)


def figures(logs: Mapping[str, Any], prefix: str = "") -> str:
    """The figures of a log that are numbers: ``reward 1.234, request_rate 0.420, accuracy 0.610``."""
    found = [(name, logs.get(prefix + name)) for name in FIGURES]
    return ", ".join(f"{name} {value:.3f}" for name, value in found if isinstance(value, int | float))
