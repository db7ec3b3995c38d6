"""The README's table, made from the committed reports: ``python -m demos.reading.table --write README.md``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from demos.tables import RESULTS, made_on, put_between, show_table, span, table_parser

START = "<!-- demo table: written by `python -m demos.reading.table`, checked by tests/test_readme.py -->"
END = "<!-- end of demo table -->"
_ROWS = (  # label, key in before/after, key of always-low, key of always-full
    ("accuracy", "accuracy", "always_low_accuracy", "always_full_accuracy"),
    ("visual tokens per picture", "visual_tokens_mean", None, "visual_tokens_always_full"),
    ("asks on easy pictures", "request_rate_easy", None, None),
    ("asks on hard pictures", "request_rate_hard", None, None),
)


def load_reports() -> list[dict[str, Any]]:
    """The committed demo reports, by seed."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("demo_seed*.json")]
    return sorted(reports, key=lambda report: report["seed"])


def table(reports: Sequence[dict[str, Any]]) -> str:
    """Markdown: one column per policy, each cell the span over the seeds, then where the figures come from."""
    lines = ["| held-out pictures | always low | always full | before GRPO | after GRPO |", "|---|---|---|---|---|"]
    for label, key, low, full in _ROWS:
        fixed = [span([report[name] for report in reports]) if name else "" for name in (low, full)]
        moving = [span([report[when][key] for report in reports]) for when in ("before", "after")]
        lines.append(f"| {' | '.join([label, *fixed, *moving])} |")
    first = reports[0]
    minutes = span([report["wall_seconds"] / 60 for report in reports])
    lines.append("")
    lines.append(
        f"Seeds {', '.join(str(report['seed']) for report in reports)}; {first['grpo_steps']} GRPO steps; "
        f"{minutes} minutes; {made_on(first)}; "
        f"[docs/results](docs/results), `make demo SEED=...`."
    )
    return "\n".join(lines)


def with_table(text: str, reports: Sequence[dict[str, Any]]) -> str:
    """``text`` with what stands between the two markers replaced."""
    return put_between(text, START, END, table(reports))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return table_parser("demos.reading.table", __doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    show_table(parse_args(argv).write, table(load_reports()), START, END)


if __name__ == "__main__":
    main()
