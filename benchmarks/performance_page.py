"""The figures of docs/performance.md, from the committed reports of ``benchmarks.step`` and ``benchmarks.growth``.

python -m benchmarks.performance_page
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demos.tables import RESULTS, made_on, put_between

STEP, GROWTH = RESULTS / "benchmark_step.json", RESULTS / "benchmark_growth.json"
PAGE = RESULTS.parent / "performance.md"
AT = "40"  # the request rate at which levers are switched off


def update_table(step: Mapping[str, Any]) -> str:
    """How much faster an update is by request rate, and what pictures and memory gain."""
    ratios = [(rate, found["ways"]["vt_trl"]["ratio_training"]) for rate, found in step["rates"].items()]
    rows = "\n".join(f"| {rate}% | {middle:.2f} ({low:.2f}-{high:.2f}) |" for rate, (middle, low, high) in ratios)
    return f"""| ask for the full picture | times faster (least-most) |
|---|---|
{rows}

Image preprocessing of pictures of full size is {step["ratio_preprocess"]:.1f} times faster, pixel tensors take
{step["ratio_pixels"]:.1f} times less memory, and the most that forward and backward allocate is
{step["ratio_peak_memory"]:.1f} times less, all at {AT}%."""


def lever_table(step: Mapping[str, Any]) -> str:
    """Everything on, each lever off, and all off."""
    ways = step["rates"][AT]["ways"].items()
    rows = "\n".join(
        "| {} | {:.2f} ({:.2f}-{:.2f}) | {:.0f} |".format(name, *way["ratio_training"], way["peak_mib"])
        for name, way in ways
    )
    return f"""| at {AT}%, times faster than stock | update (least-most) | peak MiB |
|---|---|---|
{rows}

    {step["command"]}

Report: [{STEP.name}](results/{STEP.name}); {made_on(step)}."""


def engine_table(step: Mapping[str, Any]) -> str:
    """Seconds of a rollout and of a weight sync on a real engine. Raises ValueError where none was measured."""
    if step.get("engine") is None:
        raise ValueError(f"{STEP.name} was made without vLLM: run its command where vLLM is installed.")
    rows = "\n".join(
        "| {}% | {:.2f} | {:.2f} | {:.3f} | {:.3f} |".format(
            rate, *(found[phase][way] for phase in ("rollout", "sync") for way in ("vt_trl", "stock"))
        )
        for rate, found in step["engine"].items()
    )
    return f"""| ask | rollout of a group, s | TRL's tool loop, s | weight sync, s | TRL's, s |
|---|---|---|---|---|
{rows}"""


def growth_table(growth: Mapping[str, Any]) -> str:
    """Measured and counted ratios of each point of the sweeps."""
    points = growth["points"]
    rows = "\n".join(
        f"| {one['sweep']} | {one['value']} | {one['ratio'][0]:.2f} | {one['ratio_on_paper']:.2f} |" for one in points
    )
    return f"| changed | to | times faster | on paper |\n|---|---|---|---|\n{rows}"


def marks(name: str) -> tuple[str, str]:
    """What stands before and after the figures ``name`` on the page."""
    return f"<!-- {name}: written by `python -m benchmarks.performance_page` -->", f"<!-- end of {name} -->"


def with_figures(text: str, step: Mapping[str, Any], growth: Mapping[str, Any]) -> str:
    """``text`` with every block of figures replaced. Raises ValueError where a block's marks are missing."""
    blocks = {
        "update": update_table(step),
        "levers": lever_table(step),
        "engine": engine_table(step),
        "growth": growth_table(growth),
    }
    for name, block in blocks.items():
        text = put_between(text, *marks(name), block)
    return text


def read_reports() -> tuple[dict[str, Any], dict[str, Any]]:
    """The committed reports of the step and of its growth."""
    return json.loads(STEP.read_text(encoding="utf-8")), json.loads(GROWTH.read_text(encoding="utf-8"))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.performance_page", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, default=PAGE, help="the page whose figures to replace")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    page = parse_args(argv).write
    page.write_text(with_figures(page.read_text(encoding="utf-8"), *read_reports()), encoding="utf-8")


if __name__ == "__main__":
    main()
