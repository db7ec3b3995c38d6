"""What published sets call their columns, and how one of their records becomes rows.

A format is a table of names, best first, that covers the original release and the usual copies on the Hub. ``info.x``
looks inside a struct. Where a name is not enough, ``records`` turns one record into several, or into a flatter one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.reading import KEY
from vt_trl.errors import ConfigError, DataError, did_you_mean
from vt_trl.rows import FEATURES, NAMES

REQUIRED = ("image", "question", "answer")
_OPTIONAL = {"needs_full": ("needs_full",), "choices": ("choices", "options"), "region": ("region",)}
_OPTIONAL["solution"] = ("solution",)

Record = Mapping[str, Any]


def _as_it_is(record: Record) -> Iterable[Record]:
    return (record,)


def _dialogue(record: Record) -> Iterable[Record]:
    """One record per question and answer of a LLaVA dialogue; one without an answer when there is none."""
    turns = record.get("conversations")
    turns = [turn for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, Sequence) else []
    said = [(turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content")) for turn in turns]
    pairs = [
        (question, answer)
        for (asks, question), (tells, answer) in zip(said, said[1:], strict=False)
        if asks in ("human", "user") and tells in ("gpt", "assistant")
    ]
    for number, (question, answer) in enumerate(pairs or [("", "")]):
        yield {**record, "question": question, "answer": answer, "turn": number}


@dataclass(frozen=True)
class Format:
    """A published layout.

    Args:
        help: one line for ``--help``.
        columns: our column -> what the set may call it, best first.
        source: ``data_source`` of rows that have none of their own, and what their ids begin with.
        folders: where the original release keeps pictures, below the image folder.
        image_file: how a name becomes a file name there.
        unique_ids: whether the set's ids are unique per row. Others get a hash of the row's content behind them.
        records: one record of the set -> the records that become rows.
        made: columns that ``records`` makes, and the columns it makes them from.
    """

    help: str
    columns: Mapping[str, Sequence[str]]
    source: str = ""
    folders: Sequence[str] = ("",)
    image_file: str = "{}"
    unique_ids: bool = True
    records: Callable[[Record], Iterable[Record]] = _as_it_is
    made: Mapping[str, Sequence[str]] | None = None

    def choose(
        self, names: Sequence[str], renamed: Mapping[str, str], needed: Sequence[str] = REQUIRED
    ) -> dict[str, str]:
        """``{our column: the set's}`` for a set with these columns; ``renamed`` wins.

        Raises :class:`DataError` that says what was found and what is needed.
        """
        for ours, theirs in renamed.items():
            if ours not in FEATURES:
                raise ConfigError(f"--map {ours}={theirs}: rows have no {ours!r}.{did_you_mean(ours, FEATURES)}")
            if theirs.split(".")[0] not in names:
                raise ConfigError(f"--map {ours}={theirs}: the source has no {theirs!r}, only {sorted(names)}.")
        there = set(names)
        there |= {made for made, needs in (self.made or {}).items() if there & set(needs)}
        chosen = {
            ours: renamed.get(ours) or next((name for name in theirs if name.split(".")[0] in there), None)
            for ours, theirs in {**_OPTIONAL, **self.columns, **{name: (name,) for name in renamed}}.items()
        }
        missing = {ours: self.columns.get(ours, (ours,)) for ours in needed if not chosen.get(ours)}
        if missing:
            lacking = "; ".join(f"{ours} (one of {', '.join(map(repr, theirs))})" for ours, theirs in missing.items())
            hint = ",".join(f"{ours}=COLUMN" for ours in missing)
            raise DataError(f"the source has the columns {sorted(names)}, but lacks {lacking}; say --map {hint}")
        return {ours: name for ours, name in chosen.items() if name}

    def reads(self, chosen: Mapping[str, str]) -> list[str]:
        """The columns of the source that have to be read."""
        made = [name for needs in (self.made or {}).values() for name in needs]
        return sorted({name.split(".")[0] for name in chosen.values()} | set(made))


_DOCUMENT = {
    "id": ("questionId", "question_id"),
    "image": ("image", "image_local_name"),
    "question": ("question",),
    "answer": ("answers", "answer"),
}

FORMATS: dict[str, Format] = {
    "rows": Format(
        "our own columns: a folder with data or metadata (.jsonl, .json, .csv) and pictures, Parquet, Arrow",
        {**NAMES, "answer": ("answer", "answers", "original_answer")},
    ),
    "visionthink": Format(
        "VisionThink-{General,Smart}-{Train,Val}: problem, solution, original_answer, images, info",
        {
            "id": ("doc_id",),
            "image": ("images", "image"),
            "question": ("problem",),
            "answer": ("original_answer", "solution"),
            "data_source": ("data_source",),
            "needs_full": ("info.use_tool",),
        },
        source="visionthink",
        unique_ids=False,
    ),
    "chartqa": Format(
        "ChartQA: imgname, query, label next to png/, or image, query, label",
        {
            "id": ("id", "question_id"),
            "image": ("image", "imgname"),
            "question": ("query", "question"),
            "answer": ("label", "answer"),
        },
        source="chartqa",
        folders=("png", ""),
    ),
    "docvqa": Format("DocVQA: questionId, question, image, answers", _DOCUMENT, source="docvqa"),
    "infographicvqa": Format(
        "InfographicVQA: questionId, question, image_local_name or image, answers",
        _DOCUMENT,
        source="infographicvqa",
        folders=("infographicsvqa_images", "images", ""),
    ),
    "textvqa": Format(
        "TextVQA: question_id, image_id or image, question, ten answers by as many people",
        {
            "id": ("question_id",),
            "image": ("image", "image_id"),
            "question": ("question",),
            "answer": ("answers",),
        },
        source="textvqa",
        folders=("train_images", "test_images", "images", ""),
        image_file="{}.jpg",
    ),
    "gqa": Format(
        "GQA: questions by id with imageId, question, answer, and a folder of pictures",
        {
            "id": (KEY, "id", "question_id"),
            "image": ("image", "imageId", "image_id"),
            "question": ("question",),
            "answer": ("answer",),
        },
        source="gqa",
        folders=("images", "allImages/images", ""),
        image_file="{}.jpg",
    ),
    "mathvista": Format(
        "MathVista: pid, question, decoded_image or image, choices, answer, metadata",
        {
            "id": ("pid", KEY),
            "image": ("decoded_image", "image"),
            "question": ("question",),
            "answer": ("answer",),
            "data_source": ("metadata.source",),
            "choices": ("choices",),
        },
        source="mathvista",
    ),
    "llava": Format(
        "LLaVA-style dialogues: id, image, conversations; one row per question",
        {"id": ("id",), "image": ("image",), "question": ("question",), "answer": ("answer",)}
        | {"data_source": ("data_source",)},
        source="llava",
        folders=("", "images"),
        unique_ids=False,
        records=_dialogue,
        made={"question": ("conversations",), "answer": ("conversations",)},
    ),
}

# An evaluation set of which only the pictures matter.
PICTURES = Format(
    "pictures in whatever column",
    {"image": ("decoded_image", "image", "images", "file_name", "imgname", "image_local_name")},
    folders=("", "images", "png"),
)


def value_of(record: Record, name: str | None) -> Any:
    """A column, or what ``column.field`` names inside a struct; None where it is missing."""
    value: Any = record
    for part in name.split(".") if name else ():
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if name else None


def by_votes(answers: Sequence[str]) -> list[str]:
    """All different answers, the one that most people gave first; otherwise in their order."""
    return list(answers) if len(answers) < 2 else [answer for answer, _ in Counter(answers).most_common()]


def from_cell(value: Any) -> Any:
    """A list or a bool that a CSV file had to write as text: ``["a", "b"]``, ``true``. Other values stay."""
    if isinstance(value, str):
        try:
            found = json.loads(value.strip().lower() if value.strip().lower() in ("true", "false") else value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, list | bool) else value
    return value
