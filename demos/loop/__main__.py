"""``make demo-loop``: a tiny model improves itself on a CPU by the loop of OpenVLThinker (arXiv 2503.17352).

Per round: SFT from the base model on the newest traces -> GRPO on medium rows -> GRPO on hard rows -> the better model
writes the next traces. Beside it, GRPO alone and SFT alone on the same rows and as many sequences. Writes
``loop.json`` and ``loop.html``. A run that was stopped goes on with the stages that are missing.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demos.runs import single_thread

if TYPE_CHECKING:
    from demos.loop.stages import Sizes, World

RESULTS = Path("docs/results")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demos.loop", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/loop"), help="models, rows and traces")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for loop.json and loop.html")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--small", type=float, default=1.0, help="share of all sizes, for a quick look")
    parser.add_argument("--jobs", type=int, default=2, help="seeds side by side, one thread each")
    return parser.parse_args(argv)


def sizes_of(options: argparse.Namespace) -> Sizes:
    """The demo's sizes, ``--small`` of each; a tiny share teaches nothing and shows that everything runs."""
    from dataclasses import replace

    from demos.loop.stages import Sizes

    full, share = Sizes(), options.small

    def part(given: Any, **least: int) -> dict[str, int]:
        return {name: max(floor, round(getattr(given, name) * share)) for name, floor in least.items()}

    warm = replace(full.warm, **part(full.warm, rows=300, glyph_steps=2, steps=100))
    sizes = part(full, seed_rows=48, pool_rows=48, medium_steps=2, hard_steps=2, eval_rows=32)
    return replace(full, rounds=options.rounds or full.rounds, warm=warm, **sizes)


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
    """The loop and both controls of one seed; what was finished is only read."""
    from demos.loop.stages import World

    single_thread()
    world = World(out / f"seed{seed}", base, seed, sizes)
    began = time.process_time()
    start = world.measure("base-score", base)
    rounds, trained = run_loop(world)
    total = world.spent(*trained)
    everything = world.all_rows()
    taught = world.sft("sft-only", world.distill("sft-only-traces", everything), total)
    steps = math.ceil(total / world.batch)
    rewarded = world.grpo("rl-only-medium", base, world.only(everything, "medium"), steps // 2)
    rewarded = world.grpo("rl-only-hard", rewarded, world.only(everything, "hard"), steps - steps // 2)
    found = {"rl_only": world.measure("rl-only-score", rewarded), "sft_only": world.measure("sft-only-score", taught)}
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
        },
        "rows": world.count(everything),
        "stages": stages,
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def verdict(seeds: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """What the loop was to show, as measured: in every seed."""
    return {
        "accuracy rises over two rounds": all(s["base"] < s["rounds"][0] < s["rounds"][1] for s in seeds),
        "better than GRPO alone": all(s["rounds"][-1] > s["rl_only"] for s in seeds),
        "better than SFT alone": all(s["rounds"][-1] > s["sft_only"] for s in seeds),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the demo; returns the results."""
    options = parse_args(argv)
    began = time.perf_counter()
    # Idle threads sleep instead of spinning: next to other programs, spinning made a step ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from demos.loop.report import show, write_page
    from demos.loop.stages import make_base, provenance

    sizes = sizes_of(options)
    single_thread()
    base = make_base(options.out / "base", sizes, lambda done, loss: done % 50 or print(f"base {done}: {loss:.2f}"))
    work = [(options.out, base, seed, sizes) for seed in options.seeds]
    if options.jobs == 1:
        seeds = [run_seed(*one) for one in work]
    else:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            seeds = list(pool.map(run_seed, *zip(*work, strict=True)))
    about = {"wall_seconds": round(time.perf_counter() - began, 1), "jobs": options.jobs, "sizes": asdict(sizes)}
    about |= {"command": "make demo-loop", **provenance()}
    results = {"seeds": seeds, "met": verdict(seeds), "about": about}
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "loop.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results, write_page(results, options.results / "loop.html"))
    return results


if __name__ == "__main__":
    main()
