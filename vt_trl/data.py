"""Refusing bad rows before a run rather than in its middle. :mod:`vt_trl.rows` says what a row is.

:func:`load_rows` brings any source into rows. Row numbers count from 0.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import datasets
from datasets import Dataset

from vt_trl.errors import ConfigError, DataError, where
from vt_trl.images import ResolutionRule
from vt_trl.rows import clean_question, episode_row, examine
from vt_trl.sources import load_rows

__all__ = ["BadRow", "check_rows", "clean_question", "episode_row", "load_rows", "require_good_rows"]

logger = logging.getLogger(__name__)

_SHOWN = 10  # bad rows listed in an error or in the log


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its number from 0, its id ("" when it has none), and every reason why."""

    number: int
    id: str
    reason: str

    def __str__(self) -> str:
        return where(self.number, self.id or None) + self.reason


def check_rows(
    dataset: Dataset,
    *,
    decode_images: bool = True,
    workers: int = 4,
    forbidden: Sequence[str] = (),
    rule: ResolutionRule | None = None,
    most_pictures: int = 1,
) -> list[BadRow]:
    """Every row that cannot be used, in order, each with all its reasons. A bad row never raises.

    ``decode_images``: decode every picture, in ``workers`` threads; otherwise only its presence is checked.
    ``forbidden``: chat-control tokens; the policy cannot write them, so an answer that holds one is never matched.
    ``rule``: report pictures that it cannot show, too. ``most_pictures``: of one row.
    """
    if isinstance(dataset.features.get("image"), datasets.Image):
        dataset = dataset.cast_column("image", datasets.Image(decode=False))  # or reading the row could raise

    def check(number: int) -> tuple[str, list[str]]:
        row = dataset[number]
        found = examine(row, decode=decode_images, forbidden=forbidden, rule=rule, most_pictures=most_pictures)
        reasons = found.reasons
        return ("" if row.get("id") is None else str(row["id"])), reasons

    with ThreadPoolExecutor(workers) as pool:
        checked = list(pool.map(check, range(len(dataset))))
    first: dict[str, int] = {}
    bad = []
    for number, (id, reasons) in enumerate(checked):
        if id and first.setdefault(id, number) != number:
            reasons.append(f"its id is that of another row: row {first[id]}")
        if reasons:
            bad.append(BadRow(number, id, "; ".join(reasons)))
    return bad


def require_good_rows(dataset: Dataset, on_bad_row: str = "error", **checks: Any) -> Dataset:
    """The data set with good rows only; ``checks`` go to :func:`check_rows`.

    ``on_bad_row``: ``"error"`` raises :class:`DataError` that lists the first bad rows; ``"skip"`` drops them and logs
    how many there were and why. Raises :class:`DataError`, too, when no row is left.
    """
    if on_bad_row not in ("error", "skip"):
        raise ConfigError(f"on_bad_row={on_bad_row!r}: there is no such way to treat a bad row; set 'error' or 'skip'")
    dataset = leave_out(dataset, check_rows(dataset, **checks), "on_bad_row", on_bad_row)
    return dataset.remove_columns("image_error") if "image_error" in dataset.column_names else dataset


def leave_out(
    dataset: Dataset,
    bad: Sequence[BadRow],
    setting: str,
    choice: str,
    what: str = "are bad",
    remedy: str = "Repair them",
) -> Dataset:
    """The data set without ``bad``, counted in the log; ``setting`` has the value ``choice``, "error" or "skip".

    Raises :class:`DataError` with the first bad rows for "error", and when no row is left.
    """
    lines = [f"  {row}" for row in bad[:_SHOWN]] + ["  ..."] * (len(bad) > _SHOWN)
    summary = f"{len(bad)} of {len(dataset)} rows {what}:\n" + "\n".join(lines)
    if len(bad) == len(dataset):
        raise DataError(f"{summary}\nNo row is left; check that the source is the right one")
    if not bad:
        return dataset
    if choice == "error":
        raise DataError(f"{summary}\n{remedy}, or set {setting}='skip' to leave them out")
    kinds = Counter(reason.split(":")[0] for row in bad for reason in row.reason.split("; "))
    logger.warning("%s\nSkipped, by reason: %s", summary, dict(kinds))
    numbers = {row.number for row in bad}
    return dataset.select([number for number in range(len(dataset)) if number not in numbers])
