"""The table of docs/environments.md, made from committed results: ``python -m demos.searching.table --write PAGE``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from demos.tables import RESULTS, put_between, table_program

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
    lines = ["| seed | " + " | ".join(_COLUMNS.values()) + " |", "|---" * (len(_COLUMNS) + 1) + "|"]
    for figures in report["seeds"]:
        lines.append("| " + " | ".join([str(figures["seed"]), *(f"{figures[name]:.2f}" for name in _COLUMNS)]) + " |")
    versions = ", ".join(f"{name} {report['versions'][name]}" for name in ("torch", "transformers", "trl"))
    steps = report["seeds"][0]["cells"]["crops"]["grpo_steps"]
    lines.append("")
    lines.append(
        f"{report['sizes']['eval_rows']} held-out pictures, greedy; {steps} GRPO steps; all three seeds in "
        f"{report['wall_seconds'] / 60:.0f} minutes; {report['machine']}; {versions}; {report['date']}; "
        f"[zoom.json](results/zoom.json)."
    )
    return "\n".join(lines)


def with_table(text: str, report: dict[str, Any]) -> str:
    """``text`` with what stands between the two markers replaced."""
    return put_between(text, START, END, table(report))


def main(argv: Sequence[str] | None = None) -> None:
    table_program("demos.searching.table", __doc__, lambda: table(load_report()), START, END, argv)


if __name__ == "__main__":
    main()
