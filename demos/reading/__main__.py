"""``make demo``: a tiny model learns on a CPU when to ask for the full picture, and a report shows whether it did.

Warm start (both moves, no preference) -> controls -> evaluation -> GRPO by the ordinary recipe path -> evaluation.
Writes ``report.json`` and ``report.html`` into ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from demos.runs import write_page

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "demo.yaml"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demos.reading", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--warm-steps", type=int, default=None, help="steps of the warm start (default: WarmStart's)")
    parser.add_argument("--grpo-steps", type=int, default=None, help="steps of GRPO (default: the recipe's max_steps)")
    parser.add_argument("--eval-rows", type=int, default=400, help="held-out pictures")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(argv)


def progress_bar() -> Progress:
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the demo; returns the report."""
    options = parse_args(argv)
    started = time.perf_counter()
    # Idle threads sleep instead of spinning: next to other programs, spinning made a step ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from demos.reading import stages

    torch.set_num_threads(options.threads)
    with progress_bar() as bar:
        world = stages.World.make(options.recipe, options.out, options.seed, options.eval_rows)
        stages.make_base(world, bar, options.warm_steps)
        controls = stages.measure_controls(world, bar)
        before = stages.measure(world, world.base, "before GRPO", bar)
        trainer = stages.run_grpo(world, bar, options.grpo_steps)
        after = stages.measure(world, world.grpo, "after GRPO", bar)
    report = {
        "before": before,
        "after": after,
        **controls,
        "hard_share": stages.EVAL_HARD_SHARE,
        "grpo_steps": trainer.state.global_step,
        "seed": options.seed,
        "wall_seconds": round(time.perf_counter() - started, 1),
        **stages.provenance(),
    }
    report["targets_met"] = stages.targets(report)
    path = options.out / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    page = write_page(options.out / "report.html", "vt_trl: learning when to look closely", report, trainer)
    stages.print_summary(report, path, page)
    return report


if __name__ == "__main__":
    main()
