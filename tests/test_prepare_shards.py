"""Shards and their manifest: whole or not there, resumed after a kill with the same content, read for training."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers import png, row

from data_prep.finding import find
from data_prep.formats import FORMATS
from data_prep.importing import import_rows
from data_prep.shards import UnitWriter
from data_prep.units import run_units, totals
from vt_trl.data import check_rows, load_rows
from vt_trl.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]
UNITS = [(3 * number, 3 * number + 3) for number in range(6)]


def made(number: int) -> dict:
    return {
        "id": f"r{number}",
        "image": png((number, 0, 0)),
        "question": f"What is {number}?",
        "answer": [str(number), f"no. {number}"],
        "data_source": "made",
        "needs_full": number % 2 == 0,
        "region": [0, 0, 10, 10.5],
    }


def write(unit: tuple[int, int], writer: UnitWriter, pause: float = 0.0, fail_at: int | None = None) -> None:
    for number in range(*unit):
        if number == fail_at:
            raise DataError("broken on purpose", row=number)
        time.sleep(pause)
        writer.counts["seen"] += 1
        if number % 5 == 4:
            writer.note("quarantine.jsonl", {"row": number, "image": png((number, 0, 0))})
        else:
            writer.add(made(number))


def content(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in sorted(folder.iterdir())}


@pytest.fixture
def whole(tmp_path) -> Path:
    run_units(tmp_path / "whole", UNITS, write, made_of={"source": "x"})
    return tmp_path / "whole"


def test_rows_come_back_for_training(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    loaded = load_rows(whole)
    assert loaded["id"][:] == [f"r{number}" for number in range(18) if number % 5 != 4]
    assert loaded["answer"][0] == ["0", "no. 0"] and loaded["needs_full"][:3] == [True, False, True]
    assert loaded["region"][0] == [0, 0, 10, 10.5] and loaded["choices"][0] is None
    assert check_rows(loaded) == []
    assert [json.loads(line)["row"] for line in (whole / "quarantine.jsonl").open()] == [4, 9, 14]
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["complete"] and totals(manifest) == {"rows": 15, "seen": 18}
    assert not (whole / ".work").exists()


def test_workers_write_the_same_bytes(whole, tmp_path):
    run_units(tmp_path / "two", UNITS, write, made_of={"source": "x"}, workers=2)
    assert content(tmp_path / "two") == content(whole)


def test_a_run_that_failed_goes_on(whole, tmp_path):
    out = tmp_path / "failed"
    with pytest.raises(DataError, match="row 10: broken on purpose"):
        run_units(out, UNITS, partial(write, fail_at=10), made_of={"source": "x"})
    assert sorted(one.name for one in out.glob("*.parquet")) == [f"train-00000{n}-00.parquet" for n in range(3)]
    with pytest.raises(DataError, match="incomplete.*run the same command again"):
        load_rows(out)
    before = (out / "train-000000-00.parquet").stat().st_mtime_ns
    run_units(out, UNITS, write, made_of={"source": "x"})
    assert (out / "train-000000-00.parquet").stat().st_mtime_ns == before  # not written again
    assert content(out) == content(whole)


def test_a_shard_that_vanished_is_written_again(whole, tmp_path):
    expected = content(whole)
    (whole / "train-000002-00.parquet").unlink()
    run_units(whole, UNITS, write, made_of={"source": "x"})
    assert content(whole) == expected


def test_kill_in_the_middle(whole, tmp_path):
    """SIGKILL while two workers write: no worker stays behind, and the second run leaves the same bytes."""
    out = tmp_path / "killed"
    script = (
        "from functools import partial; from pathlib import Path; import sys; sys.path.insert(0, 'tests')\n"
        "from test_prepare_shards import UNITS, write; from data_prep.units import run_units\n"
        "if __name__ == '__main__':\n"
        f"    run_units(Path({str(out)!r}), UNITS, partial(write, pause=0.3), made_of={{'source': 'x'}}, workers=2)\n"
    )
    file = tmp_path / "script.py"
    file.write_text(script)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    child = subprocess.Popen([sys.executable, str(file)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("*.parquet")) and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    there = len(list(out.glob("*.parquet")))
    assert 1 <= there < len(UNITS)
    time.sleep(1.5)  # longer than a unit takes: a worker that went on would have finished one
    assert len(list(out.glob("*.parquet"))) <= there + 1
    run_units(out, UNITS, write, made_of={"source": "x"})
    assert content(out) == content(whole)


def test_kill_of_an_import(tmp_path):
    """SIGKILL while two workers import a JSON file: the second run leaves what an undisturbed one does."""
    root, out = tmp_path / "source", tmp_path / "killed"
    root.mkdir()
    (root / "0.png").write_bytes(png((9, 0, 0)))
    (root / "rows.json").write_text(json.dumps([row(number, image="0.png") for number in range(3000)]))
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from pathlib import Path; from data_prep.finding import find\n"
        "from data_prep.formats import FORMATS; from data_prep.importing import import_rows\n"
        "if __name__ == '__main__':\n"
        "    import_rows(find(sys.argv[1]), FORMATS['rows'], Path(sys.argv[2]), unit_rows=50, workers=2)\n"
    )
    command = [sys.executable, str(script), str(root), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while len(list(out.glob("*.parquet"))) < 5:
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    manifest = import_rows(find(str(root)), FORMATS["rows"], tmp_path / "whole", unit_rows=50)
    assert totals(manifest)["good"] == 3000
    assert content(out) == content(tmp_path / "whole") and len(content(out)) == 62


def test_shards_are_of_bounded_size(tmp_path):
    noise = [os.urandom(2000) for _ in range(40)]
    with UnitWriter(tmp_path, 0, shard_bytes=20_000) as writer:
        for number, data in enumerate(noise):
            writer.add(made(number) | {"image": data})
            writer._flush()
    assert not list(tmp_path.glob("*.parquet"))
    record = writer.publish()
    assert len(record["shards"]) == 4 and record["rows"] == 40
    files = [tmp_path / shard["file"] for shard in record["shards"]]
    assert all(file.stat().st_size < 40_000 for file in files)
    assert [row["bytes"] for file in files for row in pq.read_table(file)["image"].to_pylist()] == noise


def test_folders_of_others_are_left_alone(whole, tmp_path):
    with pytest.raises(ConfigError, match=r"another run .source was 'x' and is 'y'"):
        run_units(whole, UNITS, write, made_of={"source": "y"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    with pytest.raises(ConfigError, match="not empty and holds no output"):
        run_units(tmp_path / "mine", UNITS, write, made_of={})
    (whole / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(DataError, match="cannot read.*manifest.json"):
        load_rows(whole)


def test_a_folder_in_use_is_refused(tmp_path):
    def again(unit: tuple[int, int], writer: UnitWriter) -> None:
        with pytest.raises(ConfigError, match="being written by another run"):
            run_units(tmp_path / "out", UNITS, write, made_of={})
        write(unit, writer)

    run_units(tmp_path / "out", UNITS[:1], again, made_of={})


def test_manifest_cannot_name_files_elsewhere(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    manifest["units"]["0"]["shards"][0]["file"] = "../secret.parquet"
    (whole / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="outside its folder"):
        load_rows(whole)
