"""What every benchmark does with its report: a table on the screen, JSON for the record."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show(title: str, report: Mapping[str, Any], hidden: Container[str] = ()) -> None:
    """Print the figures of a report, a line each, but those in ``hidden``."""
    table = Table("", "", title=title)
    for name, value in report.items():
        if name not in hidden:
            table.add_row(name, str(value))
    Console().print(table)


def write(report: Mapping[str, Any], path: Path | None) -> None:
    """Write a report as JSON, where a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
