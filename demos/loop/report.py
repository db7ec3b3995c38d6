"""What the demo found, as a table on the terminal, as an HTML page and as the table of docs/loop_demo.md.

python -m demos.loop.report --write docs/loop_demo.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from demos.tables import RESULTS, made_on, put_between, show_table, table_parser

LOOP = RESULTS / "loop.json"
START = "<!-- loop table: written by `python -m demos.loop.report`, checked by tests/test_demo_loop.py -->"
END = "<!-- end of loop table -->"
# What the loop is compared with, in the results' terms and in words.
CONTROLS = {"rl_only": "GRPO alone", "sft_only": "SFT alone", "sft_seed_only": "SFT on the seed traces"}
# What the loop was to show: does it hold in a seed?
CLAIMS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "accuracy rises over two rounds": lambda seed: seed["base"] < seed["rounds"][0] < seed["rounds"][1],
    **{
        f"better than {said}": lambda seed, name=name: seed["rounds"][-1] > seed[name]
        for name, said in CONTROLS.items()
    },
}


def verdict(seeds: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Which of the claims hold in every seed."""
    return {claim: met for claim, _, met in claims(seeds)}


def lines(results: Mapping[str, Any]) -> list[list[str]]:
    """The table's cells, headings first: a row per seed and one of means."""
    seeds = results["seeds"]
    count = len(seeds[0]["rounds"])
    heads = ["seed", "base", *(f"round {number}" for number in range(1, count + 1)), *CONTROLS.values()]
    rows = [[s["base"], *s["rounds"], *(s[name] for name in CONTROLS)] for s in seeds]
    mean = [sum(column) / len(column) for column in zip(*rows, strict=True)]
    names = [*(str(s["seed"]) for s in seeds), "mean"]
    return [heads, *([name, *(f"{v:.3f}" for v in row)] for name, row in zip(names, [*rows, mean], strict=True))]


def table(results: Mapping[str, Any]) -> str:
    """Markdown: accuracies, in how many seeds each claim holds, and where the figures come from."""
    heads, *rows = lines(results)
    text = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(f"| {' | '.join(row)} |" for row in rows), ""]
    text += [f"- {claim}: {said}" for claim, said, _ in claims(results["seeds"])]
    first, about = results["seeds"][0], results["about"]
    spent = "; ".join(f"{name.replace('_', ' ')} {count}" for name, count in first["sequences"].items())
    text += [
        "",
        f"Greedy answers to {about['sizes']['eval_rows']} held-out pictures per seed. Sequences that gradients were "
        f"taken on (seed {first['seed']}): {spent}. Rows: {first['rows']}. "
        f"{about['wall_seconds'] / 60:.0f} minutes; {made_on(about)}; "
        f"[loop.json](results/loop.json), `{about['command']}`.",
    ]
    return "\n".join(text)


def claims(seeds: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, bool]]:
    """Each claim, in how many seeds it holds, and whether that is all of them."""
    held = {claim: sum(map(holds, seeds)) for claim, holds in CLAIMS.items()}
    return [(claim, f"in {count} of {len(seeds)} seeds", count == len(seeds)) for claim, count in held.items()]


def with_table(text: str, results: Mapping[str, Any]) -> str:
    """``text`` with what stands between the two markers replaced."""
    return put_between(text, START, END, table(results))


def write_page(results: Mapping[str, Any], path: Path) -> Path:
    """One HTML file: the curve, the table, and the figures of every stage."""
    from vt_trl.images import data_uri
    from vt_trl.plots import plot_rounds
    from vt_trl.transcripts.show import environment

    drawn = plot_rounds(results["seeds"], CONTROLS, "Held-out accuracy")
    heads, *rows = lines(results)
    page = environment().get_template("loop_demo.html.j2")
    text = page.render(
        heads=heads,
        rows=rows,
        claims=claims(results["seeds"]),
        plot={"src": data_uri("svg+xml", drawn.svg), "summary": drawn.summary},
        seeds=results["seeds"],
        about=results["about"],
    )
    path.write_text(text, encoding="utf-8")
    return path


def show(results: Mapping[str, Any], page: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    heads, *rows = lines(results)
    shown = Table(title="Held-out accuracy, greedy")
    for head in heads:
        shown.add_column(head)
    for row in rows:
        shown.add_row(*row)
    console = Console()
    console.print(shown)
    for claim, said, met in claims(results["seeds"]):
        console.print(f"{'[green]yes[/]' if met else '[red]no[/] '} {claim}: {said}", highlight=False)
    console.print(f"{page}, {results['about']['wall_seconds']} s", highlight=False)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return table_parser("demos.loop.report", __doc__.splitlines()[0]).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    show_table(parse_args(argv).write, table(json.loads(LOOP.read_text(encoding="utf-8"))), START, END)


if __name__ == "__main__":
    main()
