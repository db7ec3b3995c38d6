"""Transcripts as Parquet: one row per rollout, its pictures in an image column that ``datasets`` and viewers show.

A row group holds one group of rollouts. Equal pictures of a row group are stored once, by Parquet's dictionary, and
read as if each member had its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vt_trl.transcripts.looks import Part
from vt_trl.transcripts.record import Picture, Transcript, TranscriptTurn

METADATA = b"vt_trl"
# What a list of rollouts is filtered and sorted by: read without texts and pictures.
INDEX = (
    *("step", "mode", "group", "member", "id", "source", "status", "asked", "attempted", "correct"),
    *("reward", "advantage"),
)
_DICTIONARY_BYTES = 1 << 30  # a page limit below the pictures of a group would store each member's own


@cache
def schema() -> pa.Schema:
    """Columns of the table, with what ``datasets`` needs to know that ``images`` are pictures."""
    from datasets import Features, Image, List, Value

    text, whole, real, truth = (Value(kind) for kind in ("string", "int64", "float64", "bool"))
    part = {"number": whole} | {edge: real for edge in ("left", "top", "right", "bottom")}
    picture = {name: whole for name in ("index", "at", "width", "height", "tokens", "look")} | {"parts": List(part)}
    turn = {"role": text, "text": text, "status": text, "pictures": List(picture), "tokens": whole, "call": text}
    columns = {name: text for name in ("question", "answer", "status", "verdict", "verdict_reason", "id", "source")}
    columns |= {name: text for name in ("mode", "group", "detail")}
    columns |= {name: whole for name in ("step", "member", "visual_tokens", "completion_tokens")}
    columns |= {name: real for name in ("penalty", "reward", "advantage")}
    columns |= {name: truth for name in ("asked", "attempted", "correct")}
    columns["gold"] = List(text)
    columns["rewards"] = List({"name": text, "score": real})
    columns["extra"] = List({"name": text, "text": text})
    columns["turns"] = List(turn | {"faults": List(text)})
    columns["images"] = List(Image())
    first = ("images", "question", "answer", "gold", "status", "asked", "correct", "reward", "advantage", "step")
    return Features({name: columns.pop(name) for name in first} | columns).arrow_schema


def write_transcripts(path: str | Path, transcripts: Iterable[Transcript], facts: Mapping[str, Any] = ()) -> Path:
    """Write a table, whole or not at all; an existing one of that name is replaced. Returns its path.

    ``facts`` (JSON values) go into the file's metadata under ``vt_trl``. Members of a group must follow each other.
    Raises OSError where it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    own = schema().with_metadata({**schema().metadata, METADATA: json.dumps(dict(facts)).encode()})
    try:
        with pq.ParquetWriter(
            unfinished, own, compression="zstd", dictionary_pagesize_limit=_DICTIONARY_BYTES
        ) as writer:
            for _, members in groupby(transcripts, lambda one: (one.step, one.group)):
                writer.write_table(pa.Table.from_pylist([_row(one) for one in members], schema=own))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _row(transcript: Transcript) -> dict[str, Any]:
    row = {name: getattr(transcript, name) for name in schema().names}
    return row | {
        "images": [{"bytes": data, "path": None} for data in transcript.images],
        "rewards": [{"name": name, "score": score} for name, score in transcript.rewards.items()],
        "extra": [{"name": name, "text": text} for name, text in transcript.extra.items()],
        "turns": [asdict(turn) for turn in transcript.turns],
    }


def transcript_of(row: Mapping[str, Any]) -> Transcript:
    """A transcript from a row of the table; without the column ``images`` it has none."""
    turns = [
        TranscriptTurn(**turn | {"pictures": tuple(map(_picture, turn["pictures"])), "faults": tuple(turn["faults"])})
        for turn in row["turns"]
    ]
    return Transcript(
        **dict(row)
        | {
            "turns": tuple(turns),
            "images": tuple(image["bytes"] for image in row.get("images") or ()),
            "gold": tuple(row["gold"]),
            "rewards": {one["name"]: one["score"] for one in row["rewards"]},
            "extra": {one["name"]: one["text"] for one in row["extra"]},
        }
    )


def _picture(stored: Mapping[str, Any]) -> Picture:
    return Picture(**stored | {"parts": tuple(Part(**one) for one in stored.get("parts") or ())})


def read_transcripts(path: str | Path) -> list[Transcript]:
    """All transcripts of one file. A run's worth is read by :class:`vt_trl.transcripts.browse.Run`, piece by piece."""
    return [transcript_of(row) for row in pq.read_table(path).to_pylist()]


def read_facts(path: str | Path) -> dict[str, Any]:
    """What ``write_transcripts`` was given as facts."""
    return json.loads((pq.read_schema(path).metadata or {}).get(METADATA, b"{}"))
