"""The table of docs/environments.md, from the committed results: ``python -m demos.searching.table --write PAGE``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from demos.tables import RESULTS, made_on, put_between, show_table, table_parser

START = "<!-- search table: written by `python -m demos.searching.table`, checked by tests/test_demo_zoom.py -->"
END = "<!-- end of search table -->"
_COLUMNS = {
    "accuracy_before": "after SFT",
    "accuracy_after": "after GRPO",
    "crop_hits": "crops that hold the letter",
    "accuracy_without_crops": "without crops",
    "accuracy_without_sft": "without SFT",
}


def load_report() -> dict[str, Any]:
    """The committed results of `make demo-zoom`."""
    return json.loads((RESULTS / "zoom.json").read_text(encoding="utf-8"))


def table(report: dict[str, Any]) -> str:
    """Markdown: one line per seed, then where the figures come from."""
    lines = [f"| seed | {' | '.join(_COLUMNS.values())} |", "|---" * (len(_COLUMNS) + 1) + "|"]
    for figures in report["seeds"]:
        lines.append(f"| {' | '.join([str(figures['seed']), *(f'{figures[name]:.2f}' for name in _COLUMNS)])} |")
    steps = report["seeds"][0]["cells"]["crops"]["grpo_steps"]
    lines += [
        "",
        f"{report['sizes']['eval_rows']} held-out pictures, greedy; {steps} GRPO steps; all three seeds in "
        f"{report['wall_seconds'] / 60:.0f} minutes; {made_on(report)}; "
        f"[zoom.json](results/zoom.json), `make demo-zoom`.",
    ]
    return "\n".join(lines)


def with_table(text: str, report: dict[str, Any]) -> str:
    """``text`` with what stands between the two markers replaced."""
    return put_between(text, START, END, table(report))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return table_parser("demos.searching.table", __doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    show_table(parse_args(argv).write, table(load_report()), START, END)


if __name__ == "__main__":
    main()
