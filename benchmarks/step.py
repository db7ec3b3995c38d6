"""An update on the same rollouts by stock TRL 1.16 and by vt_trl, with everything on and with each lever off.

    python -m benchmarks.step --json FILE                 # on this CPU, a quarter of the tokens
    python -m benchmarks.step --device cuda --shape 7b --lora --json FILE

Groups of 16 rollouts with pictures of 350 and 1400 tokens, 300 tokens of text, turns of about 150, and 10, 40 or 80%
of the rollouts looking at the larger picture (on a CPU all of these divided by four). Rollouts are given, so both ways
compute the same numbers; their gradients are compared before anything is timed. Ways take turns, and a ratio is the
median over turns of stock's seconds over ours in the same turn; on a CPU these are processor seconds, so use one
thread. ``ratio_preprocess`` is that of pictures of full size, by the image processor alone. Memory is the most that is
allocated during forward and backward on top of weights and gradients, by torch's profiler on a CPU, in a run of its
own. Where vLLM is installed, rollout (one group, weight sync included) and weight sync are measured as well.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.reporting import write
from benchmarks.step_engine import measure_engine
from benchmarks.step_work import FULL, LEVERS, SHAPES, TOKENS, Ours, Sizes, Stock, Work, advantages, make_checkpoint
from benchmarks.step_work import make_rollouts as draw
from demos.reading.stages import provenance
from vt_trl.preflight.meter import Meter

PHASES = ("preprocess", "old", "training")
ON = "vt_trl"
WAYS = ("stock", ON)


def timed(work: Work, device: str, run: Callable[[], None]) -> float:
    """Seconds of a clock on a GPU; processor seconds on a CPU, which other programs cannot lengthen."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def one_turn(work: Work, rollouts: list[Any], scale: torch.Tensor, device: str) -> dict[str, float]:
    """Seconds of each phase; the gradients stay, to be compared."""
    work.zero()
    seconds = {"preprocess": timed(work, device, lambda: work.preprocess(rollouts, scale))}
    seconds["old"] = timed(work, device, work.old_pass)
    del work.batch["old_per_token_logps"]  # one update per generation: the training pass is its own old pass
    seconds["training"] = timed(work, device, work.training_pass)
    return seconds | {"total": sum(seconds.values())}


def peak_of(work: Work, rollouts: list[Any], scale: torch.Tensor, device: str) -> float:
    """MiB at the most during the training pass, gradients in place."""
    work.preprocess(rollouts, scale)
    meter = Meter(torch.device(device))
    with meter.section("training"):
        work.training_pass()
    work.zero()
    return meter.peak["training"] / 2**20


def measure_rate(ways: dict[str, Any], rollouts: list[Any], scale: Any, options: Any) -> dict[str, Any]:
    """Seconds by way and phase over ``options.repeats`` turns; ways take turns within each."""
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    norms = {}
    for turn in range(options.repeats + 1):
        for name, (work, off) in ways.items():
            with work.without(off) if isinstance(work, Ours) else torch.enable_grad():
                found = one_turn(work, rollouts, scale, options.device)
            norms[name] = work.gradient_norm()
            work.zero()
            if turn:  # the first one warms up
                seconds[name].append(found)
    allowed = 1e-3 if options.device == "cpu" else 5e-2
    for name, norm in norms.items():
        if abs(norm - norms["stock"]) > allowed * norms["stock"]:
            raise RuntimeError(f"{name} has a gradient of norm {norm}, and stock TRL one of {norms['stock']}")
    return seconds


