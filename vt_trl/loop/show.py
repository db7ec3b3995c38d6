"""A loop on the terminal: the plan with its sizes, and how far it is with what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vt_trl.loop.inputs import Hashes, fingerprint, inputs_of
from vt_trl.loop.manifest import DONE, FAILED, RUNNING, Manifest
from vt_trl.loop.plan import Plan, plan_loop
from vt_trl.loop.process import processes_of
from vt_trl.loop.sizes import Size, sizes

STYLES = {DONE: "green", FAILED: "red", RUNNING: "cyan"}
WAITING, STALE = "waiting", "outdated"
FIGURES = ("rows", "kept_share", "loss", "reward", "accuracy", "eval_accuracy", "steps")  # shown, where there are any
BY_ROUND = (
    "bands/",
    "mean/",
    "drift/mean_shift/",
    "rejected/",
    "row/",
    "sample/",
    "share/",
)  # and those, round by round


def show_plan(
    recipe: str | Path, overrides: Sequence[str] = (), gpu_gib: float | None = None, console: Console | None = None
) -> Plan:
    """Check a recipe, and print every stage with what it takes and how large it is."""
    console = console or Console(soft_wrap=True)
    plan = plan_loop(recipe, overrides)
    known = sizes(plan, gpu_gib)
    columns = ["stage", "run", "takes", "rows", "episodes", "steps"] + ["hours", "memory"] * bool(gpu_gib)
    table = _table(f"{plan.recipe.path}: {len(plan.stages)} stages in {plan.folder}", columns)
    for one in plan.stages:
        size = known[one.id]
        takes = ", ".join(one.uses) if not one.waits_for_best else "the best round's"
        cells = [one.id, one.stage.run, takes, *map(_count, (size.rows, size.episodes, size.steps))]
        table.add_row(*map(Text, cells + ([_hours(size), size.note] if gpu_gib else [])))
    console.print(table)
    total = [sum(size.episodes or 0 for size in known.values()), sum(size.steps or 0 for size in known.values())]
    bound = "rows that do not exist yet are taken as many as they can be, and what is not known is left out"
    console.print(f"At most {total[0]:,} episodes and {total[1]:,} optimizer steps; {bound}.", highlight=False)
    if gpu_gib:
        console.print("Hours and memory are on paper, for training alone (vt-trl preflight).", highlight=False)
    return plan


def show_status(recipe: str | Path, overrides: Sequence[str] = (), console: Console | None = None) -> dict[str, str]:
    """Print how far a loop is; returns the state of every stage: done, failed, running, outdated, waiting, ..."""
    console = console or Console(soft_wrap=True)
    plan = plan_loop(recipe, overrides, check=False)
    manifest = Manifest.read(plan.folder)
    states = states_of(plan, manifest)
    names = [name for name in FIGURES if any(name in one.metrics for one in manifest.stages.values())]
    table = _table(f"{plan.folder}: {sum(one == DONE for one in states.values())} of {len(states)} stages done",
                   ["stage", "run", "state", "time", "starts", *names])  # fmt: skip
    for one in plan.stages:
        record = manifest.stages.get(one.id)
        state = Text(states[one.id], style=STYLES.get(states[one.id], ""))
        if record is None:
            table.add_row(Text(one.id), Text(one.stage.run), state)
            continue
        cells = [_figure(record.metrics.get(name)) for name in names]
        time = str(timedelta(seconds=round(record.seconds)))
        table.add_row(Text(one.id), Text(one.stage.run), state, time, str(record.starts), *cells)
    console.print(table)
    for one in plan.stages:
        if states[one.id] == FAILED:
            console.print(f"{one.id} failed; its log: {plan.folder / manifest.stages[one.id].log}", markup=False)
    _show_drift(plan, manifest, console)
    show_end(manifest, console)
    return states


def states_of(plan: Plan, manifest: Manifest) -> dict[str, str]:
    """The state of every stage of a plan; ``outdated``: done, but with inputs that have changed since."""
    hashes, prints, found = Hashes(plan.folder), {}, {}
    for one in plan.stages:
        record = manifest.stages.get(one.id)
        best = (manifest.best or {}).get("round")
        prints[one.id] = fingerprint(inputs_of(one, plan, hashes, best, prints))
        if record is None:
            found[one.id] = WAITING
        elif record.status == DONE:
            found[one.id] = DONE if record.fingerprint == prints[one.id] and one.out.exists() else STALE
        elif record.status == RUNNING:
            found[one.id] = RUNNING if processes_of(record.token) else "killed"
        else:
            found[one.id] = record.status
    return found


def _show_drift(plan: Plan, manifest: Manifest, console: Console) -> None:
    """What has changed in a stage from round to round: bands, means, and why tries were rejected."""
    for stage in {one.stage.name: None for one in plan.stages if one.round}:
        rounds = {
            one.round: manifest.stages[one.id].metrics for one in plan.of_stage(stage) if one.id in manifest.stages
        }
        names = {name: None for found in rounds.values() for name in found if name.startswith(BY_ROUND)}
        if len(rounds) < 2 or not names:
            continue
        table = _table(f"{stage}, by round", ["", *map(str, rounds)])
        for name in names:
            table.add_row(Text(name), *(_figure(found.get(name)) for found in rounds.values()))
        console.print(table)


def show_end(manifest: Manifest, console: Console | None = None) -> None:
    """Which checkpoint to take."""
    console = console or Console(soft_wrap=True)
    best = manifest.best
    if best is None:
        console.print("Which checkpoint to take is not known: no round was evaluated, or the recipe has no `best`.")
        return
    console.print(
        f"Take {manifest.folder / best['out']}: round {best['round']} of {best['of_rounds']} is the best, with "
        f"{best['metric']} {best['value']:.4g} by {best['by']}.",
        markup=False,
        highlight=False,
    )


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    left = {"", "stage", "run", "takes", "state", "memory"}
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=name in ("stage", "state"))
    return table


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _hours(size: Size) -> str:
    return "" if size.hours is None else f"{size.hours:.1f}"


def _figure(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or float(value).is_integer() else f"{value:.3f}"
