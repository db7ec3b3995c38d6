"""What became of rows and tries, counted by source and reason: counters of units, a table, part of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any


def counted(kind: str, row: Mapping[str, Any], fate: str) -> str:
    """The name under which a fate is counted; ``kind``: of what, such as ``row`` or ``sample``."""
    return f"{kind}\t{row.get('data_source') or ''}\t{fate}"


def report_of(counts: Mapping[str, int], kind: str | None = None) -> dict[str, Any]:
    """Counts of a step: ``{all, kept, dropped: {reason: count}, sources: {source: {fate: count}}}``.

    ``kind``: of what, where a step counts several things; names are then those of :func:`counted`, else without it.
    """
    sources: dict[str, Counter[str]] = {}
    for name, count in counts.items():
        if kind is not None:
            found, _, name = name.partition("\t")
            if found != kind:
                continue
        source, tab, fate = name.rpartition("\t")
        if tab:
            sources.setdefault(source, Counter())[fate] += count
    fates = sum(sources.values(), Counter())
    kept = fates.pop("kept", 0)
    return {
        "all": kept + fates.total(),
        "kept": kept,
        "dropped": dict(fates.most_common()),
        "sources": {source: dict(counts) for source, counts in sorted(sources.items())},
    }


def shares_kept(report: Mapping[str, Any]) -> dict[str, float]:
    """The share of each source that was kept."""
    return {source: fates.get("kept", 0) / sum(fates.values()) for source, fates in report["sources"].items()}


def show_fates(report: Mapping[str, Any], what: str = "rows", stderr: bool = False) -> None:
    """A table with a row per source and a column per reason."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{report['kept']} of {report['all']} {what} kept")
    reasons, shares = list(report["dropped"]), shares_kept(report)
    for name in ("source", "share", "kept", *reasons):
        table.add_column(escape(name), justify="left" if name == "source" else "right")
    for source, counts in report["sources"].items():
        fates = (str(counts.get(fate, 0)) for fate in ("kept", *reasons))
        table.add_row(escape(source), f"{shares[source]:.0%}", *fates)
    fates = (str(one) for one in (report["kept"], *report["dropped"].values()))
    table.add_row("all", f"{report['kept'] / max(report['all'], 1):.0%}", *fates, style="bold")
    Console(stderr=stderr).print(table)