def summary(seconds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Median seconds of each phase, and stock's over ours by turn: median, least and most."""
    rows = {}
    for name, turns in seconds.items():
        row: dict[str, Any] = {p: round(statistics.median(t[p] for t in turns), 4) for p in (*PHASES, "total")}
        for phase in ("preprocess", "training", "total"):
            ratios = [s[phase] / t[phase] for s, t in zip(seconds["stock"], turns, strict=True)]
            row[f"ratio_{phase}"] = [round(f(ratios), 2) for f in (statistics.median, min, max)]
        rows[name] = row
    return rows


def measure_pictures(stock: Stock, ours: Ours, rollouts: list[Any], repeats: int) -> dict[str, Any]:
    """Image preprocessing alone, of groups with pictures of 350 and 1400 tokens."""
    turns = []
    for _ in range(repeats + 1):
        turns.append([timed(work, "cpu", lambda work=work: work.pictures(rollouts)) for work in (stock, ours)])
    turns = turns[1:]  # the first one warms up
    ratios = [before / after for before, after in turns]
    return {
        "seconds": {"stock": round(turns[-1][0], 4), ON: round(turns[-1][1], 4)},
        "ratio": round(statistics.median(ratios), 2),
        "spread": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    torch.set_num_threads(options.threads or torch.get_num_threads())
    sizes = TOKENS[options.tokens]
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    peft = None
    if options.lora:
        from peft import LoraConfig

        peft = LoraConfig(r=64, lora_alpha=128, target_modules=r".*language_model.*_proj")
    rates: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(Path(folder), options.shape)
        same = (checkpoint, sizes, options.micro_batch, options.device, dtype, peft)
        ours = Ours(*same)
        stock = Stock(*same, banned=ours.trainer.banned_ids)
        scale = advantages(sizes)
        for percent in options.rates:
            rollouts = draw(checkpoint, sizes, percent)
            ways = {"stock": (stock, ()), ON: (ours, ())}
            if percent == options.levers_at:
                ways |= {f"without {name}": (ours, (name,)) for name in LEVERS}
                ways["all off"] = ours, tuple(LEVERS)
            rates[str(percent)] = {"ways": summary(measure_rate(ways, rollouts, scale, options))}
            for name, (work, off) in ways.items():
                with work.without(off) if isinstance(work, Ours) else torch.enable_grad():
                    peak = peak_of(work, rollouts, scale, options.device)
                rates[str(percent)]["ways"][name] |= {
                    "peak_mib": round(peak, 1),
                    "pixel_mib": round(work.pixel_bytes / 2**20, 4),
                }
        pictures = measure_pictures(stock, ours, draw(checkpoint, FULL, options.levers_at), options.repeats)
        groups = {str(percent): draw(checkpoint, sizes, percent) for percent in options.rates}
        engine = measure_engine(checkpoint, sizes, groups, options.device, options.repeats)
    return report_of(rates, pictures, options, sizes, command) | {"engine": engine}


def report_of(
    rates: dict[str, Any], pictures: dict[str, Any], options: argparse.Namespace, sizes: Sizes, command: str
) -> dict[str, Any]:
    at = str(options.levers_at if str(options.levers_at) in rates else options.rates[0])
    stock, ours = rates[at]["ways"]["stock"], rates[at]["ways"][ON]
    machine = provenance()
    if options.device == "cuda":
        machine["machine"] = torch.cuda.get_device_name()
    return {
        "command": command,
        "shape": options.shape,
        "lora": options.lora,
        "threads": torch.get_num_threads(),
        "sizes": vars(sizes) | {"micro_batch": options.micro_batch, "repeats": options.repeats},
        "ratio_update": {rate: rates[rate]["ways"][ON]["ratio_training"][0] for rate in rates},
        "ratio_preprocess": pictures["ratio"],
        "ratio_pixels": round(stock["pixel_mib"] / ours["pixel_mib"], 2),
        "ratio_peak_memory": round(stock["peak_mib"] / ours["peak_mib"], 2),
        "pictures": pictures,
        "rates": rates,
    } | machine


def print_report(report: dict[str, Any]) -> None:
    for rate, found in report["rates"].items():
        engine = (report["engine"] or {}).get(rate)
        table = Table(
            "",
            *PHASES,
            "total",
            "rollout",
            "sync",
            "update, x",
            "spread",
            "peak MiB",
            "pixels MiB",
            title=f"{rate}% ask, seconds",
        )
        for name, row in found["ways"].items():
            ratio, low, high = row["ratio_training"]
            table.add_row(
                name,
                *(f"{row[phase]:.3g}" for phase in (*PHASES, "total")),
                *(f"{engine[phase][name]:.3g}" if engine and name in WAYS else "-" for phase in ("rollout", "sync")),
                f"{ratio:.2f}",
                f"{low:.2f}-{high:.2f}",
                f"{row['peak_mib']:.0f}",
                f"{row['pixel_mib']:.1f}",
            )
        Console(width=140).print(table)
    print({name: value for name, value in report.items() if name.startswith("ratio")})


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="cpu", help="of the model; its weights are random")
    parser.add_argument("--tokens", choices=tuple(TOKENS), help="default: quarter on a CPU, else full")
    parser.add_argument("--rates", type=int, nargs="+", default=[10, 40, 80], help="percent of the rollouts that ask")
    parser.add_argument("--levers-at", type=int, default=40, help="the rate at which each lever is switched off")
    parser.add_argument("--micro-batch", type=int, default=16, help="rollouts per forward, for both")
    parser.add_argument("--lora", action="store_true", help="rank 64 on the language model; default: all weights")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument("--json", type=Path, default=None, help="write the report there")
    options = parser.parse_args(argv)
    options.tokens = options.tokens or ("quarter" if options.device == "cpu" else "full")
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns the report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    report = run(parse_args(argv), shlex.join(["python", "-m", "benchmarks.step", *argv]))
    print_report(report)
    write(report, parse_args(argv).json)
    return report


if __name__ == "__main__":
    main()
