"""Rows from every source come out alike: saved data sets, Parquet, text files with pictures, the Hub."""

import json
import logging

import datasets
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from helpers import png, row

from vt_trl.data import check_rows, episode_row, load_rows, require_good_rows
from vt_trl.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def red(loaded: dict) -> int:
    return episode_row(loaded)["image"].getpixel((0, 0))[0]


def visionthink(count: int = 3, split: str | None = None, listed: bool = False) -> Dataset:
    pictures = [{"bytes": png((10 + number, 0, 0)), "path": None} for number in range(count)]
    picture = datasets.List(datasets.Image()) if listed else datasets.Image()
    columns = {
        "problem": [f"<image>\nWhat is {number}?" for number in range(count)],
        "solution": [f"${number}$" for number in range(count)],
        "original_answer": [str(number) for number in range(count)],
        "images": [[one] for one in pictures] if listed else pictures,
        "data_source": ["chart"] * count,
        "doc_id": [100 + number for number in range(count)],
        "info": [{"id": "a", "tgt_width": 20, "tgt_height": 15, "use_tool": True}] * count,
    }
    kinds = {name: Value("string") for name in ("problem", "solution", "original_answer", "data_source")}
    info = {
        "id": Value("string"),
        "tgt_width": Value("int64"),
        "tgt_height": Value("int64"),
        "use_tool": Value("bool"),
    }
    features = Features({**kinds, "images": picture, "doc_id": Value("int64"), "info": info})
    return Dataset.from_dict({name: columns[name] for name in features}, features=features, split=split)


def check_visionthink(loaded: Dataset, count: int = 3) -> None:
    assert set(loaded.column_names) == {"id", "image", "question", "answer", "data_source", "solution"}
    assert loaded.features["image"] == datasets.Image(decode=False)
    assert loaded["id"][:] == [str(100 + number) for number in range(count)]
    assert loaded["solution"][:] == [f"${number}$" for number in range(count)]
    assert loaded["data_source"][0] == "chart"
    assert [red(one) for one in loaded] == [10 + number for number in range(count)]
    last = episode_row(loaded[count - 1])
    assert (last["question"], last["answer"]) == (f"What is {count - 1}?", [str(count - 1)])
    assert check_rows(loaded) == []


@pytest.mark.parametrize("listed", [False, True])
def test_published_structure_from_save_to_disk(tmp_path, listed):
    visionthink(listed=listed).save_to_disk(tmp_path / "vt")
    check_visionthink(load_rows(tmp_path / "vt"))
    check_visionthink(load_rows(tmp_path / "vt", limit=2), 2)


def test_splits_of_a_saved_dictionary(tmp_path, caplog):
    DatasetDict(train=visionthink(3), val=visionthink(2)).save_to_disk(tmp_path / "vt")
    with caplog.at_level(logging.INFO):
        assert len(load_rows(tmp_path / "vt")) == 3
    assert "split 'train' of ['train', 'val']" in caplog.text
    assert len(load_rows(str(tmp_path / "vt"), split="val")) == 2
    with pytest.raises(DataError, match="no split 'test'.*'train', 'val'"):
        load_rows(tmp_path / "vt", split="test")


def test_parquet_file_and_folder(tmp_path):
    (tmp_path / "pq" / "data").mkdir(parents=True)
    visionthink().to_parquet(tmp_path / "pq" / "data" / "train-00000-of-00001.parquet")
    check_visionthink(load_rows(tmp_path / "pq" / "data" / "train-00000-of-00001.parquet"))
    check_visionthink(load_rows(tmp_path / "pq"))


def test_jsonl_keeps_texts_and_extra_columns(folder):
    root = folder(
        row(0, answer="007", level=3, options=["a", "b"], box={"x": 1}),
        row(1, answer=["2018-01-11", "11 January"], level=4, options=[], box=None),
        row(2, answer=16, level=None, options=[], box=None),
    )
    loaded = load_rows(root)
    assert loaded["answer"][:] == [["007"], ["2018-01-11", "11 January"], ["16"]]
    assert loaded["level"][:] == [3, 4, None] and loaded["options"][0] == ["a", "b"]
    assert set(loaded.column_names) == {"id", "image", "question", "answer", "data_source", "level", "options"}
    assert [red(one) for one in loaded] == [10, 11, 12]
    assert loaded["image"][0] == str(root / "images" / "0.png") and loaded["data_source"][0] == ""
    assert load_rows(root, limit=1)["id"][:] == ["r0"]
    assert load_rows(root / "data.jsonl")["id"][:] == ["r0", "r1", "r2"]


