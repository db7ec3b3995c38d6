"""Where rows come from: folders, files and the Hub, all read into the same columns. :mod:`vt_trl.data` has the rest.

A loaded row is ``{id: str, image, question: str, answer: list[str], data_source: str}`` plus the source's own scalar
columns and lists of scalars, such as options. ``image`` is embedded (``datasets.Image(decode=False)``) or an absolute
path; a row with several pictures has all of them as ``images``, too, the first of which is ``image``. A picture that
is no file of the data set, or a line that is no JSON, is noted in a column ``image_error``, which exists only then, so
that one bad row does not keep a data set from loading. Published VisionThink columns (arXiv 2507.13348) are renamed.
"""

from __future__ import annotations

import codecs
import csv
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, Value

from vt_trl.errors import ConfigError, DataError
from vt_trl.images import local_path
from vt_trl.rows import BROKEN_LINE, NAMES, answer_texts, only_image

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"  # of a folder of shards that data preparation wrote
MANIFEST_FORMAT = {"format": "vt_trl rows", "version": 1}
TABLES = (".jsonl", ".json", ".csv")
EMBEDDED = datasets.Image(decode=False)
NOT_EMBEDDED = (
    "cannot read the image: unlike other rows, this one does not embed exactly one; embed it or drop the row"
)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_rows(source: str | os.PathLike, split: str | None = None, limit: int | None = None) -> Dataset:
    """Read the first ``limit`` rows of a data set into the columns named above.

    ``source``: what ``vt-trl prepare`` wrote; a folder of ``save_to_disk``; a folder with ``data.jsonl`` (``.json``,
    ``.csv``; ``metadata.*``) and pictures; such a file or a Parquet file by itself; a folder of Parquet files; or a
    name on the Hub. Without ``split`` the only split, or else ``train``, is taken. Raises :class:`DataError` when the
    source cannot be read or lacks a column, :class:`ConfigError` for a bad ``limit``.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: no row would be left; set a positive number, or leave it out for all rows")
    path = Path(source).expanduser()
    table = table_file(path, split)
    if table is not None:
        return _from_records(_read_records(table)[:limit], table.parent, str(source))
    try:
        found = _read_arrow(path, str(source), split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        raise DataError(f"cannot load {str(source)!r}: {error}") from error
    dataset = _pick_split(found, split, str(source))
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    # Pictures of the Hub that are files of their own lie in its cache, and their paths may lead nowhere else.
    root = (path if path.is_dir() else path.parent) if path.exists() else Path(datasets.config.HF_CACHE_HOME)
    return _from_dataset(dataset, root.absolute(), str(source))


def table_file(path: Path, split: str | None) -> Path | None:
    """The text file with the rows of a folder (``data``, ``metadata`` or the split's name), or the path itself."""
    if path.suffix in TABLES and path.is_file():
        return path
    stems = [split] if split else []
    stems += ["data", "metadata"] if split in (None, "train") else []
    return next((path / (stem + end) for stem in stems for end in TABLES if (path / (stem + end)).is_file()), None)


class BrokenLine(dict):
    """What is read of a line of JSON lines that is no JSON object: no column, but why, and the line itself."""

    def __init__(self, line: bytes, number: int, why: str):
        super().__init__()
        self.text = line.decode("utf-8", "backslashreplace").rstrip("\r\n")
        self.number = number  # of the line in its file, from 1
        self.why = f"{BROKEN_LINE}: line {number}: {why}"


def parse_line(line: bytes, number: int) -> dict[str, Any]:
    """The JSON object of a line, or a :class:`BrokenLine`."""
    try:
        record = json.loads(line.rstrip(b"\r\n"))
    except json.JSONDecodeError as error:
        return BrokenLine(line, number, f"{error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:
        return BrokenLine(line, number, str(error))
    return record if isinstance(record, dict) else BrokenLine(line, number, "it is no JSON object")


def refuse_broken(first: BrokenLine | None, broken: int, lines: int, file: Path) -> None:
    """Raise :class:`DataError` when more than half of a file's lines are broken: then it is of another format."""
    if first is not None and broken * 2 > lines:
        raise DataError(
            f"cannot read {str(file)!r}: {broken} of its {lines} lines are no JSON objects; the first: {first.why}: "
            f"{first.text[:60]!r}. One JSON object per line is needed"
        )


def _read_records(file: Path) -> list[dict[str, Any]]:
    """Read rows by hand: the Arrow readers turn the answers "007" and "2018-01-11" into a number and a date."""
    try:
        if file.suffix == ".jsonl":
            return _read_lines(file)
        with file.open(encoding="utf-8-sig", newline="") as stream:
            if file.suffix == ".csv":
                rows = list(csv.DictReader(stream, restkey="", strict=True))
            else:
                rows = json.load(stream)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {str(file)!r}: {error}") from error
    if not rows or not isinstance(rows, list) or not all(isinstance(row, dict) and "" not in row for row in rows):
        raise DataError(f"cannot read {str(file)!r}: one JSON object, or one CSV cell per heading, is needed per row")
    return rows


def _read_lines(file: Path) -> list[dict[str, Any]]:
    lines = file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    rows = [parse_line(line, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise DataError(f"cannot read {str(file)!r}: there is no row in it")
    broken = [row for row in rows if isinstance(row, BrokenLine)]
    refuse_broken(next(iter(broken), None), len(broken), len(rows), file)
    return rows


def _read_arrow(path: Path, source: str, split: str | None) -> Dataset | DatasetDict:
    if path.is_file():
        return datasets.load_dataset("parquet", data_files=str(path))
    if (path / MANIFEST).is_file():
        return datasets.load_dataset("parquet", data_files=[str(file) for file in shard_files(path)])
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(path))
    if path.is_dir() and not any(path.rglob("*.parquet")):
        raise DataError(f"no rows there for split {split!r}: a save_to_disk folder, data.jsonl or Parquet is needed")
    if not path.exists() and not _HUB_NAME.fullmatch(source):
        raise DataError("there is no such file or folder, and it is no name on the Hub")
    return datasets.load_dataset(source if not path.exists() else str(path))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest that data preparation left in a folder. Raises :class:`DataError` when it is none of ours."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if {name: manifest[name] for name in MANIFEST_FORMAT} != MANIFEST_FORMAT:
            raise ValueError("it is of another format")
        if not isinstance(manifest["made_of"], dict) or not isinstance(manifest["units"], dict):
            raise ValueError("it lacks its units")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read {str(folder / MANIFEST)!r}: {error}") from error
    return manifest


def shard_files(folder: Path) -> list[Path]:
    """The Parquet files of a prepared set, in order. Raises :class:`DataError` when it is incomplete or empty."""
    manifest = read_manifest(folder)
    if not manifest.get("complete"):
        raise DataError(f"{str(folder)!r} is incomplete: its step was interrupted; run the same command again")
    names = [shard["file"] for unit in manifest["units"].values() for shard in unit["shards"]]
    if not names:
        raise DataError(f"{str(folder)!r} holds no rows: its step set all of them aside")
    if any(Path(name).name != name for name in names):
        raise DataError(f"{str(folder / MANIFEST)!r} names files outside its folder")
    return [folder / name for name in names]


def _pick_split(found: Dataset | DatasetDict, split: str | None, source: str) -> Dataset:
    if isinstance(found, Dataset):
        if split not in (None, "train", str(found.split)):
            raise DataError(f"{source!r} has no split {split!r}: it is one data set without splits; leave split out")
        return found
    name = split or (next(iter(found)) if len(found) == 1 else "train")
    if name not in found:
        raise DataError(f"{source!r} has no split {name!r}; set split to one of {sorted(found)}")
    if split is None:
        logger.info("%s: split %r of %s", source, name, sorted(found))
    return found[name]


def _columns(names: Sequence[str], source: str) -> tuple[dict[str, str], list[str]]:
    """``{our column: the source's column}``, and the columns left over."""
    chosen = {ours: next((name for name in theirs if name in names), None) for ours, theirs in NAMES.items()}
    missing = [NAMES[ours] for ours in ("image", "question", "answer") if chosen[ours] is None]
    if missing:
        needed = ", ".join(" or ".join(map(repr, theirs)) for theirs in missing)
        raise DataError(f"{source!r} has the columns {sorted(names)}, but lacks {needed}; rename or add them")
    used = {*chosen.values(), *NAMES, "images", "image_error"}
    return {ours: name for ours, name in chosen.items() if name}, [name for name in names if name not in used]


def _from_records(rows: list[dict[str, Any]], root: Path, source: str) -> Dataset:
    """Rows whose pictures are files under ``root``."""
    names, others = _columns(list(dict.fromkeys(name for row in rows for name in row)), source)
    columns = {name: [row.get(name) for row in rows] for name in (*names.values(), *others)}
    paths, errors = zip(*(_paths_or_error(row, names["image"], root) for row in rows), strict=True)
    several = {"images": paths} if any(len(one) > 1 for one in paths) else {}
    flat = several | {name: columns[name] for name in others if all(map(is_flat, columns[name]))}
    try:
        base = Dataset.from_dict({"image": [next(iter(one), None) for one in paths], **flat}).cast_column(
            "image", Value("string")
        )
    except pa.ArrowException as error:
        raise DataError(f"{source!r}: a column mixes types ({error}); give all its values one type") from error
    return _assemble(base, {ours: columns[name] for ours, name in names.items()}, errors, names.get("id"))


def _paths_or_error(row: Mapping[str, Any], name: str, root: Path) -> tuple[list[str], str]:
    """A row's pictures, mostly one, as absolute paths below ``root``, or why there are none."""
    if isinstance(row, BrokenLine):
        return [], row.why
    try:
        value = row.get("images") if _several(row.get("images")) else row.get(name)
        return [_path(one, root) for one in (value if _several(value) else [only_image(value)])], ""
    except DataError as error:
        return [], error.reason


def _several(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 1


def _path(value: Any, root: Path) -> str:
    value = value.get("path") if isinstance(value, Mapping) else value
    return str(local_path(value if isinstance(value, str) else "", root))


def _from_dataset(dataset: Dataset, root: Path, source: str) -> Dataset:
    """Rows of an Arrow table. Embedded pictures stay where they are, neither read nor copied (lists of them are)."""
    names, others = _columns(dataset.column_names, source)
    kinds = dataset.features
    listed = [name for name in ("images", names["image"]) if isinstance(kinds.get(name), datasets.List)][:1]
    pictures = list(dict.fromkeys([names["image"], *listed]))
    if not any(_is_text(kinds[name]) for name in pictures):
        for name in pictures:
            dataset = dataset.cast_column(name, datasets.List(EMBEDDED) if name in listed else EMBEDDED)
        base = dataset.select_columns([*pictures, *(name for name in others if is_flat(kinds[name]))])
        base = _one_or_several(base, *listed) if listed else base
        base = base if "image" in base.column_names else base.rename_column(names["image"], "image")
        there = pc.is_valid(pc.struct_field(base.data.column("image"), "bytes")).to_pylist()
        if any(there):
            texts = {ours: list(dataset[name]) for ours, name in names.items() if ours != "image"}
            return _assemble(base, texts, ["" if one else NOT_EMBEDDED for one in there], names.get("id"))
    return _from_records(dataset.to_list(), root, source)


def _is_text(kind: Any) -> bool:
    """Whether a column of pictures holds paths."""
    kind = kind.feature if isinstance(kind, datasets.List) else kind
    return getattr(kind, "dtype", "") in ("string", "large_string")


def _one_or_several(base: Dataset, listed: str) -> Dataset:
    """Rows whose embedded pictures are lists, as ``image``, and where a row has several of them as ``images``, too.

    An ``image`` of a row's own counts where its list is empty; with a picture without bytes the row has none.
    """
    several = (pc.max(pc.list_value_length(base.data.column(listed))).as_py() or 0) > 1

    def split(batch: dict[str, list]) -> dict[str, list]:
        lists = batch[listed]
        own = batch["image"] if listed != "image" and "image" in batch else [None] * len(lists)
        whole = [bool(found) and all(one and one["bytes"] is not None for one in found) for found in lists]
        pairs = list(zip(lists, whole, strict=True))
        first = [found[0] if good else None if found else one for (found, good), one in zip(pairs, own, strict=True)]
        many = [found if good and len(found) > 1 else None for found, good in pairs]
        return {"image": first} | ({"images": many} if several else {})

    rest = {name: kind for name, kind in base.features.items() if name not in ("image", "images")}
    kinds = Features({"image": EMBEDDED, **({"images": datasets.List(EMBEDDED)} if several else {}), **rest})
    return base.map(split, batched=True, batch_size=64, features=kinds, remove_columns=[listed])


def is_flat(value: Any) -> bool:
    """Whether a value or a feature is a scalar or a list of scalars."""
    if isinstance(value, datasets.List):
        value = value.feature
    if isinstance(value, list):
        return all(item is None or isinstance(item, str | int | float) for item in value)
    return value is None or isinstance(value, str | int | float | Value | datasets.ClassLabel)


def _assemble(base: Dataset, raw: Mapping[str, list], errors: Sequence[str], id_name: str | None) -> Dataset:
    """Add the text columns in their final types; what is no text becomes empty, and is reported as that."""
    count = len(base)
    ids = [str(number) if id in (None, "") else str(id) for number, id in enumerate(raw.get("id", [None] * count))]
    if id_name == "doc_id" and len(set(ids)) < count:  # numbers per document or per source, not per row
        ids = [f"{id}#{number}" for number, id in enumerate(ids)]
    texts = {
        "id": ids,
        "question": [value if isinstance(value, str) else "" for value in raw["question"]],
        "answer": [answer_texts(value) for value in raw["answer"]],
        "data_source": ["" if value is None else str(value) for value in raw.get("data_source", [None] * count)],
        "image_error": errors,
    }
    if not any(errors):
        del texts["image_error"]
    for name, values in texts.items():
        kind = datasets.List(Value("string")) if name == "answer" else Value("string")
        base = base.add_column(name, list(values), feature=kind)
    return base
