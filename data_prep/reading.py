"""Reading a source of any size in units: which files, which part of them, and the records inside, one at a time.

Nothing is read before its unit is worked on, and no more of it is held than a few dozen records. Parquet and saved
Arrow files are read where they are. JSON and CSV files are first rewritten as JSON lines into a work folder, as a
stream: only lines can be entered in the middle.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

from vt_trl.errors import ConfigError, DataError
from vt_trl.sources import BrokenLine, parse_line, refuse_broken

_BATCH = 64  # records in memory at a time
_ROW_LISTS = ("data", "annotations", "questions", "rows")  # where releases keep their rows in one JSON object
_NO_ROWS = ("info", "license", "licenses")  # objects that stand next to such a list
KEY = "_key"  # column for the key of a JSON object of rows


@dataclass(frozen=True)
class Piece:
    """Part of a file: an Arrow batch or JSON lines from byte ``at`` on, or the Parquet row group number ``at``."""

    kind: str  # arrow, parquet or lines
    file: str
    at: int
    rows: int
    start: int = 0  # number of its first record in the whole source
    line: int = 1  # number of its first line in the file


Unit = tuple[Piece, ...]


@dataclass(frozen=True)
class Table:
    """A source that can be read: its columns, its units in order, and its types where the files know them."""

    columns: list[str]
    units: list[Unit]
    features: Features | None

    @property
    def rows(self) -> int:
        return sum(piece.rows for unit in self.units for piece in unit)


def open_table(files: Sequence[Path], unit_rows: int, work: Path) -> Table:
    """Look at the files, all of one kind, and cut them into units of about ``unit_rows`` records.

    ``work``: folder for rewritten JSON and CSV files. Raises :class:`DataError` for a file that cannot be read.
    """
    pieces: list[Piece] = []
    columns: dict[str, None] = {}
    features = None
    for number, file in enumerate(files):
        try:
            found, names, kinds = _LOOK.get(file.suffix, _no_kind)(
                file, unit_rows, work / f"source-{number:05d}.jsonl"
            )
        except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"cannot read {str(file)!r}: {error}") from error
        pieces += found
        columns |= dict.fromkeys(names)
        features = features or kinds
    if not pieces:
        raise DataError(f"no rows in {', '.join(str(file) for file in files[:3])}")
    return Table(list(columns), list(_grouped(_numbered(pieces), unit_rows)), features)


def read_unit(unit: Unit, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """``(number, record)`` of a unit; ``columns`` limits what is read of Arrow and Parquet files.

    A line of JSON lines that is no JSON object comes as a :class:`~vt_trl.sources.BrokenLine`.
    """
    for piece in unit:
        try:
            yield from enumerate(_READ[piece.kind](piece, columns), start=piece.start)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot read {piece.file!r}: {error}") from error


def _numbered(pieces: Iterable[Piece]) -> Iterator[Piece]:
    start = 0
    for piece in pieces:
        yield replace(piece, start=start)
        start += piece.rows


def _grouped(pieces: Iterable[Piece], unit_rows: int) -> Iterator[Unit]:
    unit: list[Piece] = []
    for piece in pieces:
        unit.append(piece)
        if sum(one.rows for one in unit) >= unit_rows:
            yield tuple(unit)
            unit = []
    if unit:
        yield tuple(unit)


# Arrow (save_to_disk) and Parquet.


def _look_arrow(file: Path, unit_rows: int, spool: Path) -> tuple[list[Piece], list[str], Features]:
    """One piece per record batch. Only the headers of the batches are read."""
    pieces = []
    with pa.memory_map(str(file)) as stream:
        schema = pa.ipc.read_schema(pa.ipc.read_message(stream))
        while True:
            at = stream.tell()
            try:
                message = pa.ipc.read_message(stream)
            except EOFError:
                break
            pieces.append(Piece("arrow", str(file), at, pa.ipc.read_record_batch(message, schema).num_rows))
    return pieces, schema.names, Features.from_arrow_schema(schema)


def _read_arrow(piece: Piece, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    # The map is closed after each batch: pages of a file that stays mapped count as memory of this process.
    with pa.memory_map(piece.file) as stream:
        schema = pa.ipc.read_schema(pa.ipc.read_message(stream))
        stream.seek(piece.at)
        batch = pa.ipc.read_record_batch(pa.ipc.read_message(stream), schema)
        yield from _records(batch.select(_present(columns, schema.names)))
        del batch


def _look_parquet(file: Path, unit_rows: int, spool: Path) -> tuple[list[Piece], list[str], Features]:
    with pq.ParquetFile(file) as opened:
        groups = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
        pieces = [Piece("parquet", str(file), number, rows) for number, rows in enumerate(groups)]
        return pieces, opened.schema_arrow.names, Features.from_arrow_schema(opened.schema_arrow)


def _read_parquet(piece: Piece, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(piece.file, pre_buffer=False) as opened:
        names = _present(columns, opened.schema_arrow.names)
        for batch in opened.iter_batches(_BATCH, row_groups=[piece.at], columns=names):
            yield from batch.to_pylist()


def _present(columns: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    return [name for name in names if columns is None or name in columns]


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    for start in range(0, batch.num_rows, _BATCH):
        yield from batch.slice(start, _BATCH).to_pylist()


# JSON lines, JSON and CSV. Texts stay texts: Arrow's readers make a number of "007" and a date of "2018-01-11".


def _look_lines(file: Path, unit_rows: int, spool: Path) -> tuple[list[Piece], list[str], None]:
    """Every line is parsed here already: a file of another format is refused before anything is written."""
    pieces, names = [], {}
    rows = total = broken = 0
    first_broken = None
    with file.open("rb") as stream:
        at = position = stream.seek(3 if stream.read(3) == codecs.BOM_UTF8 else 0)
        first = 1  # line of the piece under way
        for number, line in enumerate(stream, start=1):
            position += len(line)
            if line.strip():
                record = parse_line(line, number)
                names |= dict.fromkeys(record)
                rows, total = rows + 1, total + 1
                if isinstance(record, BrokenLine):
                    first_broken = record if first_broken is None else first_broken
                    broken += 1
            if rows == unit_rows:
                pieces.append(Piece("lines", str(file), at, rows, line=first))
                at, rows, first = position, 0, number + 1
    pieces += [Piece("lines", str(file), at, rows, line=first)] if rows else []
    refuse_broken(first_broken, broken, total, file)
    return pieces, list(names), None


def _read_lines(piece: Piece, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    with open(piece.file, "rb") as stream:
        stream.seek(piece.at)
        done, number = 0, piece.line
        while done < piece.rows:
            line = stream.readline()
            if not line:
                raise DataError(f"{piece.file!r} became shorter while it was read")
            if line.strip():
                done += 1
                yield parse_line(line, number)
            number += 1


def _look_csv(file: Path, unit_rows: int, spool: Path) -> tuple[list[Piece], list[str], None]:
    csv.field_size_limit(2**27)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, restkey="", strict=True)
        return _spooled(_whole_cells(reader, file), unit_rows, spool)


def _whole_cells(reader: csv.DictReader, file: Path) -> Iterator[dict[str, Any]]:
    for record in reader:
        if "" in record:
            raise DataError(
                f"cannot read {str(file)!r}: line {reader.line_num} has more cells than there are headings"
            )
        yield record


def _look_json(file: Path, unit_rows: int, spool: Path) -> tuple[list[Piece], list[str], None]:
    with file.open("rb") as stream:
        return _spooled(json_rows(stream, str(file)), unit_rows, spool)


def json_rows(stream: Any, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a JSON file as a stream: a list of objects, such a list inside an object, or an object of objects.

    The keys of the last kind arrive as the column :data:`KEY`. Raises :class:`DataError` when there are none of these.
    """
    try:
        import ijson
    except ImportError as error:
        raise ConfigError("JSON files of any size need the package ijson: pip install 'vt-trl[prepare]'.") from error
    try:
        place = _place_of_rows(ijson.basic_parse(stream))
        stream.seek(0)
        if place is None:
            raise DataError(f"cannot read {name!r}: no list of rows in it, nor an object with one per key")
        if place:
            found: Iterable[Any] = ijson.items(stream, place, use_float=True)
        else:
            pairs = ijson.kvitems(stream, "", use_float=True)
            found = ({KEY: key, **value} if isinstance(value, dict) else value for key, value in pairs)
        for number, record in enumerate(found):
            if not isinstance(record, dict):
                raise DataError(f"cannot read {name!r}: one JSON object is needed per row", row=number)
            yield record
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {name!r}: {error}") from error


