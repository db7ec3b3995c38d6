"""From the records of a source to rows: columns renamed, pictures embedded, ids made stable, bad rows set aside."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Features

from data_prep.finding import Found
from data_prep.formats import FORMATS, Format, by_votes, from_cell, value_of
from data_prep.reading import Table, Unit, open_table, read_unit
from data_prep.shards import UnitWriter
from data_prep.units import run_units
from vt_trl.errors import DataError
from vt_trl.images import local_path
from vt_trl.rows import FEATURES, answer_texts, clean_question, examine, only_image
from vt_trl.sources import BrokenLine, is_flat

QUARANTINE = "quarantine.jsonl"
UNIT_ROWS = 5000


@dataclass(frozen=True)
class Reader:
    """Makes rows of one source's records.

    ``chosen``: our column -> the source's; ``root``: where paths start; ``extras``: columns that pass through;
    ``name``: ``data_source`` where neither row nor format has one.
    """

    format: Format
    chosen: Mapping[str, str]
    root: str
    extras: Features = field(default_factory=Features)
    name: str = "unknown"

    @property
    def columns(self) -> list[str]:
        return [*self.format.reads(self.chosen), *self.extras]

    @property
    def features(self) -> Features:
        return Features({**FEATURES, **self.extras})

    def rows(self, unit: Unit) -> Iterator[tuple[int, Mapping[str, Any], dict[str, Any]]]:
        """``(number of the record, the record, a row)`` for all rows of a unit; a row may lack anything."""
        for number, record in read_unit(unit, self.columns):
            if isinstance(record, BrokenLine):
                named = {"id": f"row-{number}", "image_error": record.why}
                yield number, {"line": record.text}, self.row(record) | named
                continue
            for part in self.format.records(record):
                yield number, part, self.row(part)

    def row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """One row in the columns of :data:`vt_trl.rows.FEATURES`; ``image_error`` says why there is no picture."""
        found = {ours: value_of(record, name) for ours, name in self.chosen.items()}
        listed = self.chosen["answer"].endswith("s")  # "answers": a list, which a CSV file writes as text
        answers = answer_texts(from_cell(found["answer"]) if listed else found["answer"])
        choices = _texts(found.get("choices"))
        row: dict[str, Any] = {
            "image": None,
            "question": _with_choices(_question(found["question"]), choices),
            "answer": by_votes([answer.strip() for answer in answers]),
            "data_source": str(found.get("data_source") or self.format.source or self.name),
            "needs_full": _flag(found.get("needs_full")),
            "choices": choices,
            "region": _numbers(found.get("region")),
            "solution": None if found.get("solution") is None else str(found["solution"]),
        }
        try:
            row["image"] = self.picture(record)
        except DataError as error:
            row["image_error"] = error.reason
        row["id"] = self._id(found.get("id"), row)
        return row | {name: record.get(name) for name in self.extras}

    def picture(self, record: Mapping[str, Any]) -> bytes:
        """The bytes of a picture file; a path must lie below the root, and a URL is not fetched."""
        value = only_image(value_of(record, self.chosen["image"]))
        if isinstance(value, Mapping):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes):
            return value
        if value is None or value == "" or isinstance(value, bool | float | list | dict):
            raise DataError("cannot read the image: it is missing")
        return _read_picture(self.root, str(value), tuple(self.format.folders), self.format.image_file)

    def _id(self, given: Any, row: Mapping[str, Any]) -> str:
        """The set's own id where it is one per row; else, or behind it, a hash of what the row holds."""
        given = "" if given is None else str(given)
        if given and self.format.unique_ids:
            return f"{self.format.source}-{given}" if self.format.source else given
        digest = hashlib.blake2b(row["image"] or b"", digest_size=8)
        digest.update(json.dumps([row["question"], row["answer"]]).encode())
        return f"{given or self.format.source or 'row'}-{digest.hexdigest()}"


def import_rows(
    found: Found,
    format: Format,
    out: Path,
    *,
    images: str | None = None,
    renamed: Mapping[str, str] | None = None,
    name: str | None = None,
    workers: int = 0,
    unit_rows: int = UNIT_ROWS,
) -> dict[str, Any]:
    """Write the rows of a source to ``out`` and the bad ones to ``out/quarantine.jsonl``; returns the manifest.

    ``images``: folder that paths start from, instead of the one the table lies in, or Parquet files with the columns
    ``id`` and ``image``. ``renamed``: our column -> the source's. ``name``: ``data_source`` of rows that have none, by
    default the folder's name. Raises :class:`DataError` for a source that cannot be read or lacks a column.
    """
    root = Path(images).expanduser().absolute() if images else found.root
    name = name or found.root.name
    packed = (
        sorted(root.rglob("*.parquet")) if images and root.is_dir() else [root] if root.suffix == ".parquet" else []
    )
    made_of = {
        "step": "import",
        "files": found.fingerprint(),
        "format": format.help,
        "images": [images, Found(packed, root).fingerprint()],
        "name": name,
        "map": dict(renamed or {}),
        "unit_rows": unit_rows,
    }

    def plan(folder: Path) -> Sequence[tuple[Unit, Reader]]:
        table = open_table(found.files, unit_rows, folder)
        start = _unpacked(packed, folder / "pictures") if packed else root
        reader = Reader(format, format.choose(table.columns, renamed or {}), str(start), name=name)
        return [(unit, reader) for unit in table.units]

    return run_units(out, plan, _import_unit, made_of=made_of, workers=workers, title="import", keep=[QUARANTINE])


