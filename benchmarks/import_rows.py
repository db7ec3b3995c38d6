"""How fast rows are imported, and how much memory that takes, next to the least ``datasets`` could do.

    python -m benchmarks.import_rows --rows 20000 100000 --json FILE

For each number of rows a saved data set (Arrow, 32 x 32 PNGs of noise, a question and an answer each) is made and read
twice, each time in a process of its own: by ``vt-trl prepare import``, which decodes every picture, checks every row
and writes Parquet shards; and by a plain ``datasets.map`` that decodes every picture and keeps its width. Seconds are
those of the step itself, without the start of the interpreter; memory is the largest sum of resident memory over the
process and all that it starts, seen every 20 ms. ``ratio`` is the map's seconds over the import's: above 1 the import
is faster.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from PIL import Image

from benchmarks.reporting import write

_PICTURES = 4096  # different ones; a million would tell the disk's speed
_PER_FILE, _PER_BATCH = 100_000, 1000


def make_source(folder: Path, rows: int, seed: int) -> None:
    """A data set as ``save_to_disk`` leaves it, written batch by batch."""
    import datasets

    noise = np.random.default_rng(seed).integers(0, 256, (_PICTURES, 32, 32, 3), dtype=np.uint8)
    pictures = [{"bytes": _png(one), "path": None} for one in noise]
    texts = {name: datasets.Value("string") for name in ("id", "question", "answer", "data_source")}
    features = datasets.Features({"image": datasets.Image(), **texts})
    folder.mkdir(parents=True)
    files = [f"data-{number:05d}.arrow" for number in range(-(-rows // _PER_FILE))]
    for number, file in enumerate(files):
        last = min(rows, (number + 1) * _PER_FILE)
        with pa.OSFile(str(folder / file), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as stream:
            for start in range(number * _PER_FILE, last, _PER_BATCH):
                some = range(start, min(last, start + _PER_BATCH))
                columns = {
                    "image": [pictures[row % _PICTURES] for row in some],
                    "id": [f"row-{row}" for row in some],
                    "question": [f"What is number {row}?" for row in some],
                    "answer": [str(row) for row in some],
                    "data_source": ["noise"] * len(some),
                }
                stream.write_batch(pa.RecordBatch.from_pydict(columns, features.arrow_schema))
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    formats = {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
    state = {"_data_files": [{"filename": file} for file in files], "_fingerprint": "0", "_split": None, **formats}
    (folder / "state.json").write_text(json.dumps(state))


def _png(pixels: np.ndarray) -> bytes:
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def run_import(source: Path, out: Path, workers: int) -> float:
    """Seconds of the step."""
    step = importlib.import_module("data_prep.import")
    importlib.import_module("data_prep.importing")
    options = step.parser().parse_args([str(source), "rows", "--out", str(out), "--workers", str(workers)])
    began = time.perf_counter()
    step.run(options)
    return time.perf_counter() - began


def run_map(source: Path, out: Path, workers: int) -> float:
    """Seconds of a map that decodes, on as many processes."""
    import datasets

    datasets.disable_progress_bars()
    began = time.perf_counter()
    rows = datasets.load_from_disk(str(source))
    rows = rows.map(
        _width,
        remove_columns=rows.column_names,
        num_proc=workers or None,
        load_from_cache_file=False,
        cache_file_name=str(out / "widths.arrow"),
    )
    seconds = time.perf_counter() - began
    assert sum(rows["width"]) == 32 * len(rows)
    return seconds


def _width(row: dict[str, Any]) -> dict[str, int]:
    picture = row["image"]
    picture.load()
    return {"width": picture.width}


def watched(which: str, source: Path, out: Path, workers: int) -> dict[str, float]:
    """Run ``which`` in a process of its own: its seconds, and the peak memory of it and its children in MiB."""
    out.mkdir()
    command = [sys.executable, "-m", __spec__.name, "--only", which, str(source), str(out), str(workers)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    process, peak = psutil.Process(child.pid), 0
    while child.poll() is None:
        peak = max(peak, _resident(process))
        time.sleep(0.02)
    said = child.stdout.read()
    if child.returncode:
        raise RuntimeError(f"{which} failed with status {child.returncode}: {said[-500:]}")
    return {"seconds": round(float(said.splitlines()[-1]), 2), "peak_mib": round(peak / 2**20)}


def _resident(process: psutil.Process) -> int:
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.NoSuchProcess:  # ended meanwhile
        pass
    return total


def measure(rows: int, workers: int, seed: int, folder: Path) -> dict[str, Any]:
    make_source(folder / "source", rows, seed)
    done = {"import": watched("import", folder / "source", folder / "import", workers)}
    manifest = json.loads((folder / "import" / "rows" / "manifest.json").read_text())
    written = sum(unit["rows"] for unit in manifest["units"].values())
    if written != rows:
        raise RuntimeError(f"{written} of {rows} rows arrived")
    done["map"] = watched("map", folder / "source", folder / "map", workers)
    shutil.rmtree(folder)
    return {
        "rows": rows,
        "seconds": done["import"]["seconds"],
        "peak_mib": done["import"]["peak_mib"],
        "rows_per_second": round(rows / done["import"]["seconds"]),
        "map_seconds": done["map"]["seconds"],
        "map_peak_mib": done["map"]["peak_mib"],
        "ratio": round(done["map"]["seconds"] / done["import"]["seconds"], 2),
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.import_rows", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000], help="sizes to measure, one after the other")
    parser.add_argument("--workers", type=int, default=0, help="processes of either way; 0: none but the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where the data may lie for a while (4 KB per row)")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--only", nargs=4, help=argparse.SUPPRESS)  # what a measured process is told
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Measure, print and write; returns the report."""
    options = parse_args(argv)
    if options.only:
        which, source, out, workers = options.only
        run = {"import": run_import, "map": run_map}[which]
        print(run(Path(source), Path(out) / "rows" if which == "import" else Path(out), int(workers)))
        return None
    sizes = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            sizes.append(measure(rows, options.workers, options.seed, Path(folder) / "data"))
        print(json.dumps(sizes[-1]), flush=True)
    from demos.reading.stages import provenance

    report = {"workers": options.workers, "picture": "32 x 32 PNG of noise", "sizes": sizes} | provenance()
    write(report, options.json)
    return report


if __name__ == "__main__":
    main()