def _place_of_rows(events: Iterator[tuple[str, Any]]) -> str | None:
    """ijson's path of the rows, "" for an object of rows, None for neither."""
    depth, key = 0, None
    for event, value in events:
        if depth == 0 and event == "start_array":
            return "item"
        if depth == 1 and event == "map_key":
            key = value
        elif depth == 1 and event == "start_array" and key in _ROW_LISTS:
            return f"{key}.item"
        elif depth == 1 and event == "start_map" and key not in _NO_ROWS:
            return ""
        depth += event in ("start_map", "start_array")
        depth -= event in ("end_map", "end_array")
    return None


def _spooled(records: Iterable[dict[str, Any]], unit_rows: int, spool: Path) -> tuple[list[Piece], list[str], None]:
    spool.parent.mkdir(parents=True, exist_ok=True)
    with spool.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record) + "\n")
    return _look_lines(spool, unit_rows, spool)


def _no_kind(file: Path, unit_rows: int, spool: Path) -> tuple[list[Piece], list[str], None]:
    raise DataError(f"{str(file)!r} is none of {', '.join(_LOOK)}")


_LOOK: dict[str, Callable[[Path, int, Path], tuple[list[Piece], list[str], Features | None]]] = {
    ".arrow": _look_arrow,
    ".parquet": _look_parquet,
    ".jsonl": _look_lines,
    ".json": _look_json,
    ".csv": _look_csv,
}
_READ = {"arrow": _read_arrow, "parquet": _read_parquet, "lines": _read_lines}
SUFFIXES = tuple(_LOOK)
