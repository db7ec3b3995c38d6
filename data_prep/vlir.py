"""Rationales with looks (VLIR's layout: texts and boxes that alternate) as traces for ``vt-trl sft``.

A source has ``image_path``, ``question``, ``response_list`` (n + 1 texts) and ``img_crop_list`` (n boxes). A trace is
a row with ``segments`` (texts without tags and boxes) and ``crops`` (four numbers per box, in pixels of the upright
original), so that it is bound to no box frame and no shape: the environment of the SFT recipe writes the replies.

    vt-trl prepare vlir SOURCE --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep import main
from vt_trl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from data_prep.importing import Reader
    from data_prep.reading import Unit
    from data_prep.shards import UnitWriter
    from vt_trl.boxes import Box, Sight

TEXTS, BOXES = "response_list", "img_crop_list"
UNIT_ROWS = 1000
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vt-trl prepare vlir", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("source", help="a file or folder, or OWNER/NAME on the Hub, which is downloaded")
    parser.add_argument("--out", required=True, type=Path, help="folder for the traces")
    parser.add_argument("--images", help="folder that paths start from (default: the table's)")
    parser.add_argument("--files", help="pattern inside the source, e.g. '*.jsonl'")
    parser.add_argument(
        "--boxes",
        default="shown_pixels",
        help="the frame of its boxes: original_pixels, shown_pixels (of the writer's picture), per_mille or unit",
    )
    parser.add_argument("--factor", type=int, default=28, help="shown_pixels: sides were multiples of this")
    parser.add_argument("--max-pixels", type=int, default=3_211_264, help="shown_pixels: the largest area shown")
    parser.add_argument("--min-pixels", type=int, default=3136, help="shown_pixels: the smallest area shown")
    parser.add_argument("--tolerance", type=float, default=0.01, help="share of a side by which a box may lie outside")
    return parser


def run(options: argparse.Namespace) -> None:
    from datasets import Features, List, Value

    from data_prep.finding import find
    from data_prep.formats import Format
    from data_prep.importing import QUARANTINE, Reader
    from data_prep.reading import open_table
    from data_prep.units import run_units, totals
    from vt_trl.boxes import Sight
    from vt_trl.rows import FEATURES

    found = find(options.source, None, options.files)
    frame = None if options.boxes == "original_pixels" else options.boxes
    sight = Sight(frame or "unit", options.factor, options.min_pixels, options.max_pixels)
    if not 0 <= options.tolerance < 0.5:
        raise ConfigError(f"--tolerance is {options.tolerance}; it is a share of a side, from 0 to below 0.5.")
    root = Path(options.images).expanduser().absolute() if options.images else found.root
    columns = {
        "id": ("id",),
        "image": ("image_path", "image"),
        "question": ("question",),
        "answer": ("answer",),
        "data_source": ("data_source", "source"),
    }
    layout = Format("VLIR", columns, source="vlir", unique_ids=False, records=with_answer, made={"answer": (TEXTS,)})

    def plan(folder: Path) -> list[tuple[Unit, Reader]]:
        table = open_table(found.files, UNIT_ROWS, folder)
        missing = {TEXTS, BOXES} - set(table.columns)
        if missing:
            raise DataError(f"the source has the columns {table.columns}, but lacks {', '.join(sorted(missing))}")
        reader = Reader(layout, layout.choose(table.columns, {}), str(root), name=found.root.name)
        return [(unit, reader) for unit in table.units]

    made_of = {
        "step": "vlir",
        "files": found.fingerprint(),
        "images": options.images,
        "boxes": [options.boxes, options.factor, options.min_pixels, options.max_pixels, options.tolerance],
        "unit_rows": UNIT_ROWS,
    }
    work = partial(import_unit, sight if frame else None, options.tolerance)
    features = Features({**FEATURES, "segments": List(Value("string")), "crops": List(Value("float64"))})
    manifest = run_units(
        options.out, plan, work, made_of=made_of, features=features, title="import", keep=[QUARANTINE]
    )
    counts = totals(manifest)
    print(f"{counts['good']} good + {counts['quarantined']} quarantined = {counts['all']} rows; {options.out}")


def with_answer(record: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """The record with its answer, which stands in the tags of its last text unless there is a column for it."""
    if not record.get("answer"):
        texts = listed(record.get(TEXTS))
        answers = _ANSWER.findall(texts[-1]) if texts and isinstance(texts[-1], str) else []
        record = {**record, "answer": answers[-1].strip() if answers else None}
    yield record


def import_unit(sight: Sight | None, tolerance: float, job: tuple[Unit, Reader], writer: UnitWriter) -> None:
    """Write the traces of a unit, and set aside what is none. ``sight``: how the writer saw; None: the originals."""
    from data_prep.importing import write_or_set_aside
    from data_prep.reading import read_unit
    from vt_trl.rows import examine

    unit, reader = job
    names = sorted({*reader.columns, TEXTS, BOXES})
    for number, record in read_unit(unit, names):
        (named,) = reader.format.records(record)
        row = reader.row(named)
        found = examine(row)
        reasons = found.reasons
        if not reasons:
            try:
                row |= trace_columns(record, found.picture.size, sight, tolerance)
            except DataError as error:
                reasons = [error.reason]
        write_or_set_aside(writer, number, record, row, reasons)


def trace_columns(
    record: Mapping[str, Any], size: tuple[int, int], sight: Sight | None, tolerance: float
) -> dict[str, list[Any]]:
    """``segments`` and ``crops`` of a record whose original has ``size``. Raises DataError that says what is wrong."""
    from vt_trl.boxes import from_frame, read_box
    from vt_trl.types import Fault

    texts, boxes = listed(record.get(TEXTS)), listed(record.get(BOXES))
    if len(texts) != len(boxes) + 1:
        raise DataError(f"it has {len(texts)} texts and {len(boxes)} boxes; one text more than boxes is needed")
    if not boxes:
        raise DataError("it has no box, so it teaches no look")
    segments = [segment_of(text) for text in texts]
    sides = tuple(map(float, size))
    if sight is not None:
        cell = sight.factor**2
        sides = sight.sides(sight.fit(*size, max(1, sight.min_pixels // cell), sight.max_pixels // cell))
    crops: list[float] = []
    for number, written in enumerate(boxes, start=1):
        box: Box | Fault = read_box(_numbers(written), sides, tolerance)
        if isinstance(box, Fault):
            raise DataError(f"a box cannot be used: {box.value} (box {number})")
        crops += from_frame(box, sides, (0, 0, *size))
    return {"segments": segments, "crops": crops}


def segment_of(text: Any) -> str:
    """The reasoning in a text: without answer, tags, boxes and space around. Raises DataError when none is left."""
    from vt_trl.envs.inline import without_boxes

    if not isinstance(text, str):
        raise DataError(f"a text is a {type(text).__name__}")
    text = without_boxes(_TAG.sub("", _ANSWER.sub("", text)))
    if not text.strip():
        raise DataError("a text holds no reasoning")
    return text.strip()


def _numbers(written: Any) -> Any:
    """The coordinates of a box that is a list, or an object with ``bbox_2d``, maybe as JSON."""
    if isinstance(written, str):
        try:
            written = json.loads(written)
        except (ValueError, RecursionError):
            return None
    return written.get("bbox_2d") if isinstance(written, Mapping) else written


def listed(value: Any) -> list[Any]:
    """A list, maybe as JSON; empty when it is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return list(value) if isinstance(value, list | tuple) else []


if __name__ == "__main__":
    main(parser(), run)
