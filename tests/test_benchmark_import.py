"""The import benchmark measures what it says, and its page shows the committed figures."""

import json
from pathlib import Path

import psutil
import pytest

from benchmarks.import_rows import _resident, make_source, run_import, run_map

ROOT = Path(__file__).resolve().parents[1]
REPORT = json.loads((ROOT / "docs" / "results" / "benchmark_import_rows.json").read_text(encoding="utf-8"))


def test_both_ways_read_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.import_rows._PICTURES", 8)
    make_source(tmp_path / "source", 1500, seed=0)
    assert run_import(tmp_path / "source", tmp_path / "rows", 0) > 0
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    assert manifest["units"]["0"]["counts"] == {"all": 1500, "good": 1500}
    (tmp_path / "map").mkdir()
    assert run_map(tmp_path / "source", tmp_path / "map", 0) > 0  # asserts the widths it read


def test_memory_is_that_of_the_tree():
    assert _resident(psutil.Process()) >= psutil.Process().memory_info().rss * 0.9


@pytest.mark.parametrize("size", REPORT["sizes"], ids=lambda size: str(size["rows"]))
def test_page_shows_the_report(size):
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    rows = f"{size['rows']:,} rows"
    speeds = f"| {size['rows_per_second']} | {round(size['rows'] / size['map_seconds'])} |"
    assert f"| import_rows | rows per second, {rows} {speeds}" in text
    assert f"| import_rows | peak memory in MiB, {rows} | {size['peak_mib']} | {size['map_peak_mib']} |" in text
    assert size["ratio"] == round(size["map_seconds"] / size["seconds"], 2)


def test_memory_does_not_grow_with_the_rows():
    peaks = [size["peak_mib"] for size in REPORT["sizes"]]
    assert REPORT["sizes"][-1]["rows"] == 1_000_000 and max(peaks) <= 1.1 * min(peaks)
