"""An evaluation on the terminal: a bar while it runs, and the results at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vt_trl.evaluation.page import write_evaluation_page
from vt_trl.evaluation.paper import print_paper
from vt_trl.evaluation.run import RESULTS, Plan, evaluate
from vt_trl.transcripts.show import NOTHING, number, share


def evaluate_and_show(plan: Plan, out: str | Path, paper: bool = False, console: Console | None = None) -> dict:
    """Evaluate, write the report page, and print the results, as a table or in the paper's layout."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = console or Console()
    # As on a terminal in a notebook, too: there a bar that redirects what is printed would print itself without end.
    with Progress(*columns, console=Console(stderr=True, force_jupyter=False)) as bar:
        tasks: dict[str, Any] = {}

        def advance(label: str, done: int, rows: int) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(label, total=rows)
            bar.update(tasks[label], completed=done)

        report = evaluate(plan, out, advance)
    page = write_evaluation_page(out, report)
    if paper:
        print_paper(report["cells"], console)
    else:
        print_results(report, console)
    console.print(f"{Path(out) / RESULTS}, {page}; episodes: vt-trl view {out}", markup=False, soft_wrap=True)
    return report


def print_results(report: Mapping[str, Any], console: Console) -> None:
    """A table per model and data set with a line per policy, and what could not be scored."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell in report["cells"]:
        groups.setdefault(f"{cell['model']} on {cell['data']}, {cell['rows']} rows", []).append(cell)
    for title, cells in groups.items():
        table = Table(title=Text(title), title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
        for name in ("policy", "right %", "95 %", "asked %", "visual", "of full %", "written", "s"):
            table.add_column(name, no_wrap=True)
        for cell in cells:
            table.add_row(Text(cell["policy"]), *_numbers(cell))
        console.print(table)
        for cell in cells:
            if cell["unreadable"] or cell["judge_failed"]:
                console.print(_left_out(cell), markup=False, highlight=False, soft_wrap=True)


def _numbers(cell: Mapping[str, Any]) -> list[str]:
    edges = [f"{100 * edge:.1f}" for edge in cell["accuracy_interval"] or ()]
    return [
        _percent(cell["accuracy"]),
        "-".join(edges) or NOTHING,
        _percent(cell["request_rate"]),
        number(cell["visual_tokens"]),
        _percent(cell["visual_tokens_share"]),
        number(cell["generated_tokens"]),
        number(cell["seconds"]),
    ]


def _percent(value: float | None) -> str:
    return NOTHING if value is None else number(100 * value)


def _left_out(cell: Mapping[str, Any]) -> str:
    return (
        f"{cell['policy']}: {cell['unreadable']} rows could not be shown and {cell['judge_failed']} not be judged; "
        f"none of them is in the accuracy (with all unjudged wrong: {share(cell['accuracy_at_least'])})."
    )
