"""Checking a set: every bad row with every reason, pictures of evaluation sets found, and no row lost."""

import base64
import json
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import picture
from datasets import Dataset
from helpers import png, row
from PIL import Image

from data_prep.hashes import nearest, perceptual_hash, pixel_hash
from vt_trl import cli
from vt_trl.data import load_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def smooth(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A picture with large shapes, as photographs and charts have; noise has no likeness."""
    return picture(seed, (6, 5)).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def make_set(folder: Path, *rows: dict) -> Path:
    """Rows with pictures 0.png, 1.png, ... of their own."""
    (folder / "images").mkdir(parents=True)
    for number in range(len(rows)):
        (folder / "images" / f"{number}.png").write_bytes(encoded(smooth(number)))
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def check(*words: str | Path) -> int:
    return cli.main(["prepare", "check", *map(str, words), "--workers", "0"])


@pytest.fixture
def mixed(tmp_path) -> Path:
    source = make_set(
        tmp_path / "set",
        row(0),
        row(1, answer=""),
        row(2, question="<|image_pad|> What?", region=[0, 0, 999, 9]),
        row(0, image="images/3.png"),
        row(4, image="images/none.png", choices=["a", "b"], answer="c"),
        row(5, note="kept"),
    )
    return source


EXPECTED = {1: ["the answer is empty"], 2: ["placeholder", "outside"], 3: ["another row: row 0"]}
EXPECTED[4] = ["No such file", "not among"]


def test_all_reasons_of_all_bad_rows(mixed, capsys):
    assert check(mixed) == 1
    lines = capsys.readouterr().out.splitlines()
    bad = {int(line.split()[1]): line for line in lines if line.startswith("row ")}
    assert list(bad) == list(EXPECTED)
    assert all(word in bad[number] for number, words in EXPECTED.items() for word in words)
    assert lines[-1] == "2 good + 4 quarantined = 6 rows"
    assert "1 x cannot read the image" in lines


def test_bad_rows_are_kept_whole(mixed, tmp_path):
    assert check(mixed, "--quarantine", tmp_path / "bad.jsonl", "--json", tmp_path / "report.json") == 0
    bad = [json.loads(line) for line in (tmp_path / "bad.jsonl").open()]
    assert [one["row"] for one in bad] == [1, 2, 3, 4] and [one["id"] for one in bad] == ["r1", "r2", "r0", "r4"]
    assert all(word in "; ".join(one["reasons"]) for one in bad for word in EXPECTED[one["row"]])
    assert base64.b64decode(bad[0]["image"]["base64"]) == encoded(smooth(1))
    assert bad[1]["record"]["region"] == [0, 0, 999, 9] and bad[3]["record"]["image"] == "images/none.png"
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["good"], report["quarantined"], report["all"]) == (2, 4, 6) and len(report["reasons"]) == 6
    assert not [one for one in tmp_path.iterdir() if one.name.startswith("tmp")]
    assert check(mixed, "--quarantine", tmp_path / "bad.jsonl") == 2  # never written over


def test_good_rows_are_written_with_their_columns(tmp_path):
    pictures = [{"bytes": encoded(smooth(number)), "path": None} for number in range(3)]
    columns = {"image": pictures, "question": ["What?"] * 3, "answer": ["a", "", "c"], "pass_rate": [0.5, 0.1, 0.25]}
    source = Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
    source.to_parquet(tmp_path / "x.parquet")
    assert check(tmp_path / "x.parquet", "--out", tmp_path / "good") == 0
    good = load_rows(tmp_path / "good")
    assert good["pass_rate"][:] == [0.5, 0.25] and good["answer"][:] == [["a"], ["c"]]
    assert check(tmp_path / "good", "--out", tmp_path / "again") == 0  # a prepared set is a source as well
    assert load_rows(tmp_path / "again").to_list() == good.to_list()
    assert check(tmp_path / "good") == 0


def test_pictures_of_evaluation_sets_are_found(tmp_path, capsys):
    source = make_set(tmp_path / "set", *(row(number) for number in range(5)))
    held_out = make_set(tmp_path / "test", row(7), row(8), row(9))
    (held_out / "images" / "7.png").write_bytes(encoded(smooth(50)))
    (held_out / "images" / "8.png").write_bytes(encoded(smooth(1), "BMP"))  # the same pixels in another format
    (held_out / "images" / "9.png").write_bytes(encoded(smooth(3).resize((100, 75)), "JPEG", quality=60))
    assert check(source, "--against", held_out) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("row ")]
    assert len(lines) == 2
    assert lines[0].startswith("row 1 ") and f"is in an evaluation set: row 1 of {held_out}" in lines[0]
    assert lines[1].startswith("row 3 ") and f"looks like one in an evaluation set: row 2 of {held_out}" in lines[1]
    assert check(source, "--against", held_out, "--distance", "0") == 1
    assert check(source, "--distance", "99") == 2
    (held_out / "data.jsonl").write_text(json.dumps({"imgname": "8.png", "query": "other columns"}))
    assert check(source, "--against", held_out, "--distance", "0") == 1
    assert "4 good + 1 quarantined" in capsys.readouterr().out.splitlines()[-1]


def test_workers_find_the_same(mixed, tmp_path):
    for workers in ("0", "2"):
        assert cli.main(["prepare", "check", str(mixed), "--out", str(tmp_path / workers), "--workers", workers]) == 0
    files = [{one.name: one.read_bytes() for one in (tmp_path / workers).iterdir()} for workers in ("0", "2")]
    assert files[0] == files[1]


def test_pixel_hash_is_of_pixels():
    image = smooth(0)
    assert pixel_hash(image) == pixel_hash(Image.open(BytesIO(encoded(image))).convert("RGB"))
    changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    assert pixel_hash(changed) != pixel_hash(image)
    assert pixel_hash(Image.new("RGB", (2, 8))) != pixel_hash(Image.new("RGB", (4, 4)))


def test_perceptual_hash_tells_likeness():
    hashes = np.array([perceptual_hash(smooth(seed)) for seed in range(12)], np.uint64)
    smaller = np.array([perceptual_hash(smooth(seed).resize((80, 60))) for seed in range(12)], np.uint64)
    place, bits = nearest(smaller, hashes)
    assert place.tolist() == list(range(12)) and bits.max() <= 4
    others = np.array([perceptual_hash(smooth(seed)) for seed in range(12, 24)], np.uint64)
    assert nearest(others, hashes)[1].min() > 4
    assert perceptual_hash(Image.open(BytesIO(png((9, 9, 9)))).convert("RGB")) is None
    assert nearest(hashes, hashes[:0])[1].tolist() == [65] * 12
