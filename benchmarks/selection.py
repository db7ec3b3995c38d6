"""Does `vt-trl prepare select` find the rows that need the full picture? Measured where the truth is known.

    python -m benchmarks.selection --json FILE

The rows are those of the reading task (:mod:`demos.reading.task`): half of the pictures lose their letter when they
are halved. The base model is a tiny Qwen2.5-VL that reads; it is trained once (two minutes) and kept in ``--work``.
A row that is called "needs full" should be hard, one that is called "low is enough" easy. Then the selection is killed
by SIGKILL in its middle and run again: its counts, chosen rows and report must be those of the run left alone.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.kill import run_in_child
from benchmarks.reporting import show, write
from data_prep import select
from data_prep.kinds import Kind
from demos.reading import stages
from demos.reading.__main__ import RECIPE, progress_bar
from demos.reading.task import make_dataset

_ROWS_SEED = 5000  # pictures that the base model was not trained on
_TRUTH = {Kind.NEEDS_FULL: "hard", Kind.LOW_IS_ENOUGH: "easy"}


def base_model(work: Path, steps: int | None) -> Path:
    """The folder of a trained base model; trained now unless it was before."""
    world = stages.World.make(RECIPE, work, seed=0, eval_rows=1)
    done = world.base / "trained.json"  # the untrained checkpoint is saved first, so its files prove nothing
    settings = {"steps": steps, "kinds": ["direct", "answer"]}
    if not done.exists() or json.loads(done.read_text()) != settings:
        with progress_bar() as bar:
            # It only ever answers here, so it is not taught to ask.
            stages.make_base(world, bar, steps, kinds=tuple(settings["kinds"]))
        done.write_text(json.dumps(settings), encoding="utf-8")
    return world.base


def selection(model: Path, rows: Path, out: Path, options: argparse.Namespace) -> argparse.Namespace:
    """The options of ``vt-trl prepare select`` for the reading task."""
    environment = stages.read_yaml(RECIPE)["environment_args"]
    arguments = {
        "dataset": rows,
        "model": model,
        "out": out,
        "max-turn-tokens": 12,
        "shard-rows": options.shard_rows,
        "seed": options.seed,
        "backend": "transformers",
        "environment-args": json.dumps(environment),
    }
    return select.parser().parse_args(
        [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    )


def scores(counts: Sequence[Any], rule: Any) -> dict[str, Any]:
    """Precision and recall of both calls against the task's own ``data_source``."""
    found: dict[str, Any] = {}
    for kind, truth in _TRUTH.items():
        called = [count.source == truth for count in counts if count.kind(rule) is kind]
        true = sum(count.source == truth for count in counts)
        found[f"precision_{kind}"] = round(sum(called) / len(called), 4) if called else None
        found[f"recall_{kind}"] = round(sum(called) / true, 4) if true else None
        found[f"called_{kind}"] = len(called)
    return found


def killed(arguments: argparse.Namespace, kills: int, seed: int) -> int:
    """Run a selection that is killed that many times, then to its end; returns how often it really was killed."""
    random.seed(seed)
    count, happened = select.Job.count, 0

    def job(pipe: int) -> None:
        def announced(self: select.Job, shard: int) -> None:
            os.write(pipe, b"s")
            count(self, shard)

        with patch.object(select.Job, "count", announced):
            select.run(arguments)

    for kill in range(kills + 1):
        happened += run_in_child(job, "shard" if kill < kills else None, random.random())
    return happened


def same_output(one: Path, other: Path) -> bool:
    """Whether two selections have the same counts, rows and page, byte by byte."""
    work = [sorted(path.name for path in (out / "work").glob("*.jsonl")) for out in (one, other)]
    pages = filecmp.cmp(one / "report.html", other / "report.html", shallow=False)
    rows = [[path.read_bytes() for path in sorted((out / "rows").iterdir())] for out in (one, other)]
    counts = work[0] == work[1] and all(
        filecmp.cmp(one / "work" / name, other / "work" / name, shallow=False) for name in work[0]
    )
    return counts and pages and rows[0] == rows[1]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything the report says, but for machine, versions and date."""
    options.work.mkdir(parents=True, exist_ok=True)
    model = options.model or base_model(options.work, options.warm_steps)
    rows, alone, other = (options.work / name for name in ("rows", "alone", "killed"))
    for old in (rows, alone, other):
        shutil.rmtree(old, ignore_errors=True)
    make_dataset(options.rows, 0.5, _ROWS_SEED + options.seed).save_to_disk(rows)
    arguments = selection(model, rows, alone, options)
    began = time.perf_counter()
    select.run(arguments)
    seconds = time.perf_counter() - began
    job = select.Job.of(arguments)
    report = json.loads((alone / "report.json").read_text(encoding="utf-8"))
    result = {"rows": len(job.dataset), **scores(job.counts(), job.rule)}
    result |= {name: report[name] for name in ("rows_by_kind", "chosen", "accuracy", "visual_tokens", "histogram")}
    result |= {"seconds": round(seconds, 1)}
    if options.kills:
        happened = killed(selection(model, rows, other, options), options.kills, options.seed)
        result |= {"kills": happened, "same_output_after_kills": same_output(alone, other)}
    settings = {name: value for name, value in report["settings"].items() if name not in ("model", "dataset")}
    return result | {"settings": settings}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400, help="half of them hard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=None, help="a trained base model instead of our own")
    parser.add_argument("--warm-steps", type=int, default=None, help="steps of its training (default: the demo's)")
    parser.add_argument("--shard-rows", type=int, default=32)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/selection"))
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns the report."""
    options = parse_args(argv)
    torch.set_num_threads(1)
    report = measure(options) | stages.provenance()
    show("Selection by resolution where the truth is known", report, hidden=("versions", "settings", "histogram"))
    write(report, options.json)
    return report


if __name__ == "__main__":
    main()
