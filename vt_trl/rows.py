"""The row format: which columns a row has, what each may hold, and every reason why one row cannot be used.

Training, loading and data preparation all use this definition; ``docs/data.md`` explains it to users. Required:
``image`` (bytes, path, PIL or ``{"bytes", "path"}``; or ``images`` with one of them or a list), ``question`` and
``answer`` (a text or a list of accepted texts); ``id`` and ``data_source`` are made when missing. Optional:
``needs_full`` (whether the full picture is needed), ``choices`` (texts), ``region`` (``[x1, y1, x2, y2]`` in pixels of
the upright original: where the answer stands) and ``solution``. Other columns pass through.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
from datasets import Features, Value
from PIL import Image

from vt_trl.errors import DataError
from vt_trl.images import ResolutionRule, Size, load_image

FEATURES = Features(  # of stored rows: pictures embedded, every answer in a list
    {
        "id": Value("string"),
        "image": datasets.Image(),
        "question": Value("string"),
        "answer": datasets.List(Value("string")),
        "data_source": Value("string"),
        "needs_full": Value("bool"),
        "choices": datasets.List(Value("string")),
        "region": datasets.List(Value("float64")),
        "solution": Value("string"),
    }
)

NAMES = {  # our column: what it may be called, best first
    "id": ("id", "doc_id"),
    "image": ("image", "images", "file_name"),
    "question": ("question", "problem"),
    "answer": ("answer", "original_answer"),
    "data_source": ("data_source",),
}

BROKEN_LINE = "the line holds no row"  # how an ``image_error`` begins when the row could not be read at all

_MARKER = re.compile(r"<image(?: ?\d+)?>")
# What is left of a template or of another model's prompt, once the one marker allowed is taken out.
_PLACEHOLDER = re.compile(
    r"<\|(?:image|vision|video)\w*\|?>|<(?:image|images|video|img|imagehere)(?:[ _]?\d+)?>|\[(?:image|img)\]"
    r"|\{+ ?(?:question|query|problem|prompt|text) ?\}+|\blorem ipsum\b",
    re.I,
)
_NO_QUESTION = {"todo", "tbd", "na", "none", "null", "nan", "placeholder", "question", "xxx"}


@dataclass(frozen=True)
class Examined:
    """One row, looked at: every reason against it, and its picture (upright RGB) when that was decoded."""

    reasons: list[str]
    picture: Image.Image | None = None


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


def numbered_question(text: str) -> str:
    """The question of a row with several pictures: a placeholder becomes "image 2", by its own number or its turn."""
    if not isinstance(text, str):
        raise DataError(f"the question is a {type(text).__name__}; give a text")
    turn = itertools.count(1)

    def named(mark: re.Match[str]) -> str:
        number, given = next(turn), re.search(r"\d+", mark[0])
        return f"image {int(given[0]) if given else number}"

    return _MARKER.sub(named, text)


def episode_row(row: Mapping[str, Any], most_pictures: int = 1) -> dict[str, Any]:
    """The row an environment gets: ``image`` an upright RGB picture, ``question`` cleaned, ``answer`` a list of texts.

    A row with several pictures, where ``most_pictures`` allows them, has all of them as ``images``, too. Other columns
    pass through. Raises :class:`DataError` with the row's id.
    """
    rest = {name: value for name, value in row.items() if name not in ("images", "image_error")}
    try:
        pictures = [load_image(source) for source in _picture_sources(row, most_pictures)]
        rest |= {"images": pictures} if len(pictures) > 1 else {}
        return {**rest, "image": pictures[0], "question": _question(row), "answer": _answers(row)}
    except DataError as error:
        raise error.at(id=None if row.get("id") is None else str(row["id"])) from error


def _picture_sources(row: Mapping[str, Any], most: int) -> list[Any]:
    """What :func:`load_image` can read; raises when the row is known to have no such thing."""
    if row.get("image_error"):
        raise DataError(row["image_error"])
    several = row.get("images")
    if most > 1 and isinstance(several, list | tuple) and len(several) > 1:
        if len(several) > most:
            raise DataError(f"the row has {len(several)} images, and the environment takes up to {most}")
        sources = list(several)
    elif isinstance(several, list | tuple) and len(several) > 1:
        sources = [only_image(several)]
    else:
        sources = [only_image(several if row.get("image") is None else row["image"])]
    if any(source is None for source in sources):
        raise DataError("cannot read the image: it is missing")
    return sources


def _question(row: Mapping[str, Any]) -> str:
    several = row.get("images") if isinstance(row.get("images"), list | tuple) else ()
    question = row.get("question")
    question = numbered_question(question) if len(several) > 1 else clean_question(question)
    if not question.strip():
        raise DataError("the question is empty or no text")
    return question


def _answers(row: Mapping[str, Any]) -> list[str]:
    answers = answer_texts(row.get("answer"))
    if not answers or not all(answer.strip() for answer in answers):
        raise DataError("the answer is empty, or no text or list of texts")
    return answers


def examine(
    row: Mapping[str, Any],
    *,
    decode: bool = True,
    forbidden: Sequence[str] = (),
    rule: ResolutionRule | None = None,
    most_pictures: int = 1,
) -> Examined:
    """Every reason why a row cannot be used; a bad row never raises.

    ``decode``: decode the picture; otherwise only its presence is checked. ``forbidden``: chat-control tokens; the
    policy cannot write them, so an answer that holds one is never matched. ``rule``: refuse what it cannot show.
    ``most_pictures``: of one row.
    """
    if str(row.get("image_error") or "").startswith(BROKEN_LINE):
        return Examined([row["image_error"]])  # that all its columns are empty follows from it
    reasons: list[str] = []
    picture = None
    try:
        sources = _picture_sources(row, most_pictures)
        pictures = [load_image(source) for source in sources] if decode else []
        for one in pictures if rule is not None else []:
            rule.full_size(*one.size)
        picture = pictures[0] if pictures else None
    except DataError as error:
        reasons.append(error.reason)
    size = None if picture is None else picture.size
    for part in (_whole_question, partial(_reachable, forbidden=forbidden), _choices, partial(_region, size=size)):
        try:
            part(row)
        except DataError as error:
            reasons.append(error.reason)
    return Examined(reasons, picture)


def _whole_question(row: Mapping[str, Any]) -> None:
    question = _question(row)
    found = _PLACEHOLDER.search(question)
    if found or re.sub(r"\W", "", question).casefold() in _NO_QUESTION:
        text = found[0] if found else question
        raise DataError(f"the question is or holds a placeholder ({text.strip()[:40]!r}); write the question itself")


def _reachable(row: Mapping[str, Any], forbidden: Sequence[str]) -> None:
    answers = _answers(row)
    found = [next((token for token in forbidden if token in text), None) for text in answers]
    if None not in found:
        raise DataError(f"the answer can never be matched: it holds the control token {found[0]!r}; take it out")


def _choices(row: Mapping[str, Any]) -> None:
    """An answer is one of the choices: its text, or its letter ("B", "(b)") counted from A."""
    choices = row.get("choices")
    if choices is None or len(choices) == 0:
        return
    if isinstance(choices, str) or not all(isinstance(one, str) and one.strip() for one in choices):
        raise DataError("the choices are no list of texts; give one text per choice")
    letters = {chr(ord("a") + number) for number in range(min(26, len(choices)))}
    known = {_plain(one) for one in choices}
    given = [one.strip() for one in answer_texts(row.get("answer"))]
    if given and not any(_plain(one) in known or one.strip("().: ").casefold() in letters for one in given):
        raise DataError(f"the answer ({given[0][:40]!r}) is not among the {len(choices)} choices")


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:\"'")


def _region(row: Mapping[str, Any], size: Size | None) -> None:
    region = row.get("region")
    if region is None or len(region) == 0:
        return
    numbers = [value for value in region if isinstance(value, int | float) and not isinstance(value, bool)]
    if isinstance(region, str) or len(region) != 4 or len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise DataError("the region is not four numbers [x1, y1, x2, y2] in pixels")
    left, top, right, bottom = numbers
    if left >= right or top >= bottom:
        raise DataError(f"the region {numbers} is empty: x1 < x2 and y1 < y2 are needed")
    if size is not None and not (left >= 0 and top >= 0 and right <= size[0] and bottom <= size[1]):
        raise DataError(f"the region {numbers} is outside the picture of {size[0]} x {size[1]} pixels")


def answer_texts(value: Any) -> list[str]:
    """The accepted answers; a number is one too, but a bool, a dict and the like are not."""
    values = value if isinstance(value, list | tuple) else [value]
    good = all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in values)
    return [str(item) for item in values] if good else []


def only_image(value: Any) -> Any:
    """The picture of a column that holds one, or a list of one."""
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise DataError(f"the row has {len(value)} images and needs exactly one; split the row or join the images")
        value = value[0]
    return value
