"""The transcripts of a run, found, filtered and sorted without loading them: only small columns are kept in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vt_trl.errors import DataError, did_you_mean
from vt_trl.transcripts.record import Transcript
from vt_trl.transcripts.table import INDEX, schema, transcript_of

JUDGED = {"right": True, "wrong": False, "not judged": None}
ASKED = {"asked": True, "not asked": False}
SORTS = ("newest", "oldest", "reward-high", "reward-low", "advantage-high", "advantage-low")


@dataclass(frozen=True)
class Filter:
    """What is looked for; an empty text means anything. ``group``: members of one group, with ``file``."""

    step: str = ""
    mode: str = ""
    status: str = ""
    asked: str = ""
    judged: str = ""
    source: str = ""
    file: str = ""
    group: str = ""
    sort: str = SORTS[0]

    @classmethod
    def of(cls, words: dict[str, str]) -> Filter:
        """From named texts, such as a query; raises DataError for what cannot be looked for."""
        chosen = {field.name: words[field.name] for field in fields(cls) if words.get(field.name)}
        for name, allowed in (("sort", SORTS), ("asked", ASKED), ("judged", JUDGED)):
            if name in chosen and chosen[name] not in allowed:
                hint = did_you_mean(chosen[name], allowed)
                raise DataError(f"{name} is {chosen[name]!r}.{hint} Use one of {', '.join(allowed)}.")
        if "step" in chosen and not re.fullmatch(r"\d{1,18}", chosen["step"]):
            raise DataError(f"step is {chosen['step']!r}; it is a whole number.")
        return cls(**chosen)


@dataclass(frozen=True)
class Place:
    """Where a transcript lies: the name of its file and its row in it."""

    file: str
    row: int


class Run:
    """The tables of a run folder, of its ``completions`` folder, or one file. Raises DataError where there are none.

    Files that appear or change while a run goes on are noticed by :meth:`refresh`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._indexes: dict[str, tuple[tuple[int, int], pa.Table]] = {}
        self.refresh()
        if not self.files:
            raise DataError(
                f"{self.path} holds no transcripts: no Parquet file there or in completions/. Train with "
                f"log_completions: true, or name a folder or a file that has some."
            )

    @property
    def title(self) -> str:
        path = self.path.resolve()
        return path.parent.name if path.name == "completions" else path.name

    def refresh(self) -> None:
        """Look for new files, and read the small columns of those that are new or changed."""
        folder = self.path / "completions" if (self.path / "completions").is_dir() else self.path
        found = [self.path] if self.path.is_file() else sorted(folder.glob("*.parquet"))
        self.files = {path.name: path for path in found if not path.name.startswith(".")}
        for name, path in list(self.files.items()):
            stat = path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if self._indexes.get(name, (None,))[0] != stamp:
                self._indexes[name] = stamp, _index(path)
        self._indexes = {name: self._indexes[name] for name in self.files}

    def table(self) -> pa.Table:
        """One row per transcript: the columns of ``INDEX``, and ``file`` and ``row``."""
        return pa.concat_tables([index for _, index in self._indexes.values()])

    def choices(self, name: str) -> list[str]:
        """Values of a column that occur, sorted; at most 200, the last ones."""
        values = [value for value in pc.unique(self.table()[name]).to_pylist() if value not in (None, "")]
        return [str(value) for value in sorted(values)[-200:]]

    def find(self, wanted: Filter) -> list[Place]:
        """Places of all transcripts that match, in the order asked for."""
        table = self.table()
        for name in ("mode", "status", "source", "file", "group"):
            if getattr(wanted, name):
                table = table.filter(pc.field(name) == getattr(wanted, name))
        if wanted.step:
            table = table.filter(pc.field("step") == int(wanted.step))
        if wanted.asked:
            table = table.filter(pc.field("asked") == ASKED[wanted.asked])
        if wanted.judged:
            right = JUDGED[wanted.judged]
            table = table.filter(pc.field("correct").is_null() if right is None else pc.field("correct") == right)
        table = table.sort_by(_order(wanted.sort))
        return [Place(*pair) for pair in zip(table["file"].to_pylist(), table["row"].to_pylist(), strict=True)]

    def read(self, places: Sequence[Place], pictures: bool = True) -> list[Transcript]:
        """The transcripts at ``places``, in their order; only their row groups are read."""
        columns = [name for name in schema().names if pictures or name != "images"]
        open_files: dict[str, pq.ParquetFile] = {}
        groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
        found = []
        for place in places:
            if place.file not in self.files:
                raise DataError(f"there is no file {place.file!r} in {self.path}.")
            if place.file not in open_files:
                open_files[place.file] = pq.ParquetFile(self.files[place.file])
            file = open_files[place.file]
            number, offset = _row_group(file, place.row)
            if (place.file, number) not in groups:
                groups[place.file, number] = file.read_row_group(number, columns=columns).to_pylist()
            found.append(transcript_of(groups[place.file, number][offset]))
        for file in open_files.values():
            file.close()
        return found

    def history(self) -> list[dict[str, Any]]:
        """TRL's ``log_history`` from the newest ``trainer_state.json`` of the run; empty without one."""
        root = self.path.parent if self.path.is_file() else self.path
        root = root.parent if root.name == "completions" else root
        found = [root / "trainer_state.json", *root.glob("checkpoint-*/trainer_state.json")]
        found = [path for path in found if path.is_file()]
        if not found:
            return []
        try:
            state = json.loads(max(found, key=lambda path: path.stat().st_mtime).read_text(encoding="utf-8"))
            history = state["log_history"]
        except (ValueError, KeyError, TypeError):
            return []
        return [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []


def _index(path: Path) -> pa.Table:
    try:
        file = pq.ParquetFile(path)
        own = pa.schema([schema().field(name) for name in INDEX])
        table = file.read(columns=list(INDEX)).select(list(INDEX)).cast(own)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path} is no table of transcripts: {error}") from error
    if file.schema_arrow.names != schema().names:
        raise DataError(f"{path} has other columns than a table of transcripts; was it written by another version?")
    rows = pa.array(range(table.num_rows), pa.int64())
    names = pa.array([path.name] * table.num_rows, pa.string())
    return table.append_column("file", names).append_column("row", rows)


def _order(sort: str) -> list[tuple[str, str]]:
    key, _, direction = sort.partition("-")
    place = [("step", "descending" if sort == "newest" else "ascending"), ("file", "ascending"), ("row", "ascending")]
    return place if not direction else [(key, "descending" if direction == "high" else "ascending"), *place]


def _row_group(file: pq.ParquetFile, row: int) -> tuple[int, int]:
    """The row group that holds a row, and the row's place in it."""
    for number in range(file.num_row_groups):
        rows = file.metadata.row_group(number).num_rows
        if 0 <= row < rows:
            return number, row
        row -= rows
    raise DataError(f"there is no such row in {file.metadata.num_rows} rows.")
