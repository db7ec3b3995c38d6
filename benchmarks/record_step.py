"""Record one step of this library's trainer, for benchmarks that replay it: ``python -m benchmarks.record_step``.

A tiny Qwen2.5-VL is warm-started for too few steps, so that it answers in the right form and often wrongly, and then
trained for one optimizer step on the reading task with :class:`~vt_trl.trainer.VTGRPOTrainer` as it is. Written down
are what each rollout answered, when it ended, and how long the phases of the step took. The first line of the file is
a header; every other line is one rollout, those of a group side by side.

The reading task asks the same of every picture. In VQA data nearly every question is distinct, and a judge sees no
picture: with one question text, 8192 rollouts would be a handful of cases. So the picture's number is written into
the question, afterwards; the policy never saw it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.judge import WORKLOAD, Completion

if TYPE_CHECKING:
    from vt_trl.trainer import VTGRPOTrainer

_MICRO_BATCH = 128
_ROWS_PER_WARM_STEP = 25  # pictures drawn for the warm start: each is seen about four times
_NOTE = (
    "The policy was asked 'Which letter?' about every picture; the picture's number was added to the question "
    "afterwards, because in VQA data nearly every question is distinct. prediction: the text a judge would be asked "
    "about; ended: processor seconds of one thread since generation began, as are the phases, because other programs "
    "ran on the machine; wall_seconds is what a clock showed for the whole step."
)


def _warm_start(options: argparse.Namespace, prompts: dict[str, str], path: Path) -> None:
    """Save a policy at ``path`` that knows the form of an answer and not much more."""
    from demos.reading.task import make_rows
    from demos.reading.warmstart import WarmStart, warm_start
    from vt_trl.data import episode_row

    settings = WarmStart(steps=options.warm_steps, rows=max(64, _ROWS_PER_WARM_STEP * options.warm_steps))
    rows = [episode_row(row) for row in make_rows(settings.rows, 0.5, seed=1000 + options.seed)]
    warm_start(path, rows, prompts, settings, options.seed)


def _make_trainer(options: argparse.Namespace, base: Path, output: Path) -> VTGRPOTrainer:
    """The trainer of the demo's recipe, with the whole batch in one optimizer step and a KL term as in the paper."""
    from demos.reading.__main__ import RECIPE
    from demos.reading.task import make_dataset
    from vt_trl.recipe import parse_recipe
    from vt_trl.trainer import VTGRPOTrainer

    rollouts = options.prompts * options.group
    micro_batch = min(_MICRO_BATCH, rollouts)
    if rollouts % micro_batch:
        raise SystemExit(f"{options.prompts} x {options.group} rollouts are no multiple of {micro_batch}.")
    settings = {
        "model": base,
        "dataset": "made in code",
        "output_dir": output,
        "seed": options.seed,
        "max_steps": 1,
        "num_generations": options.group,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": rollouts // micro_batch,
        "beta": 0.001,
        "disable_tqdm": True,
    }
    run, args = parse_recipe(RECIPE, [text for name, value in settings.items() for text in (f"--{name}", str(value))])
    args.model_init_kwargs = {"dtype": run.dtype}
    rows = make_dataset(options.prompts, 0.5, seed=2000 + options.seed)
    return VTGRPOTrainer(model=str(base), args=args, train_dataset=rows)


