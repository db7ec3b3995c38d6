"""Importers: the original layout and the usual copies of each published set become the same rows."""

import base64
import csv
import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from helpers import png, row

from data_prep import finding
from data_prep.finding import find
from data_prep.formats import FORMATS
from data_prep.importing import import_rows, kind_of
from vt_trl import cli
from vt_trl.data import check_rows, load_rows
from vt_trl.errors import ConfigError, DataError
from vt_trl.images import load_image

REAL = Path(__file__).resolve().parents[2] / "shared" / "realdata"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def images(tmp_path):
    """A function that writes pictures of red value 10, 11, ... under the names given."""

    def write(*names: str) -> Path:
        for number, name in enumerate(names):
            file = tmp_path / "source" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png((10 + number, 0, 0)))
        return tmp_path / "source"

    return write


def imported(source: Path, format: str, tmp_path: Path, out: str = "out", **options) -> list[dict]:
    options = {**dict(split=None, files=None), **options}
    found = find(str(source), options.pop("split"), options.pop("files"))
    import_rows(found, FORMATS[format], tmp_path / out, **options)
    return load_rows(tmp_path / out).to_list() if list((tmp_path / out).glob("*.parquet")) else []


def red(one: dict) -> int:
    return load_image(one["image"]).getpixel((0, 0))[0]


def aside(tmp_path: Path, out: str = "out") -> list[dict]:
    return [json.loads(line) for line in (tmp_path / out / "quarantine.jsonl").open()]


def embedded(columns: dict) -> Dataset:
    """A data set as on the Hub, with pictures of red value 10, 11, ... in ``image``."""
    count = len(next(iter(columns.values())))
    pictures = [{"bytes": png((10 + number, 0, 0)), "path": f"{number}.png"} for number in range(count)]
    return Dataset.from_dict({"image": pictures, **columns}).cast_column("image", datasets.Image(decode=False))


@pytest.mark.parametrize("stored", ["save_to_disk", "parquet"])
def test_visionthink(tmp_path, stored):
    info = {"id": "a", "tgt_width": 20, "tgt_height": 15, "use_tool": True}
    source = embedded(
        {
            "problem": [f"<image>\nWhat is {number}?" for number in range(3)],
            "solution": [f"${number}$" for number in range(3)],
            "original_answer": ["0", "1", "2"],
            "data_source": ["chart", "chart", "doc"],
            "doc_id": [7, 7, 8],
            "info": [info, {**info, "use_tool": False}, None],
        }
    ).rename_column("image", "images")
    if stored == "parquet":
        (tmp_path / "vt").mkdir()
        source.to_parquet(tmp_path / "vt" / "train-00000-of-00001.parquet")
    else:
        source.save_to_disk(tmp_path / "vt")
    rows = imported(tmp_path / "vt", "visionthink", tmp_path)
    assert [one["question"] for one in rows] == [f"What is {number}?" for number in range(3)]
    assert [one["answer"] for one in rows] == [["0"], ["1"], ["2"]] and [red(one) for one in rows] == [10, 11, 12]
    assert [one["needs_full"] for one in rows] == [True, False, None]
    assert [one["solution"] for one in rows] == ["$0$", "$1$", "$2$"]
    assert [one["data_source"] for one in rows] == ["chart", "chart", "doc"]
    ids = [one["id"] for one in rows]
    assert len(set(ids)) == 3 and [one.split("-")[0] for one in ids] == ["7", "7", "8"]
    assert check_rows(load_rows(tmp_path / "out")) == []


def test_chartqa_as_released_and_on_the_hub(tmp_path, images):
    root = images("png/a.png", "png/b.png")
    records = [{"imgname": f"{name}.png", "query": f"Value of {name}?", "label": name} for name in "ab"]
    (root / "train_human.json").write_text(json.dumps(records))
    (root / "train_augmented.json").write_text(json.dumps(records[:1]))
    with pytest.raises(DataError, match="2 tables .train_augmented.json, train_human.json.*--files"):
        find(str(root))
    rows = imported(root, "chartqa", tmp_path, files="train_human.json")
    assert [(one["question"], one["answer"], red(one)) for one in rows] == [
        ("Value of a?", ["a"], 10),
        ("Value of b?", ["b"], 11),
    ]
    embedded({"query": ["Value of a?", "Value of b?"], "label": [["a"], ["b"]]}).to_parquet(tmp_path / "hub.parquet")
    hub = imported(tmp_path / "hub.parquet", "chartqa", tmp_path, "hub")
    assert hub == rows  # ids included: they depend on content, not on where it lay
    assert {one["data_source"] for one in rows} == {"chartqa"}


