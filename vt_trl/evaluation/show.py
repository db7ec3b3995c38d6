"""An evaluation on the terminal: a bar while it runs, and the results at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vt_trl.evaluation.page import write_evaluation_page
from vt_trl.evaluation.paper import print_paper
from vt_trl.evaluation.run import RESULTS, Plan, evaluate
from vt_trl.transcripts.show import number, share


def evaluate_and_show(plan: Plan, out: str | Path, paper: bool = False, console: Console | None = None) -> dict:
    """Evaluate, write the report page, and print the results, as a table or in the paper's layout."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = console or Console()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def advance(label: str, rows: int) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(label, total=None)
            bar.advance(tasks[label], rows)

        report = evaluate(plan, out, advance)
    page = write_evaluation_page(out, report)
    if paper:
        print_paper(report["cells"], console)
    else:
        print_results(report, console)
    console.print(f"{Path(out) / RESULTS}, {page}; episodes: vt-trl view {out}", markup=False, soft_wrap=True)
    return report


def print_results(report: Mapping[str, Any], console: Console) -> None:
    """One line per cell, and what could not be scored."""
    table = Table()
    for name in ("model", "data", "policy", "accuracy", "95 % interval", "asked", "visual tokens", "generated", "s"):
        table.add_column(name, overflow="fold")
    for cell in report["cells"]:
        low, high = cell["accuracy_interval"] or (None, None)
        table.add_row(
            *(cell[name] for name in ("model", "data", "policy")),
            share(cell["accuracy"]),
            f"{share(low)} to {share(high)}",
            share(cell["request_rate"]),
            f"{number(cell['visual_tokens'])} ({share(cell['visual_tokens_share'])})",
            number(cell["generated_tokens"]),
            number(cell["seconds"]),
        )
    console.print(table)
    for cell in report["cells"]:
        if cell["unreadable"] or cell["judge_failed"]:
            console.print(
                f"{cell['model']}, {cell['data']}, {cell['policy']}: of {cell['rows']} rows {cell['unreadable']} "
                f"could not be shown and {cell['judge_failed']} not be judged; none of them is in the accuracy.",
                markup=False,
                soft_wrap=True,
            )
