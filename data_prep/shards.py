"""Writing rows: Parquet shards of bounded size, each whole or not there, and a manifest that lets a killed run go on.

A run is cut into *units*, a fixed part of the input each. The rows of one unit go into files of its own, under
temporary names until all are closed; then they are renamed and the unit is entered in ``manifest.json``. A run that is
started again skips the units in the manifest, so what it leaves behind does not depend on when it was killed.

    out/train-000003-00.parquet   the rows of unit 3 (and -01 ... where one file would be too large)
    out/quarantine.jsonl          rows set aside, in order of the input; steps name such files themselves
    out/manifest.json             what it was made of, and rows, bytes and counts of each unit
"""

from __future__ import annotations

import base64
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

from vt_trl.errors import ConfigError
from vt_trl.rows import FEATURES
from vt_trl.sources import MANIFEST, MANIFEST_FORMAT, read_manifest
from vt_trl.whole import changes, to_disk, write_whole

WORK = ".work"  # inside the output folder while a run is not complete
_GROUP_ROWS, _GROUP_BYTES = 1000, 32 * 2**20  # a row group ends at whichever comes first: what a worker holds
_SHARD_BYTES = 256 * 2**20


class UnitWriter:
    """Writes the rows of one unit. A context manager: nothing appears under its final name unless it ends well.

    Args:
        out: folder of the run.
        unit: number of the unit.
        features: columns of the rows; a row may lack some, and holds no others.
    """

    def __init__(self, out: Path, unit: int, features: Features = FEATURES, shard_bytes: int = _SHARD_BYTES):
        self.out, self.unit, self.shard_bytes = Path(out), unit, shard_bytes
        self.counts: Counter[str] = Counter()  # whatever the step counts, added up over all units
        self.features = features  # may be replaced before the first row
        self._rows: list[Mapping[str, Any]] = []
        self._held = self._written = 0  # bytes: of the rows held, and in the shard that is open
        self._parquet: pq.ParquetWriter | None = None
        self._shards: list[dict[str, Any]] = []
        self._sides: dict[str, Any] = {}
        self._names: list[tuple[Path, Path]] = []  # temporary name, final name

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row; ``image`` holds the bytes of a picture file, as ``bytes`` or ``{"bytes", "path"}``."""
        picture = row["image"]
        if not isinstance(picture, Mapping):
            row = {**row, "image": {"bytes": picture, "path": None}}
        self._rows.append(row)
        self._held += len(row["image"]["bytes"]) + 200
        self._held += sum(len(one["bytes"]) for one in row.get("images") or ())
        if len(self._rows) >= _GROUP_ROWS or self._held >= _GROUP_BYTES:
            self._flush()

    def note(self, file: str, record: Mapping[str, Any]) -> None:
        """Write a line of a side file, such as ``quarantine.jsonl``; bytes in it become base64."""
        if file not in self._sides:
            self._sides[file] = self._temporary(self.out / WORK / f"{file}.{self.unit:06d}").open(
                "w", encoding="utf-8"
            )
        self._sides[file].write(json.dumps(record, ensure_ascii=False, default=_as_json) + "\n")

    def __enter__(self) -> UnitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is None:
            self._flush()
        self._close_shard()
        for stream in self._sides.values():
            stream.close()
        if kind is not None:
            for temporary, _ in self._names:
                temporary.unlink(missing_ok=True)

    def publish(self) -> dict[str, Any]:
        """Give all files their final names; returns what the manifest says of the unit."""
        for temporary, final in self._names:
            to_disk(temporary)
            os.replace(temporary, final)
        for shard in self._shards:
            shard["bytes"] = (self.out / shard["file"]).stat().st_size
        rows = sum(shard["rows"] for shard in self._shards)
        return {"rows": rows, "shards": self._shards, "sides": sorted(self._sides), "counts": dict(self.counts)}

    def _temporary(self, final: Path) -> Path:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        self._names.append((temporary, final))
        return temporary

    def _flush(self) -> None:
        if not self._rows:
            return
        schema = self.features.arrow_schema
        table = pa.Table.from_pylist(self._rows, schema=schema)
        if self._parquet is None:
            name = f"train-{self.unit:06d}-{len(self._shards):02d}.parquet"
            self._parquet = pq.ParquetWriter(
                self._temporary(self.out / name), schema, use_dictionary=["data_source"], write_statistics=False
            )
            self._shards.append({"file": name, "rows": 0})
        self._parquet.write_table(table)
        self._shards[-1]["rows"] += len(self._rows)
        self._written += self._held
        self._rows, self._held = [], 0
        if self._written >= self.shard_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
        self._parquet, self._written = None, 0


def earlier_rows(writer: UnitWriter, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns of what earlier units of the run have written, in their order; units must be run one by one."""
    files = sorted(writer.out.glob("train-*.parquet"))
    earlier = [file for file in files if int(file.name.split("-")[1]) < writer.unit]
    return [row for file in earlier for row in pq.read_table(file, columns=list(columns)).to_pylist()]


def open_manifest(out: Path, made_of: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a run that goes on, or a new one. Units whose files are gone are not in it.

    ``made_of``: all that the output depends on (JSON values). Raises :class:`ConfigError` when the folder holds the
    output of another run, or files of somebody else.
    """
    made_of = json.loads(json.dumps(made_of))
    if not (out / MANIFEST).is_file():
        if out.exists() and any(one.name != WORK and not one.name.endswith(".tmp") for one in out.iterdir()):
            raise ConfigError(f"{str(out)!r} is not empty and holds no output of a step; choose an empty folder.")
        return {**MANIFEST_FORMAT, "made_of": made_of, "complete": False, "units": {}}
    manifest = read_manifest(out)
    changed = changes(manifest["made_of"], made_of)
    if changed:
        raise ConfigError(
            f"{str(out)!r} holds the output of another run ({changed}); choose another folder, or remove it first."
        )
    there = {
        name: unit for name, unit in manifest["units"].items() if _is_there(out, name, unit, manifest["complete"])
    }
    if manifest["complete"] and len(there) < len(manifest["units"]):  # side files were joined: nothing to go on from
        there = {}
    return manifest | {"units": there, "complete": bool(there) and manifest["complete"]}


def write_manifest(out: Path, manifest: Mapping[str, Any]) -> None:
    write_whole(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def side_part(out: Path, name: str, unit: int | str) -> Path:
    """Where a unit's lines of a side file are until all units are there."""
    return out / WORK / f"{name}.{int(unit):06d}"


def _is_there(out: Path, number: str, unit: Mapping[str, Any], joined: bool) -> bool:
    if not joined and not all(side_part(out, name, number).is_file() for name in unit["sides"]):
        return False
    return all(
        (out / shard["file"]).is_file() and (out / shard["file"]).stat().st_size == shard["bytes"]
        for shard in unit["shards"]
    )


def _as_json(value: Any) -> Any:
    """What JSON lacks; nothing of a row that is set aside may be lost."""
    if isinstance(value, bytes | bytearray | memoryview):
        return {"base64": base64.b64encode(value).decode()}
    return str(value)
