"""``vt-trl compare A B``: what changed from one evaluation to another, row by row, and whether chance explains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vt_trl.errors import ConfigError
from vt_trl.evaluation.rows import RowResult
from vt_trl.evaluation.shards import Cell, read_results
from vt_trl.evaluation.stats import paired
from vt_trl.policies import parse_policy
from vt_trl.transcripts.show import number

_SHOWN = 3  # ids named in an error


def compare(
    first: str | Path,
    second: str | Path,
    policies: Sequence[str] = (),
    models: Sequence[str] = (),
    common: bool = False,
) -> list[dict[str, Any]]:
    """Second minus first, for every pair of cells on the same data set.

    ``policies``: the first's and the second's; default: the same on both sides. ``models``: likewise; default: the
    only one of each side, else the same on both. ``common``: compare the rows that both have, and count the others.
    Raises ConfigError for cells that cannot be paired, or that were run on different rows.
    """
    sides = [read_results(Path(one)) for one in (first, second)]
    for index, side in enumerate(sides):
        sides[index] = _chosen(side, _part(policies, index, "policies"), _part(models, index, "models"))
    keys = [{_key(cell, not policies, _several(sides) and not models): cell for cell in side} for side in sides]
    shared = [key for key in keys[0] if key in keys[1]]
    if not shared:
        raise ConfigError(
            f"{first} and {second} have nothing to compare: {_names(sides[0])} against {_names(sides[1])}. Name what "
            f"to pair, as in --policies two-turn always-full or --models before after."
        )
    return [_pair(keys[0][key], keys[1][key], sides, common) for key in shared]


def _part(pair: Sequence[str], index: int, name: str) -> str | None:
    if pair and len(pair) != 2:
        raise ConfigError(f"--{name} has {len(pair)} names; give the first's and the second's.")
    return pair[index] if pair else None


def _chosen(side: dict[Cell, list[RowResult]], policy: str | None, model: str | None) -> dict[Cell, list[RowResult]]:
    policy = policy and parse_policy(policy).name
    chosen = {
        cell: results
        for cell, results in side.items()
        if policy in (None, cell.policy) and model in (None, cell.model)
    }
    if not chosen:
        wanted = " and ".join(repr(one) for one in (policy, model) if one)
        raise ConfigError(f"{wanted} was not evaluated there; there are {_names(side)}.")
    return chosen


def _several(sides: Sequence[Mapping[Cell, Any]]) -> bool:
    return any(len({cell.model for cell in side}) > 1 for side in sides)


def _key(cell: Cell, by_policy: bool, by_model: bool) -> tuple[str, ...]:
    return (cell.data, *([cell.policy] if by_policy else []), *([cell.model] if by_model else []))


def _names(side: Mapping[Cell, Any]) -> str:
    return "; ".join(str(cell) for cell in side)


def _pair(first: Cell, second: Cell, sides: Sequence[Mapping[Cell, list[RowResult]]], common: bool) -> dict[str, Any]:
    one, other = (
        {result.id: result for result in side[cell]} for side, cell in zip(sides, (first, second), strict=True)
    )
    ids = [id for id in one if id in other]
    alone = [id for id in (*one, *other) if id not in one or id not in other]
    if alone and not common:
        raise ConfigError(
            f"{first} and {second} were run on different rows: {len(one)} and {len(other)}, {len(ids)} of them in "
            f"both (not {_some(alone)}). Add --common to compare those, or run both on the same rows."
        )
    if not ids:
        raise ConfigError(f"{first} and {second} have no row in common; run both on the same rows.")
    changed = [id for id in ids if one[id].digest != other[id].digest]
    if changed:
        raise ConfigError(
            f"{first} and {second}: {len(changed)} rows of the same id ask another question, have another answer or "
            f"source ({_some(changed)}). These are different data sets; run both on the same one."
        )
    numbers = paired([one[id] for id in ids], [other[id] for id in ids])
    return {"data": first.data, "first": str(first), "second": str(second), "left_out": len(alone), **numbers}


def _some(ids: Sequence[str]) -> str:
    return ", ".join(repr(id) for id in ids[:_SHOWN]) + (", ..." if len(ids) > _SHOWN else "")


def print_comparison(pairs: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print each pair as a table: differences with 95 % confidence intervals, and the p-value with its test."""
    console = console or Console()
    for pair in pairs:
        console.print(f"second: {pair['second']}\nfirst:  {pair['first']}", markup=False, highlight=False)
        left = f", {pair['left_out']} not in both" if pair["left_out"] else ""
        table = Table(title=f"{pair['rows']} rows{left}, {pair['unreadable']} unreadable, {pair['unjudged']} unjudged")
        for column in ("second minus first", "mean", "95 % interval"):
            table.add_column(column)
        for name, factor, unit in (
            ("accuracy", 100, " points"),
            ("asked", 100, " points"),
            *((name, 1, "") for name in ("visual_tokens", "prompt_tokens", "generated_tokens")),
        ):
            table.add_row(name.replace("_", " "), *_cells(pair[name], factor, unit))
        console.print(table)
        p_value = "none" if pair["accuracy_p"] is None else f"{pair['accuracy_p']:.4g}"
        console.print(
            f"accuracy: only the first right {pair['only_first_right']}, only the second {pair['only_second_right']}; "
            f"p = {p_value} ({pair['accuracy_test']})",
            markup=False,
            highlight=False,
        )


def _cells(one: Mapping[str, Any], factor: float, unit: str) -> list[str]:
    if one["difference"] is None:
        return [number(None), number(None)]
    low, high = (number(edge * factor, 1, "+") for edge in one["interval"])
    return [number(one["difference"] * factor, 1, "+") + unit, f"{low} to {high}"]
