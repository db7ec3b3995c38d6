"""Rows: what an episode needs of them, and refusing bad ones before a run rather than in its middle.

Columns: ``image`` (bytes, path, PIL or ``{"bytes", "path"}``; or ``images`` with one of them or a list of one),
``question``, ``answer`` (a text or a list of accepted texts), and optionally ``id`` and ``data_source``.
:func:`load_rows` brings any source into them. Row numbers count from 0.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import datasets
from datasets import Dataset
from PIL import Image

from vt_trl.errors import ConfigError, DataError, where
from vt_trl.images import ResolutionRule, load_image
from vt_trl.sources import answer_texts, load_rows, only_image

__all__ = ["BadRow", "check_rows", "clean_question", "episode_row", "load_rows", "require_good_rows"]

logger = logging.getLogger(__name__)

_MARKER = re.compile(r"<image(?: ?\d+)?>")
_SHOWN = 10  # bad rows listed in an error or in the log


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its number from 0, its id ("" when it has none), and every reason why."""

    number: int
    id: str
    reason: str

    def __str__(self) -> str:
        return where(self.number, self.id or None) + self.reason


def clean_question(text: str) -> str:
    """The question without the data set's image placeholder (``<image>``, ``<image1>`` or ``<image 1>``), if any.

    The white space around it shrinks to one line break or blank; all other text is kept verbatim. Raises
    :class:`DataError` for more than one placeholder, since a row has one picture.
    """
    if not isinstance(text, str):
        raise DataError(f"the question is a {type(text).__name__}; give a text")
    parts = _MARKER.split(text)
    if len(parts) == 1:
        return text
    if len(parts) > 2:
        marks = ", ".join(_MARKER.findall(text))
        raise DataError(
            f"the question has {len(parts) - 1} image markers ({marks}), but a row has one image; keep one"
        )
    before, after = parts[0].rstrip(), parts[1].lstrip()
    gap = text[len(before) : len(text) - len(after)]
    joint = "\n" if "\n" in gap else " " if _MARKER.sub("", gap) else ""
    return before + joint + after if before and after else before + after


def episode_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row an environment gets: ``image`` an upright RGB picture, ``question`` cleaned, ``answer`` a list of texts.

    Other columns pass through. Raises :class:`DataError` with the row's id.
    """
    rest = {name: value for name, value in row.items() if name not in ("images", "image_error")}
    try:
        return {**rest, "image": _picture(row), "question": _question(row), "answer": _answers(row)}
    except DataError as error:
        raise error.at(id=None if row.get("id") is None else str(row["id"])) from error


def _picture_source(row: Mapping[str, Any]) -> Any:
    """What :func:`load_image` can read; raises when the row is known to have no such thing."""
    if row.get("image_error"):
        raise DataError(row["image_error"])
    source = only_image(row.get("images") if row.get("image") is None else row["image"])
    if source is None:
        raise DataError("cannot read the image: it is missing")
    return source


def _picture(row: Mapping[str, Any]) -> Image.Image:
    return load_image(_picture_source(row))


def _question(row: Mapping[str, Any]) -> str:
    question = clean_question(row.get("question"))
    if not question.strip():
        raise DataError("the question is empty or no text")
    return question


def _answers(row: Mapping[str, Any]) -> list[str]:
    answers = answer_texts(row.get("answer"))
    if not answers or not all(answer.strip() for answer in answers):
        raise DataError("the answer is empty, or no text or list of texts")
    return answers


def check_rows(
    dataset: Dataset,
    *,
    decode_images: bool = True,
    workers: int = 4,
    forbidden: Sequence[str] = (),
    rule: ResolutionRule | None = None,
) -> list[BadRow]:
    """Every row that cannot be used, in order, each with all its reasons. A bad row never raises.

    ``decode_images``: decode every picture, in ``workers`` threads; otherwise only its presence is checked.
    ``forbidden``: chat-control tokens; the policy cannot write them, so an answer that holds one is never matched.
    ``rule``: report pictures that it cannot show, too.
    """
    if isinstance(dataset.features.get("image"), datasets.Image):
        dataset = dataset.cast_column("image", datasets.Image(decode=False))  # or reading the row could raise

    def check(number: int) -> tuple[str, list[str]]:
        row = dataset[number]
        reasons = _reasons(row, decode_images, forbidden, rule)
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


def _reasons(
    row: Mapping[str, Any], decode_images: bool, forbidden: Sequence[str], rule: ResolutionRule | None
) -> list[str]:
    def image() -> None:
        if decode_images:
            picture = _picture(row)
            if rule is not None:
                rule.full_size(*picture.size)
        else:
            _picture_source(row)

    def answer() -> None:
        answers = _answers(row)
        found = [next((token for token in forbidden if token in text), None) for text in answers]
        if None not in found:
            raise DataError(f"the answer can never be matched: it holds the control token {found[0]!r}; take it out")

    reasons = []
    for part in (image, lambda: _question(row), answer):
        try:
            part()
        except DataError as error:
            reasons.append(error.reason)
    return reasons


def require_good_rows(dataset: Dataset, on_bad_row: str = "error", **checks: Any) -> Dataset:
    """The data set with good rows only; ``checks`` go to :func:`check_rows`.

    ``on_bad_row``: ``"error"`` raises :class:`DataError` that lists the first bad rows; ``"skip"`` drops them and logs
    how many there were and why. Raises :class:`DataError`, too, when no row is left.
    """
    if on_bad_row not in ("error", "skip"):
        raise ConfigError(f"on_bad_row={on_bad_row!r}: there is no such way to treat a bad row; set 'error' or 'skip'")
    bad = check_rows(dataset, **checks)
    lines = [f"  {row}" for row in bad[:_SHOWN]] + ["  ..."] * (len(bad) > _SHOWN)
    summary = f"{len(bad)} of {len(dataset)} rows are bad:\n" + "\n".join(lines)
    if len(bad) == len(dataset):
        raise DataError(f"{summary}\nNo row is left; check that the source is the right one")
    if bad and on_bad_row == "error":
        raise DataError(f"{summary}\nRepair them, or set on_bad_row='skip' to leave them out")
    if bad:
        kinds = Counter(reason.split(":")[0] for row in bad for reason in row.reason.split("; "))
        logger.warning("%s\nSkipped, by reason: %s", summary, dict(kinds))
        numbers = {row.number for row in bad}
        dataset = dataset.select([number for number in range(len(dataset)) if number not in numbers])
    return dataset.remove_columns("image_error") if "image_error" in dataset.column_names else dataset
