"""The arms of one seed: the loop, and what it is compared with. Runs in a process of its own."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from demos.loop.stages import Sizes, World
from demos.runs import single_thread


def run_loop(world: World) -> tuple[list[float], list[str]]:
    """The accuracy after each round, and the names of the stages that took gradients."""
    sizes, scores, trained, model = world.sizes, [], [], world.base
    for number in range(1, sizes.rounds + 1):
        if number == 1:
            traces = world.distill("r1-traces", world.rows("seed", sizes.seed_rows))
        else:
            traces = world.own_traces(f"r{number}-traces", model, world.rows(f"pool-{number}", sizes.pool_rows))
        model = world.sft(f"r{number}-sft", traces)
        world.measure(f"r{number}-sft-score", model)
        for kind, steps in (("medium", sizes.medium_steps), ("hard", sizes.hard_steps)):
            rows = world.rows(f"{kind}-{number}", steps * world.batch // world.group)
            model = world.grpo(f"r{number}-{kind}", model, rows, steps)
            trained.append(f"r{number}-{kind}")
        trained.append(f"r{number}-sft")
        scores.append(world.measure(f"r{number}-score", model)["accuracy"])
    return scores, trained


def run_seed(out: Path, base: Path, seed: int, sizes: Sizes) -> dict[str, Any]:
    """The loop and its controls; what was finished is only read."""
    single_thread()
    world = World(out / f"seed{seed}", base, seed, sizes)
    began = time.process_time()
    start = world.measure("base-score", base)
    rounds, trained = run_loop(world)
    total = world.spent(*trained)
    everything = world.all_rows()
    taught = world.sft("sft-only", world.distill("sft-only-traces", everything), total)
    again = world.sft("sft-seed-only", world.out / "r1-traces", total)
    steps = math.ceil(total / world.batch)
    rewarded = world.grpo("rl-only-medium", base, world.only(everything, "medium"), steps // 2)
    rewarded = world.grpo("rl-only-hard", rewarded, world.only(everything, "hard"), steps - steps // 2)
    controls = {"rl_only": rewarded, "sft_only": taught, "sft_seed_only": again}
    found = {name: world.measure(f"{name.replace('_', '-')}-score", model) for name, model in controls.items()}
    stages = {path.stem: json.loads(path.read_text()) for path in sorted(world.out.glob("*.json"))}
    return {
        "seed": seed,
        "base": start["accuracy"],
        "rounds": rounds,
        **{name: one["accuracy"] for name, one in found.items()},
        "sequences": {
            "loop": total,
            "rl_only": world.spent("rl-only-medium", "rl-only-hard"),
            "sft_only": world.spent("sft-only"),
            "sft_seed_only": world.spent("sft-seed-only"),
        },
        "rows": world.count(everything),
        "stages": stages,
        "cpu_seconds": round(time.process_time() - began, 1),
    }