def test_csv_json_and_metadata_files(folder):
    root = folder()
    (root / "data.jsonl").unlink()
    (root / "data.csv").write_text("image,question,answer\nimages/1.png,How much?,1.50\n")
    loaded = load_rows(root)
    assert (loaded[0]["id"], loaded[0]["answer"], red(loaded[0])) == ("0", ["1.50"], 11)
    (root / "data.csv").write_text("image,question,answer\nimages/1.png,Which, one?,1.50\n")
    with pytest.raises(DataError, match="one CSV cell per heading"):
        load_rows(root)
    (root / "data.json").write_text(json.dumps([row(2)]))
    assert load_rows(root)["id"][:] == ["r2"]
    (root / "data.json").unlink(), (root / "data.csv").unlink()
    folder({"file_name": "images/2.png", "problem": "?", "answer": "b"}, name="metadata.jsonl")
    assert red(load_rows(root)[0]) == 12


def test_split_files_of_a_folder(folder):
    root = folder(row(0))
    folder(row(1), name="val.jsonl")
    assert load_rows(root, split="val")["id"][:] == ["r1"]
    assert load_rows(root, split="train")["id"][:] == ["r0"]
    with pytest.raises(DataError, match="split 'test'"):
        load_rows(root, split="test")


def test_images_as_list_of_one_path(folder):
    rows = [{**row(number), "images": [f"images/{number}.png"]} for number in range(2)]
    for one in rows:
        del one["image"]
    rows[1]["images"] = ["images/0.png", "images/1.png"]
    loaded = load_rows(folder(*rows))
    assert red(loaded[0]) == 10
    assert [bad.number for bad in check_rows(loaded)] == [1]
    assert "2 images" in check_rows(loaded)[0].reason


def test_paths_cannot_leave_the_folder(folder, tmp_path):
    (tmp_path / "secret.png").write_bytes(png((99, 0, 0)))
    escapes = ["../secret.png", str(tmp_path / "secret.png"), "https://example.org/a.png"]
    loaded = load_rows(folder(row(0), *(row(number + 1, image=path) for number, path in enumerate(escapes))))
    bad = check_rows(loaded)
    assert [one.number for one in bad] == [1, 2, 3]
    assert "leaves" in bad[0].reason and "leaves" in bad[1].reason and "no local path" in bad[2].reason
    with pytest.raises(DataError, match="id 'r1'.*leaves"):
        episode_row(loaded[1])
    good = require_good_rows(loaded, "skip")
    assert good["id"][:] == ["r0"] and "image_error" not in good.column_names


def test_paths_inside_a_saved_set_cannot_leave_it_either(tmp_path):
    (tmp_path / "secret.png").write_bytes(png((99, 0, 0)))
    data = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}], "question": ["?"], "answer": ["a"]}
    source = Dataset.from_dict(
        data,
        features=Features(
            {
                "image": {"bytes": Value("binary"), "path": Value("string")},
                "question": Value("string"),
                "answer": Value("string"),
            }
        ),
    )
    source.save_to_disk(tmp_path / "one")
    assert "leaves" in check_rows(load_rows(tmp_path / "one"))[0].reason
    mixed = datasets.concatenate_datasets(
        [
            source,
            Dataset.from_dict(
                {"image": [{"bytes": png((5, 0, 0)), "path": None}], "question": ["?"], "answer": ["a"]},
                features=source.features,
            ),
        ]
    )
    mixed.save_to_disk(tmp_path / "mixed")
    loaded = load_rows(tmp_path / "mixed")
    assert [(one.number, "embed" in one.reason) for one in check_rows(loaded)] == [(0, True)]
    assert red(loaded[1]) == 5


def test_repeated_document_numbers_become_row_ids(tmp_path):
    doubled = datasets.concatenate_datasets([visionthink(2), visionthink(2)])
    doubled.save_to_disk(tmp_path / "vt")
    loaded = load_rows(tmp_path / "vt")
    assert loaded["id"][:] == ["100#0", "101#1", "100#2", "101#3"] and check_rows(loaded) == []


