"""Kill a training run again and again, resume it each time, and compare every step with a run that was left alone.

    python -m benchmarks.kill --kills 20 --json FILE

Each kill is a SIGKILL at a random moment of a phase that is chosen in turn: rollout, update, or while a checkpoint is
being written. The run samples (transformers backend, fp32, one thread) with two updates per generation, so that half
of the checkpoints fall between them. What is compared, bit by bit: loss, gradient norm, reward, a digest of the
sampled tokens of each step, and the final weights. ``mismatches`` counts steps or weights that differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from benchmarks.reporting import show, write
from demos.reading.stages import provenance
from demos.reading.task import make_dataset
from vt_trl.config import VTGRPOConfig
from vt_trl.tiny import build_tiny
from vt_trl.trainer import VTGRPOTrainer

PHASES = ("rollout", "update", "saving")
COMPARED = ("loss", "grad_norm", "reward", "sampled")


def parity(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that random samples differ in."""
    return [float(sum(ids) % 2) for ids in completion_ids]


class Diary(TrainerCallback):
    """Writes each step's figures to a file, and the current phase to a pipe for whoever wants to kill it."""

    def __init__(self, path: Path, pipe: int):
        self.path, self.pipe, self.trainer = path, pipe, None

    def enter(self, phase: str) -> None:
        os.write(self.pipe, phase[0].encode())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with (self.path.parent / "starts.txt").open("a", encoding="utf-8") as file:
            file.write(f"{state.global_step}\n")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if "loss" in (logs or {}):
            tokens = [turn.token_ids for rollout in self.trainer.last_rollouts for turn in rollout.turns]
            figures = {name: float(logs[name]).hex() for name in COMPARED[:3] if name in logs}
            if "reward" in logs:  # the step that generated; after a resume the next one has no rollouts to look at
                figures["sampled"] = hashlib.blake2b(repr(tokens).encode(), digest_size=8).hexdigest()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **figures}) + "\n")


def watched(trainer: VTGRPOTrainer, diary: Diary) -> VTGRPOTrainer:
    """A trainer that says which phase it is in."""

    def announce(phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            diary.enter(phase)
            return method(*args, **kwargs)

        return call

    trainer.runner.run = announce("rollout", trainer.runner.run)
    trainer.compute_loss = announce("update", trainer.compute_loss)
    trainer._save_checkpoint = announce("saving", trainer._save_checkpoint)
    diary.trainer = trainer
    return trainer


def train(model: Path, rows: Dataset, out: Path, steps: int, pipe: int) -> None:
    """Start or resume the run in this process, to its end."""
    torch.set_num_threads(1)
    args = VTGRPOConfig(
        str(out),
        environment_args={"min_pixels": 3136},
        penalty="none",
        num_generations=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=4,  # two updates per generation
        max_steps=steps,
        max_turn_tokens=8,
        max_completion_length=64,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        beta=0.01,
        use_cpu=True,
        gradient_checkpointing=False,
        mask_truncated_completions=False,
        logging_steps=1,
        save_steps=1,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        seed=7,
    )
    diary = Diary(out / "diary.jsonl", pipe)
    trainer = VTGRPOTrainer(str(model), args, rows, reward_funcs=[parity, parity], callbacks=[diary])
    watched(trainer, diary).train(resume_from_checkpoint=True)
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(trainer.model.state_dict().items()):
        digest.update(name.encode() + weight.contiguous().numpy().tobytes())
    (out / "weights.txt").write_text(digest.hexdigest(), encoding="utf-8")


def run_in_child(job: Callable[[int], None], victim: str | None, delay: float) -> bool:
    """Run ``job`` in a forked process, which has everything imported; kill it ``delay`` seconds into ``victim``.

    Returns whether it was killed. Raises RuntimeError when it fails by itself.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        status = 1
        try:
            job(writing)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    killed, skip = False, random.randrange(6)  # not always in the first phase of its kind
    with os.fdopen(reading, "rb", buffering=0) as phases:
        while (phase := phases.read(1)) and not killed:
            if victim is not None and phase.decode() == victim[0]:
                if skip == 0:
                    time.sleep(delay)
                    os.kill(child, signal.SIGKILL)
                    killed = True
                skip -= 1
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"the run failed by itself with status {os.WEXITSTATUS(status)}")
    return False


def figures(out: Path) -> dict[int, list[dict[str, Any]]]:
    """Step -> what each try at it wrote; a line that a kill cut off is left out."""
    tries: dict[int, list[dict[str, Any]]] = {}
    for line in (out / "diary.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        tries.setdefault(entry["step"], []).append({name: entry.get(name) for name in COMPARED})
    return tries


@dataclass
class Tally:
    """What the killed runs came to, all of them together."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    resumed: int = 0
    from_nothing: int = 0  # killed before there was a checkpoint to resume from
    steps_compared: int = 0
    mismatches: int = 0

    def add_run(self, alone: Path, killed: Path) -> None:
        """Compare a run that has come to its end, every try at every step, with the one left alone."""
        expected, found = figures(alone), figures(killed)
        starts = [int(line) for line in (killed / "starts.txt").read_text(encoding="utf-8").split()]
        self.runs += 1
        self.resumed += sum(step > 0 for step in starts)
        self.from_nothing += starts.count(0) - 1
        for step, (right, *_) in expected.items():
            tries = found.get(step, [{}])  # a step that nobody wrote down is a mismatch as well
            self.steps_compared += len(tries)
            self.mismatches += sum(one != right for one in tries)
        self.mismatches += (alone / "weights.txt").read_text() != (killed / "weights.txt").read_text()


def measure(kills: int, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """One undisturbed run, and killed ones until there have been ``kills``; and how they compare."""
    random.seed(seed)
    model = build_tiny(folder / "model", hidden_size=64)
    rows = make_dataset(64, 0.5, seed)
    alone, killed = folder / "alone", folder / "killed"
    alone.mkdir(parents=True)
    began = time.perf_counter()
    run_in_child(lambda pipe: train(model, rows, alone, steps, pipe), None, 0.0)
    seconds = time.perf_counter() - began
    tally = Tally()
    while tally.kills.total() < kills or killed.exists():
        killed.mkdir(exist_ok=True)
        spared = tally.kills.total() >= kills
        victim = None if spared else PHASES[tally.kills.total() % len(PHASES)]
        delay = random.random() * (0.02 if victim == "saving" else 0.1)
        if run_in_child(lambda pipe: train(model, rows, killed, steps, pipe), victim, delay):
            tally.kills[victim] += 1
        else:  # it came to its end
            tally.add_run(alone, killed)
            shutil.rmtree(killed)
    return {
        "kills": tally.kills.total(),
        "kills_by_phase": dict(tally.kills),
        "resumed": tally.resumed,
        "killed_before_the_first_checkpoint": tally.from_nothing,
        "mismatches": tally.mismatches,
        "steps": steps,
        "steps_compared": tally.steps_compared,
        "killed_runs": tally.runs,
        "seconds_undisturbed": round(seconds, 1),
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns the report."""
    options = parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(options.kills, options.steps, options.seed, Path(folder)) | provenance()
    show("Killed and resumed against left alone", report, hidden=("versions",))
    write(report, options.json)
    return report


if __name__ == "__main__":
    main()
