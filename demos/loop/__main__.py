"""``make demo-loop``: a tiny model improves itself on a CPU by the loop of OpenVLThinker (arXiv 2503.17352).

Per round: SFT from the base model on the newest traces -> GRPO on medium rows -> GRPO on hard rows -> the better model
writes the next traces. Beside it, GRPO alone and SFT alone on the same rows and as many sequences, and SFT on the
loop's seed traces. Writes ``loop.json`` and ``loop.html`` into ``runs/loop``. A run that was stopped goes on with the
stages that are missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demos.runs import kept, single_thread

if TYPE_CHECKING:
    from demos.loop.stages import Sizes


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demos.loop", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/loop"), help="models, rows, traces and results")
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


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the demo; returns the results."""
    options = parse_args(argv)
    began = time.perf_counter()
    # Idle threads sleep instead of spinning: next to other programs, spinning made a step ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from demos.loop.arms import run_seed  # of a module that a spawned process finds, unlike __main__
    from demos.loop.report import show, verdict, write_page
    from demos.loop.stages import make_base, provenance

    sizes = sizes_of(options)
    options.out.mkdir(parents=True, exist_ok=True)
    begun = kept(options.out / "sizes.json", lambda: asdict(sizes))
    if begun != json.loads(json.dumps(asdict(sizes))):
        raise SystemExit(f"{options.out} holds a run of other sizes (sizes.json): remove it, or give another --out.")
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
    (options.out / "loop.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results, write_page(results, options.out / "loop.html"))
    return results


if __name__ == "__main__":
    main()