def test_errors_of_a_source_say_what_is_there(folder, tmp_path):
    with pytest.raises(DataError, match=r"\['id', 'image', 'text'\], but lacks 'question' or 'problem', 'answer'"):
        load_rows(folder({"id": "a", "image": "x", "text": "y"}))
    with pytest.raises(DataError, match="mixes types"):
        load_rows(folder(row(0, level=1), row(1, level="hard")))
    (tmp_path / "set" / "data.jsonl").write_text('{"id":\n{"id": 1}\nid')
    with pytest.raises(DataError, match=r"data\.jsonl.*2 of its 3 lines are no JSON objects"):
        load_rows(tmp_path / "set")
    with pytest.raises(DataError, match="no such file or folder"):
        load_rows(tmp_path / "nowhere")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match=r"data\.jsonl or Parquet"):
        load_rows(tmp_path / "void")
    with pytest.raises(ConfigError, match="limit=0"):
        load_rows(tmp_path / "set", limit=0)


def test_a_name_on_the_hub_is_loaded_without_remote_code(monkeypatch):
    asked = []

    def load(name, **options):
        asked.append((name, options))
        if name == "someone/gone":
            raise datasets.exceptions.DatasetNotFoundError("it is not on the Hub")
        return DatasetDict(train=visionthink(2))

    monkeypatch.setattr(datasets, "load_dataset", load)
    check_visionthink(load_rows("someone/set"), 2)
    assert asked == [("someone/set", {})]
    with pytest.raises(DataError, match="'someone/gone': it is not on the Hub"):
        load_rows("someone/gone")


def test_rows_with_several_pictures_are_for_environments_that_take_them(folder):
    several = {**row(1), "images": ["images/0.png", "images/2.png"], "question": "Is <image> darker than <image>?"}
    single = {**row(0), "images": "images/0.png"}
    del several["image"], single["image"]
    loaded = load_rows(folder(single, several))
    (bad,) = check_rows(loaded)
    assert bad.number == 1 and "2 images and needs exactly one" in bad.reason
    assert check_rows(loaded, most_pictures=2) == []
    decoded = episode_row(loaded[1], 2)
    assert [image.getpixel((0, 0))[0] for image in decoded["images"]] == [10, 12]
    assert decoded["image"] is decoded["images"][0] and decoded["question"] == "Is image 1 darker than image 2?"
    assert "images" not in episode_row(loaded[0], 2) and red(loaded[0]) == 10
    with pytest.raises(DataError, match="needs exactly one"):
        episode_row(loaded[1])
    with pytest.raises(DataError, match="3 images, and the environment takes up to 2"):
        episode_row({**loaded[1], "images": ["a", "b", "c"]}, 2)


@pytest.mark.parametrize("kind", ["parquet", "save_to_disk", "beside image"])
def test_embedded_lists_of_several_pictures_are_read(tmp_path, kind):
    """Rows of one, two and three pictures; the last lacks the bytes of one, and names a file in their place."""
    pictures = [{"bytes": png((10 + number, 0, 0)), "path": None} for number in range(3)]
    lost = None if kind == "save_to_disk" else {"bytes": None, "path": "/etc/passwd"}  # saving would embed it
    lists = [pictures[:1], pictures[1:], pictures, [pictures[0], lost]]
    rows = {"images": lists, "question": ["<image> or <image2>?"] * 4, "answer": ["a"] * 4, "id": list("abcd")}
    texts = {name: Value("string") for name in ("question", "answer", "id")}
    if kind == "beside image":  # as data preparation writes it: no list where there is one picture
        rows |= {"images": [None, *lists[1:]], "image": [one[0] for one in lists]}
        texts |= {"image": datasets.Image()}
    dataset = Dataset.from_dict(
        rows, features=Features({**texts, "images": datasets.List(datasets.Image(decode=False))})
    )
    if kind == "save_to_disk":
        dataset.save_to_disk(tmp_path / "rows")
    else:
        (tmp_path / "rows").mkdir()
        pq.write_table(dataset.data.table, tmp_path / "rows" / "train.parquet")
    loaded = load_rows(tmp_path / "rows")
    two, three = (episode_row(loaded[number], 3) for number in (1, 2))
    assert [image.getpixel((0, 0))[0] for image in two["images"]] == [11, 12]
    assert red(loaded[0] | {"question": "?"}) == 10
    assert [image.getpixel((0, 0))[0] for image in three["images"]] == [10, 11, 12]
    assert two["image"] is two["images"][0] and two["question"] == "image 1 or image 2?"
    assert loaded[1]["image"]["bytes"] == pictures[1]["bytes"] and loaded[0]["images"] is None
    assert [bad.number for bad in check_rows(loaded, most_pictures=3)] == [0, 3]  # two markers, one picture
    assert "does not embed" in check_rows(loaded, most_pictures=3)[1].reason
    assert "2 images and needs exactly one" in check_rows(loaded)[1].reason