def _unpacked(files: Sequence[Path], folder: Path) -> Path:
    """A folder with the pictures of Parquet files, named by their ids: on the Hub GQA keeps them apart like that."""
    table = open_table(files, UNIT_ROWS, folder)
    if not {"id", "image"} <= set(table.columns):
        raise DataError(f"--images: {files[0].name!r} has the columns {table.columns}; id and image are needed")
    folder.mkdir(exist_ok=True)
    for unit in table.units:
        for number, record in read_unit(unit, ["id", "image"]):
            name, picture = str(record["id"]), record["image"]
            if not re.fullmatch(r"\w[\w-]*", name) or not isinstance(picture, Mapping) or not picture.get("bytes"):
                raise DataError("--images: a plain id and a picture inside the file are needed", row=number, id=name)
            (folder / f"{name}.jpg").write_bytes(picture["bytes"])
    return folder


def _import_unit(job: tuple[Unit, Reader], writer: UnitWriter) -> None:
    unit, reader = job
    for number, record, row in reader.rows(unit):
        write_or_set_aside(writer, number, record, row, examine(row).reasons)


def reader_of(table: Table, found: Found) -> Reader:
    """A reader for a set that is in the columns of rows already; other columns of a known, flat type pass through."""
    format = FORMATS["rows"]
    chosen = format.choose(table.columns, {})
    used = {*chosen.values(), *FEATURES}
    others = {name: kind for name, kind in (table.features or {}).items() if name not in used and is_flat(kind)}
    return Reader(format, chosen, str(found.root), Features(others))


def write_or_set_aside(
    writer: UnitWriter,
    number: int,
    record: Mapping[str, Any],
    row: dict[str, Any],
    reasons: Sequence[str],
    keep_good: bool = True,
) -> None:
    """Write a good row, or set a bad one aside with its number and every reason; count either."""
    writer.counts["all"] += 1
    if not reasons:
        writer.counts["good"] += 1
        if keep_good:
            writer.add(row)
        return
    writer.counts["quarantined"] += 1
    for reason in reasons:
        writer.counts[f"reason: {kind_of(reason)}"] += 1
    set_aside(writer, QUARANTINE, number, record, row, reasons)


def set_aside(
    writer: UnitWriter, file: str, number: int, record: Mapping[str, Any], row: dict[str, Any], reasons: Sequence[str]
) -> None:
    """Write a row to a side file with all that it holds, its picture and its record in the source included."""
    values = {name: value for name, value in row.items() if name not in ("image", "image_error")}
    kept = {"row": number, "id": row["id"], "reasons": list(reasons), "values": values}
    writer.note(file, kept | {"record": without_bytes(record), "image": row["image"]})


def kind_of(reason: str) -> str:
    """A reason without what is special to one row, for counting."""
    return re.sub(r" (?:\(.*?\)|\[.*?\]|'.*?'|\d+(?: x \d+)?)(?=[ ;:,]|$)", "", reason.split(":")[0]).strip()


def without_bytes(value: Any) -> Any:
    """A record without the bytes of its pictures, which are kept next to it."""
    if isinstance(value, Mapping):
        return {name: without_bytes(one) for name, one in value.items() if not isinstance(one, bytes)}
    if isinstance(value, list | tuple):
        return [without_bytes(one) for one in value if not isinstance(one, bytes)]
    return value


def _read_picture(root: str, name: str, folders: Sequence[str], pattern: str) -> bytes:
    """The file of that name in the first folder that has it. Raises :class:`DataError` for a path out of the root."""
    named = name if Path(name).suffix else pattern.format(name)
    paths = [local_path(named, root)]
    if ".." in Path(named).parts:
        raise DataError(f"cannot read the image: the path {name!r} climbs with '..'; write it from the folder down")
    if not Path(named).is_absolute():
        paths = [local_path(Path(folder) / named, root) for folder in folders]
    try:
        found = next((path for path in paths if path.is_file()), None)
        if found is not None:
            return found.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the image: {error.strerror or error}: {name[:200]!r}") from error
    raise DataError(f"cannot read the image: No such file: {str(paths[0])!r}")


def _question(value: Any) -> str:
    if not isinstance(value, str):
        return ""
    try:
        return clean_question(value).strip()
    except DataError:
        return value  # two markers: examined and set aside as it is


def _with_choices(question: str, choices: list[str] | None) -> str:
    """The question with its choices below it, as "(A) ...", where it does not hold them already."""
    if not choices or not question or all(choice in question for choice in choices) or len(choices) > 26:
        return question
    return "\n".join([question, *(f"({chr(ord('A') + place)}) {one}" for place, one in enumerate(choices))])


def _texts(value: Any) -> list[str] | None:
    value = from_cell(value)
    return [str(one) for one in value] if isinstance(value, list) and value else None


def _numbers(value: Any) -> list[float] | None:
    value = from_cell(value)
    if not isinstance(value, list) or not value:
        return None
    good = all(isinstance(one, int | float) and not isinstance(one, bool) for one in value)
    return [float(one) for one in value] if good else [float("nan")]


def _flag(value: Any) -> bool | None:
    value = from_cell(value)
    return value if isinstance(value, bool) else None