class _Stopwatch:
    """Has the trainer's runner, its reward functions and the end of the step say when they are there.

    Moments are processor seconds of this process. On one thread they are what a clock shows on a machine that does
    nothing else, and they do not depend on what else it does; ``wall_seconds`` says what the clock showed.
    """

    def __init__(self, trainer: VTGRPOTrainer):
        self.ended: dict[int, float] = {}  # id(rollout) -> seconds since generation began
        self._marks: dict[str, float] = {}
        self._run, trainer.runner.run = trainer.runner.run, self._timed_run
        trainer.reward_funcs[:] = [self._timed_reward(reward) for reward in trainer.reward_funcs]

    def _timed_run(self, rows: Any, group_size: int, settings: Any, on_finished: Callable[[Any], Any]) -> Any:
        self._clock, began = time.perf_counter(), time.process_time()

        def finished(rollout: Any) -> None:
            self.ended[id(rollout)] = time.process_time() - began
            on_finished(rollout)

        rollouts = self._run(rows, group_size, settings, finished)
        self._marks |= {"began": began, "generated": time.process_time()}
        return rollouts

    def _timed_reward(self, reward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._marks.setdefault("passed", time.process_time())
            scores = reward(*args, **kwargs)
            self._marks["scored"] = time.process_time()
            return scores

        return timed

    def stop(self) -> dict[str, Any]:
        """The step is over: its phases. The rule that scored is left out, for a judge stands in its place."""
        stopped, wall = time.process_time(), time.perf_counter() - self._clock
        began, generated, passed, scored = (self._marks[name] for name in ("began", "generated", "passed", "scored"))
        phases = {"generation": generated - began, "passes": passed - generated, "update": stopped - scored}
        return {
            "phases": {name: round(seconds, 3) for name, seconds in phases.items()},
            "wall_seconds": round(wall, 3),
        }


def _train_one_step(trainer: VTGRPOTrainer) -> tuple[dict[str, Any], dict[int, float]]:
    """What was measured, and when each rollout ended."""
    from transformers import TrainerCallback

    class AtStepEnd(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            measured.update(stopwatch.stop())

    measured: dict[str, Any] = {}
    stopwatch = _Stopwatch(trainer)
    trainer.add_callback(AtStepEnd())
    trainer.train()
    return measured, stopwatch.ended


def _completions(trainer: VTGRPOTrainer, ended: dict[int, float], group: int) -> list[Completion]:
    from vt_trl.judges.reward import last_answer
    from vt_trl.types import RolloutStatus

    completions = []
    for index, rollout in enumerate(trainer.last_rollouts):
        prediction = rollout.answer
        if prediction is None and rollout.status is RolloutStatus.NO_ANSWER:
            prediction = last_answer(rollout.turns[-1].text)  # as the judge reads it
        completions.append(
            Completion(
                prompt=index // group,
                question=f"Which letter is on picture {index // group}?",
                answer=list(rollout.row["answer"]),
                prediction=prediction,
                status=rollout.status.value,
                ended=round(ended[id(rollout)], 4),
            )
        )
    return completions


def _header(
    options: argparse.Namespace, command: str, trainer: VTGRPOTrainer, measured: dict[str, Any]
) -> dict[str, Any]:
    from demos.reading.stages import provenance

    args = trainer.args
    names = ("environment", "num_generations", "per_device_train_batch_size", "gradient_accumulation_steps", "beta")
    names += ("temperature", "max_turn_tokens", "max_completion_length", "generation_chunk", "seed")
    return {
        "workload": "one training step of a tiny Qwen2.5-VL on the reading task, transformers backend",
        "note": _NOTE,
        "settings": {
            "prompts": options.prompts,
            "warm_steps": options.warm_steps,
            "threads": 1,
            "parameters": sum(weight.numel() for weight in trainer.model.parameters()),
            **{name: getattr(args, name) for name in names},
        },
        **measured,
        "command": command,
        **provenance(),
    }


def _write(path: Path, header: dict[str, Any], completions: Sequence[Completion]) -> None:
    lines = [json.dumps(one) for one in (header, *map(asdict, completions))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))  # the same text is the same file


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record_step", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WORKLOAD)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--group", type=int, default=16, help="completions per prompt")
    parser.add_argument("--warm-steps", type=int, default=130, help="steps of the policy's warm start")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Record a step and write it; returns the header."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from demos.reading.__main__ import RECIPE
    from vt_trl.yaml_file import read_yaml

    torch.set_num_threads(1)  # processor seconds are the seconds of a clock on one thread only
    prompts = read_yaml(RECIPE)["environment_args"]["prompts"]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        _warm_start(options, prompts, base)
        trainer = _make_trainer(options, base, Path(folder) / "out")
        measured, ended = _train_one_step(trainer)
    completions = _completions(trainer, ended, options.group)
    header = _header(options, shlex.join(["python", "-m", "benchmarks.record_step", *argv]), trainer, measured)
    _write(options.out, header, completions)
    right = sum(one.prediction in one.answer for one in completions)
    answered = sum(one.prediction is not None for one in completions)
    print(f"{options.out.name}: {len(completions)} rollouts, {answered} answered, {right} right; {measured}")
    return header


if __name__ == "__main__":
    main()
