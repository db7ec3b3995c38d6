"""An evaluation in the layout of the paper (VisionThink, arXiv 2507.13348): Table 2, Figure 4, Figure 5.

Table 2: scores by benchmark, and their mean relative to the first model's always-full. Figure 4: seconds by benchmark.
Figure 5: request rates by benchmark. What was not run is a dash.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vt_trl.metrics import mean

BENCHMARKS = (  # the columns of Table 2, in its order
    *("ChartQA", "OCRBench", "DocVQA", "MME", "MMVet", "RealWorldQA", "POPE", "MathVista", "MathVerse"),
)
MISSING = "-"
_NOTE = (
    "Scores are shares of right answers by the judge of this run, in %. The paper's own scores are those of each "
    "benchmark (MME: a sum of points), so compare rows of this table with each other."
)


def paper_tables(cells: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, heading and rows of each table; ``cells`` are those of ``results.json``.

    Data sets are matched with benchmarks by name, whatever its case and signs; others stand behind them.
    """
    known = {_plain(name) for name in BENCHMARKS}
    others = [name for name in dict.fromkeys(cell["data"] for cell in cells) if _plain(name) not in known]
    columns = [*BENCHMARKS, *others]
    found = {(cell["model"], cell["policy"], _plain(cell["data"])): cell for cell in cells}
    rows = list(dict.fromkeys((cell["model"], cell["policy"]) for cell in cells))

    def values(row: tuple[str, str], name: str) -> list[Any]:
        return [(found.get((*row, _plain(column))) or {}).get(name) for column in columns]

    first = next(((model, policy) for model, policy in rows if policy == "always-full"), None)
    base = values(first, "accuracy") if first else [None] * len(columns)
    table, times, requests = [], [], []
    for row in rows:
        scores, label = values(row, "accuracy"), " ".join(row)
        ratios = [one / full for one, full in zip(scores, base, strict=True) if one is not None and full]
        tokens = mean(one for one in values(row, "visual_tokens_share") if one is not None)
        table.append([label, _number(tokens, 100), *(_number(one, 100) for one in scores), _number(mean(ratios), 100)])
        times.append([label, *(_number(one) for one in values(row, "seconds"))])
        rates = values(row, "request_rate")
        requests += [[label, *(_number(one, 100) for one in rates)]] if any(one is not None for one in rates) else []
    return [
        ("Table 2: score in %", ["", "visual tokens %", *columns, "average %"], table),
        ("Figure 4: seconds", ["", *columns], times),
        (
            "Figure 5: requests for the full picture in %",
            ["", *columns],
            requests or [["", *[MISSING] * len(columns)]],
        ),
    ]


def print_paper(cells: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print the tables; as plain lines separated by tabs where there is no terminal."""
    console = console or Console()
    for title, heading, rows in paper_tables(cells):
        if not console.is_terminal:
            lines = ["\t".join(line) for line in ([title], heading, *rows)]
            print("\n".join(lines), file=console.file)  # rich would turn the tabs into spaces
            continue
        table = Table(title=title)
        for name in heading:
            table.add_column(name)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(_NOTE, highlight=False, soft_wrap=True)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _number(value: float | None, factor: float = 1.0) -> str:
    return MISSING if value is None or value != value else f"{value * factor:.1f}"