def test_document_sets_keep_all_answers(tmp_path, images):
    root = images("documents/a.png", "b.jpeg")
    record = {"questionId": 337, "question": "Date?", "answers": ["1/8/93", "8 Jan 1993", "1/8/93"], "docId": 4}
    layout = {"dataset_name": "docvqa", "data": [{**record, "image": "documents/a.png"}]}
    (root / "train_v1.0.json").write_text(json.dumps(layout))
    rows = imported(root, "docvqa", tmp_path)
    assert (rows[0]["id"], rows[0]["answer"], red(rows[0])) == ("docvqa-337", ["1/8/93", "8 Jan 1993"], 10)
    (root / "infographicsvqa_images").mkdir()
    (root / "b.jpeg").rename(root / "infographicsvqa_images" / "b.jpeg")
    (root / "train_v1.0.json").write_text(json.dumps({"data": [{**record, "image_local_name": "b.jpeg"}]}))
    rows = imported(root, "infographicvqa", tmp_path, "info")
    assert (rows[0]["id"], red(rows[0])) == ("infographicvqa-337", 11)
    both = {"questionId": ["337"], "question": ["Date?"], "answers": [["1/8/93", "8 Jan 1993"]]}
    embedded(both).to_parquet(tmp_path / "x.parquet")
    assert imported(tmp_path / "x.parquet", "docvqa", tmp_path, "hub")[0]["answer"] == ["1/8/93", "8 Jan 1993"]


def test_textvqa_orders_answers_by_votes(tmp_path, images):
    root = images("train_images/ab12.jpg")
    record = {"question_id": 34602, "image_id": "ab12", "question": "Brand?"}
    record["answers"] = ["nous", "dakota", "dakota digital", "dakota", "dakota"]
    (root / "TextVQA_0.5.1_train.json").write_text(json.dumps({"dataset_type": "train", "data": [record]}))
    rows = imported(root, "textvqa", tmp_path)
    assert rows[0]["answer"] == ["dakota", "nous", "dakota digital"] and rows[0]["id"] == "textvqa-34602"
    assert red(rows[0]) == 10


def test_gqa_questions_by_id(tmp_path, images):
    root = images("images/2370799.jpg")
    question = {"imageId": "2370799", "question": "Is it overcast?", "answer": "no", "semantic": [{"a": 1}]}
    (root / "train_balanced_questions.json").write_text(json.dumps({"02930152": question, "1": question}))
    rows = imported(root, "gqa", tmp_path)
    assert [one["id"] for one in rows] == ["gqa-02930152", "gqa-1"]
    assert (rows[0]["answer"], red(rows[0])) == (["no"], 10)


def test_gqa_on_the_hub_keeps_pictures_apart(tmp_path):
    for name in ("instructions", "images"):
        (tmp_path / "gqa" / name).mkdir(parents=True)
    embedded({"id": ["238", "n16_x"]}).to_parquet(tmp_path / "gqa" / "images" / "train-0.parquet")
    asked = {"id": ["7", "8"], "imageId": ["n16_x", "238"], "question": ["Is it red?", "Who?"], "answer": ["no", "he"]}
    Dataset.from_dict(asked).to_parquet(tmp_path / "gqa" / "instructions" / "train-0.parquet")
    images = str(tmp_path / "gqa" / "images")
    rows = imported(tmp_path / "gqa" / "instructions", "gqa", tmp_path, images=images)
    assert [(one["id"], red(one)) for one in rows] == [("gqa-7", 11), ("gqa-8", 10)]
    assert not (tmp_path / "out" / ".work").exists()
    embedded({"id": ["../x"]}).to_parquet(tmp_path / "gqa" / "images" / "train-0.parquet")
    with pytest.raises(DataError, match="a plain id and a picture"):
        imported(tmp_path / "gqa" / "instructions", "gqa", tmp_path, "out2", images=images)


def test_mathvista_with_choices(tmp_path, images):
    root = images("images/1.jpg", "images/2.jpg")
    records = {
        "1": {"pid": "1", "question": "Which?", "image": "images/1.jpg", "choices": ["red", "blue"], "answer": "blue"},
        "2": {"pid": "2", "question": "How many?", "image": "images/2.jpg", "choices": None, "answer": "1.20"},
    }
    for record in records.values():
        record["metadata"] = {"source": "FigureQA"}
    (root / "testmini.json").write_text(json.dumps(records))
    rows = imported(root, "mathvista", tmp_path)
    assert rows[0]["question"] == "Which?\n(A) red\n(B) blue" and rows[0]["choices"] == ["red", "blue"]
    assert rows[1]["question"] == "How many?" and rows[1]["answer"] == ["1.20"] and rows[1]["choices"] is None
    assert [one["data_source"] for one in rows] == ["FigureQA"] * 2 and rows[1]["id"] == "mathvista-2"


