"""Every reason against every row of a set, also those that need other rows: doubled ids, pictures of evaluation sets.

Two passes. The first decodes every picture and keeps 24 bytes per row (hashes of id and picture); the second writes
good and bad rows apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.finding import Found, find
from data_prep.formats import PICTURES
from data_prep.hashes import nearest, perceptual_hash, pixel_hash, text_hash
from data_prep.importing import QUARANTINE, UNIT_ROWS, Reader, reader_of, write_or_set_aside
from data_prep.reading import Unit, open_table, read_unit
from data_prep.shards import UnitWriter
from data_prep.units import in_order, results, run_units
from vt_trl.errors import ConfigError, DataError
from vt_trl.images import load_image
from vt_trl.rows import examine

DISTANCE = 4  # bits of 64 in which pictures that count as alike may differ
_NONE = np.uint64(0)  # of a picture that has no hash


@dataclass
class Looked:
    """What the first pass keeps of one unit: hashes of its R rows (uint64, shape (R,)) and the bad ones so far."""

    ids: np.ndarray
    pixels: np.ndarray
    looks: np.ndarray
    bad: dict[int, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pictures:
    """The pictures of one evaluation set: hashes (E,), and how many could not be read."""

    name: str
    pixels: np.ndarray
    looks: np.ndarray
    unreadable: int


def check_set(
    found: Found,
    out: Path,
    *,
    against: Sequence[str] = (),
    distance: int = DISTANCE,
    keep_good: bool = True,
    workers: int = 0,
    unit_rows: int = UNIT_ROWS,
) -> dict[str, Any]:
    """Write the good rows of a set to ``out`` and the bad ones to ``out/quarantine.jsonl``; returns the manifest.

    ``against``: evaluation sets none of whose pictures may occur, exactly or within ``distance`` bits of the
    perceptual hash. ``keep_good=False`` writes only the bad rows. Raises :class:`DataError` for what cannot be read.
    """
    if not 0 <= distance <= 16:
        raise ConfigError(f"distance is {distance}; of 64 bits 0 to 16 may differ before all pictures look alike.")
    others = {name: find(name) for name in against}
    made_of = {
        "step": "check",
        "files": found.fingerprint(),
        "against": {name: other.fingerprint() for name, other in others.items()},
        "distance": distance,
        "keep_good": keep_good,
        "unit_rows": unit_rows,
    }

    def plan(folder: Path) -> list[tuple[Unit, Reader, Mapping[int, list[str]]]]:
        table = open_table(found.files, unit_rows, folder)
        reader = reader_of(table, found)
        looked = in_order(results(partial(_look, reader, bool(others)), table.units, workers), len(table.units))
        sets = [
            _pictures(name, other, unit_rows, folder / f"set-{place}", workers)
            for place, (name, other) in enumerate(others.items())
        ]
        bad = _join(looked, sets, distance)
        spans = [range(unit[0].start, unit[-1].start + unit[-1].rows) for unit in table.units]
        mine = [{number: bad[number] for number in span if number in bad} for span in spans]
        return [(unit, reader, reasons) for unit, reasons in zip(table.units, mine, strict=True)]

    work = partial(_write, keep_good)
    return run_units(out, plan, work, made_of=made_of, workers=workers, title="check", keep=[QUARANTINE])


def _look(reader: Reader, compare: bool, unit: Unit) -> Looked:
    ids, pixels, looks, bad = [], [], [], {}
    for number, _, row in reader.rows(unit):
        found = examine(row)
        if found.reasons:
            bad[number] = found.reasons
        ids.append(text_hash(row["id"]))
        pixels.append(pixel_hash(found.picture) if compare and found.picture else _NONE)
        looks.append((perceptual_hash(found.picture) or _NONE) if compare and found.picture else _NONE)
    return Looked(*(np.array(one, np.uint64) for one in (ids, pixels, looks)), bad)


def _pictures(name: str, found: Found, unit_rows: int, folder: Path, workers: int) -> Pictures:
    """Hashes of all pictures of an evaluation set, whatever else its columns are."""
    table = open_table(found.files, unit_rows, folder)
    chosen = PICTURES.choose(table.columns, {}, needed=("image",))
    reader = Reader(PICTURES, chosen, str(found.root))
    parts = in_order(results(partial(_hashes, reader), table.units, workers), len(table.units))
    pixels, looks = (np.concatenate([part[place] for part in parts]) for place in (0, 1))
    unreadable = int((pixels == _NONE).sum())
    if unreadable == len(pixels):
        raise DataError(f"--against {name!r}: none of its {unreadable} pictures can be read")
    return Pictures(name, pixels, looks, unreadable)


def _hashes(reader: Reader, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    pixels, looks = [], []
    for _, record in read_unit(unit, reader.columns):
        try:
            picture = load_image(reader.picture(record))
            pixels.append(pixel_hash(picture))
            looks.append(perceptual_hash(picture) or _NONE)
        except DataError:
            pixels.append(_NONE)
            looks.append(_NONE)
    return np.array(pixels, np.uint64), np.array(looks, np.uint64)


def _join(looked: Sequence[Looked], sets: Sequence[Pictures], distance: int) -> dict[int, list[str]]:
    """All reasons by row: those of the first pass, and those that need more than the row."""
    bad = {number: list(reasons) for part in looked for number, reasons in part.bad.items()}
    ids = np.concatenate([part.ids for part in looked])
    _, first, place = np.unique(ids, return_index=True, return_inverse=True)
    for number in np.flatnonzero(first[place] != np.arange(len(ids))).tolist():
        bad.setdefault(number, []).append(f"its id is that of another row: row {first[place[number]]}")
    if sets:
        pixels, looks = (np.concatenate([getattr(part, name) for part in looked]) for name in ("pixels", "looks"))
    for one in sets:
        same = np.flatnonzero(np.isin(pixels, one.pixels) & (pixels != _NONE))
        where = {int(value): place for place, value in reversed(list(enumerate(one.pixels)))}
        for number in same.tolist():
            bad.setdefault(number, []).append(
                f"its picture is in an evaluation set: row {where[int(pixels[number])]} of {one.name}"
            )
        there = np.flatnonzero(one.looks != _NONE)
        rest = np.setdiff1d(np.flatnonzero(looks != _NONE), same)
        place, bits = nearest(looks[rest], one.looks[there])
        for number, found, differing in zip(rest.tolist(), place.tolist(), bits.tolist(), strict=True):
            if differing <= distance:
                bad.setdefault(number, []).append(
                    f"its picture looks like one in an evaluation set: row {there[found]} of {one.name} ({differing} "
                    "of 64 bits differ)"
                )
    return bad


def _write(keep_good: bool, job: tuple[Unit, Reader, Mapping[int, list[str]]], writer: UnitWriter) -> None:
    unit, reader, bad = job
    writer.features = reader.features
    for number, record, row in reader.rows(unit):
        write_or_set_aside(writer, number, record, row, bad.get(number, ()), keep_good)
