"""Files that are there whole or not at all, and whether work was done with the settings of now."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees half of it; of two processes that write the same, either one stays."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    to_disk(beside)
    os.replace(beside, path)


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which settings (JSON values) differ, as words; empty when none does."""
    differing = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return "; ".join(f"{name} was {_short(before.get(name))} and is {_short(now.get(name))}" for name in differing)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