def test_llava_turns_become_rows(tmp_path, images):
    root = images("coco/1.jpg")
    said = [("human", "<image>\nColour?"), ("gpt", "red"), ("human", "Shape?"), ("gpt", "round")]
    talk = [{"from": who, "value": what} for who, what in said]
    records = [
        {"id": "a", "image": "coco/1.jpg", "conversations": talk},
        {"id": "a", "image": "coco/1.jpg", "conversations": talk[2:]},
        {"id": "text", "conversations": talk[2:]},
        {"id": "mute", "image": "coco/1.jpg", "conversations": []},
    ]
    (root / "mix.json").write_text(json.dumps(records))
    rows = imported(root, "llava", tmp_path)
    assert [(one["question"], one["answer"]) for one in rows] == [
        ("Colour?", ["red"]),
        ("Shape?", ["round"]),
        ("Shape?", ["round"]),
    ]
    assert rows[1]["id"] == rows[2]["id"] != rows[0]["id"]  # the same question twice is the same row, to be found
    assert [(one["row"], one["reasons"]) for one in aside(tmp_path)] == [
        (2, ["cannot read the image: it is missing"]),
        (3, ["the question is empty or no text", "the answer is empty, or no text or list of texts"]),
    ]


def test_folder_with_csv_keeps_texts(tmp_path, images):
    root = images("images/0.png")
    with (root / "metadata.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["file_name", "question", "answer", "choices", "region", "needs_full"])
        table.writerow(["images/0.png", 'Say "two",\nplease?', "007", '["007", "7"]', "[0, 0, 10, 5]", "True"])
        table.writerow(["images/0.png", "Which interval?", "[1, 2]", "", "", ""])
    rows = imported(root, "rows", tmp_path)
    assert rows[0]["answer"] == ["007"] and rows[0]["question"].startswith('Say "two",\nplease?\n(A) 007')
    assert rows[0]["region"] == [0, 0, 10, 5] and rows[0]["needs_full"] is True
    assert {one["data_source"] for one in rows} == {"source"}  # the folder's name
    assert rows[1]["answer"] == ["[1, 2]"] and rows[1]["choices"] is None and rows[1]["needs_full"] is None


def test_bad_rows_are_set_aside_with_all_that_they_hold(tmp_path, images):
    root = images("images/0.png", "images/1.png")
    (tmp_path / "secret.png").write_bytes(png((99, 0, 0)))
    paths = [
        "images/0.png",
        "../secret.png",
        str(tmp_path / "secret.png"),
        "https://example.org/a.png",
        "images/no.png",
    ]
    lines = [row(number, image=path) for number, path in enumerate(paths)]
    lines.append(row(5, image="images/1.png", answer=" ", note="kept"))
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [one["id"] for one in imported(root, "rows", tmp_path)] == ["r0"]
    bad = aside(tmp_path)
    assert [one["row"] for one in bad] == [1, 2, 3, 4, 5]
    words = ["leaves", "leaves", "no local path", "No such file", "the answer is empty"]
    assert [word in one["reasons"][0] for word, one in zip(words, bad, strict=True)] == [True] * 5

    assert base64.b64decode(bad[4]["image"]["base64"]) == png((11, 0, 0)) and bad[4]["record"]["note"] == "kept"


@pytest.mark.parametrize("unit_rows", [2, 100])
def test_broken_lines_are_set_aside_with_their_number(tmp_path, images, unit_rows):
    """Lines from 1, rows from 0; the blank line 2 is no row."""
    root = images("images/0.png")
    good = [json.dumps(row(number, image="images/0.png")) for number in range(4)]
    lines = [good[0], "", '{"id": "cut", "question', good[1], "[1]", good[2], "\udcff", good[3]]
    (root / "data.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    assert [one["id"] for one in imported(root, "rows", tmp_path, unit_rows=unit_rows)] == ["r0", "r1", "r2", "r3"]
    bad = aside(tmp_path)
    assert [one["row"] for one in bad] == [1, 3, 5]
    assert [one["record"]["line"] for one in bad] == ['{"id": "cut", "question', "[1]", "\\xff"]
    reasons = [reason for one in bad for reason in one["reasons"]]
    assert len(reasons) == 3 and reasons[1] == "the line holds no row: line 5: it is no JSON object"
    assert reasons[0].startswith("the line holds no row: line 3: Unterminated string")
    assert cli.main(["prepare", "check", str(root), "--workers", "0", "--out", str(tmp_path / "checked")]) == 0
    assert [one["reasons"] for one in aside(tmp_path, "checked")] == [one["reasons"] for one in bad]
    loaded = load_rows(root)  # without preparation: bad rows like any others
    assert [(one.number, one.reason) for one in check_rows(loaded)] == list(zip([1, 3, 5], reasons, strict=True))


def test_unknown_columns_are_named_and_can_be_renamed(tmp_path, images):
    root = images("images/0.png")
    (root / "data.jsonl").write_text(json.dumps({"img": "images/0.png", "query": "Why?", "answer": "so", "n": 3}))
    with pytest.raises(DataError, match=r"\['answer', 'img', 'n', 'query'\], but lacks image \(one of 'image',"):
        imported(root, "rows", tmp_path)
    assert not (tmp_path / "out").exists()
    rows = imported(root, "rows", tmp_path, renamed={"image": "img", "question": "query", "id": "n"})
    assert (rows[0]["question"], rows[0]["id"]) == ("Why?", "3")
    with pytest.raises(ConfigError, match="no 'queston'. Did you mean 'question'"):
        imported(root, "rows", tmp_path, "two", renamed={"queston": "query"})
    with pytest.raises(ConfigError, match="the source has no 'qury', only"):
        imported(root, "rows", tmp_path, "two", renamed={"question": "qury"})


def test_configurations_and_splits_are_not_mixed(tmp_path):
    columns = {"questionId": ["1"], "question": ["Date?"], "answers": [["x"]]}
    for name in ("DocVQA/train-0", "DocVQA/validation-0", "InfographicVQA/train-0"):
        file = tmp_path / "hub" / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        embedded(columns).to_parquet(file)
    with pytest.raises(DataError, match="more than one split or configuration"):
        find(str(tmp_path / "hub"))
    assert [one.name for one in find(str(tmp_path / "hub" / "DocVQA")).files] == ["train-0.parquet"]
    assert [one.name for one in find(str(tmp_path / "hub" / "DocVQA"), "validation").files] == ["validation-0.parquet"]
    assert len(find(str(tmp_path / "hub"), files="*/validation*").files) == 1
    with pytest.raises(DataError, match="leaves the folder"):
        find(str(tmp_path / "hub"), files="../*")


def test_a_name_on_the_hub_is_downloaded(tmp_path, images, monkeypatch):
    root, asked = images("png/a.png"), []
    (root / "train.json").write_text(json.dumps([{"imgname": "a.png", "query": "?!", "label": "b"}]))

    def download(name, **options):
        asked.append((name, options["repo_type"], options["revision"]))
        return str(root)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert finding.find("someone/ChartQA", revision="abc").files == [root / "train.json"]
    assert asked == [("someone/ChartQA", "dataset", "abc")]
    with pytest.raises(DataError, match="no file or folder here, and no name on the Hub"):
        finding.find("./nowhere/at/all")


def test_units_do_not_change_the_rows(tmp_path, images):
    root = images("0.png")
    lines = [json.dumps(row(number, image="0.png")) for number in range(25)]
    (root / "data.jsonl").write_text("\n\n".join(lines) + "\n")
    embedded({"question": ["?!"] * 25, "answer": list(map(str, range(25)))}).to_parquet(
        tmp_path / "x.parquet", batch_size=4
    )
    for source in (root, tmp_path / "x.parquet"):
        whole = imported(source, "rows", tmp_path, f"{source.name}-whole")
        cut = imported(source, "rows", tmp_path, f"{source.name}-cut", unit_rows=7, workers=2)
        assert cut == whole and len(whole) == 25
        assert len(list((tmp_path / f"{source.name}-cut").glob("*.parquet"))) == 4


def test_command(tmp_path, images, capsys):
    root = images("images/0.png")
    (root / "data.jsonl").write_text("\n".join(json.dumps(row(n, image="images/0.png")) for n in range(2)))
    with (root / "data.jsonl").open("a") as stream:
        stream.write("\n" + json.dumps(row(2)))
    command = ["prepare", "import", str(root), "rows", "--out", str(tmp_path / "out"), "--workers", "0"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "2 good + 1 quarantined = 3 rows" in said and "1 x cannot read the image" in said
    assert cli.main([*command, "--map", "question"]) == 2
    assert "no list of OURS=THEIRS" in capsys.readouterr().err


def test_kinds_of_reasons():
    assert kind_of("the region [0.0, 1.0] is outside the picture of 40 x 30 pixels") == (
        "the region is outside the picture of pixels"
    )
    assert kind_of("the answer ('x') is not among the 3 choices") == "the answer is not among the choices"
    assert kind_of("cannot read the image: No such file: 'x'") == "cannot read the image"


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared real data is not here")
def test_real_data(tmp_path):
    receipts = imported(REAL / "sroie_receipts", "rows", tmp_path)
    assert len(receipts) == 72 and receipts[1]["answer"] == ["11/01/2018"]
    questions = imported(REAL / "mathv_test", "rows", tmp_path, "math")
    assert len(questions) + len(aside(tmp_path, "math")) == 100
    chosen = next(one for one in questions if one["id"] == "mathv-1723")
    assert chosen["answer"] == ["D"] and chosen["question"].endswith("(D) $2: 3$\n(E) $5: 4$")
