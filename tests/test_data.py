"""Every bad row is named, with all its reasons, before a run starts; good ones become what an episode needs."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset
from helpers import png, row
from PIL import Image

from vt_trl.data import BadRow, check_rows, clean_question, episode_row, load_rows, require_good_rows
from vt_trl.errors import ConfigError, DataError
from vt_trl.images import ResolutionRule

REAL = Path(__file__).resolve().parents[2] / "shared" / "realdata"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("<image>\nWhat?", "What?"),
        ("What?\n<image1>", "What?"),
        ("The diagram <image 1> shows a 3.", "The diagram shows a 3."),
        ("First.\n<image>\nThen?", "First.\nThen?"),
        ("Look:<image>here", "Look:here"),
        ("<image>", ""),
        ("  kept  as <it> is <|im_end|>\n", "  kept  as <it> is <|im_end|>\n"),
        ("<images> <Image>", "<images> <Image>"),
    ],
)
def test_clean_question(text, clean):
    assert clean_question(text) == clean


def test_two_markers_or_no_text_are_refused():
    with pytest.raises(DataError, match="2 image markers .<image1>, <image2>."):
        clean_question("Which of <image1> and <image2>?")
    with pytest.raises(DataError, match="NoneType"):
        clean_question(None)


def test_episode_row_takes_every_kind_of_picture():
    picture = Image.new("RGB", (4, 4), (7, 0, 0))
    for column in (
        {"image": picture},
        {"images": [picture]},
        {"image": png((7, 0, 0))},
        {"images": {"bytes": png((7, 0, 0))}},
    ):
        made = episode_row({"question": "<image> a?", "answer": "b", "level": 3, **column})
        assert made["image"].getpixel((0, 0)) == (7, 0, 0)
        assert {name: made[name] for name in made if name != "image"} == {
            "question": "a?",
            "answer": ["b"],
            "level": 3,
        }
    with pytest.raises(DataError, match="^id 'x': cannot read the image: it is missing"):
        episode_row({"id": "x", "question": "a?", "answer": "b"})


def broken_rows(folder) -> Dataset:
    root = folder(
        row(0),
        row(1, image="images/cut.png"),
        row(2, question="<image>"),
        row(0, answer=""),
        row(4, question="<image1> or <image2>?", image="images/none.png", answer={"a": 1}),
        row(5, image="images/1.png", answer=["fine", "see <|im_end|>"]),
        row(6, image="images/1.png", answer="see <|im_end|>"),
        row(7, image="images/1.png", question=7),
    )
    (root / "images" / "cut.png").write_bytes(png((1, 2, 3), (400, 300))[:200])
    return load_rows(root)


def test_all_bad_rows_are_collected_with_all_reasons(folder):
    bad = {one.number: one for one in check_rows(broken_rows(folder), forbidden=("<|im_end|>",))}
    assert list(bad) == [1, 2, 3, 4, 6, 7]
    assert bad[1].id == "r1" and bad[1].reason.startswith("cannot read the image")
    assert bad[2].reason == "the question is empty or no text"
    assert "the answer is empty" in bad[3].reason and "its id is that of another row: row 0" in bad[3].reason
    assert [word in bad[4].reason for word in ("No such file", "2 image markers", "the answer is empty")] == [True] * 3
    assert "'<|im_end|>'" in bad[6].reason
    assert bad[7].reason == "the question is empty or no text"


def test_without_decoding_only_presence_is_checked(folder):
    bad = check_rows(broken_rows(folder), decode_images=False)
    assert [one.number for one in bad] == [2, 3, 4, 7]


def test_check_rows_takes_raw_data_sets_and_never_raises():
    data = {"image": [{"bytes": b"no picture"}, {"bytes": png((1, 1, 1))}], "question": ["?"] * 2, "answer": ["a"] * 2}
    raw = Dataset.from_dict(data).cast_column("image", datasets.Image())
    assert [(one.number, one.id) for one in check_rows(raw)] == [(0, "")]
    assert len(check_rows(Dataset.from_dict({"text": ["a"]}))) == 1


def test_rule_reports_pictures_it_cannot_show(folder):
    root = folder(row(0), row(1, image="images/long.png"))
    (root / "images" / "long.png").write_bytes(png((0, 0, 0), (402, 2)))
    assert check_rows(load_rows(root)) == []
    assert [one.reason for one in check_rows(load_rows(root), rule=ResolutionRule())][0].count("201.0") == 1


def test_require_good_rows(folder, caplog):
    loaded = broken_rows(folder)
    with pytest.raises(DataError, match=r"(?s)5 of 8 rows are bad.*row 1 \(id 'r1'\): cannot read.*on_bad_row='skip'"):
        require_good_rows(loaded)
    good = require_good_rows(loaded, "skip", forbidden=("<|im_end|>",))
    assert good["id"][:] == ["r0", "r5"]
    assert "6 of 8 rows are bad" in caplog.text and "'the question is empty or no text': 2" in caplog.text
    with pytest.raises(ConfigError, match="on_bad_row='drop'"):
        require_good_rows(loaded, "drop")
    with pytest.raises(DataError, match="No row is left"):
        require_good_rows(loaded.select([1, 2]), "skip")
    clean = loaded.select([0])
    assert require_good_rows(clean)["id"][:] == ["r0"]


def test_an_error_lists_ten_rows_at_most():
    bad = Dataset.from_dict({"id": [str(n) for n in range(15)], "question": ["?"] * 14 + ["x"], "answer": ["a"] * 15})
    with pytest.raises(DataError) as caught:
        require_good_rows(bad)
    assert str(caught.value).count("  row ") == 10 and "row 9 (id '9')" in str(caught.value)
    assert str(BadRow(3, "", "dark")) == "row 3: dark"


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared real data is not here")
def test_real_receipts():
    loaded = require_good_rows(load_rows(REAL / "sroie_receipts"), rule=ResolutionRule())
    first = episode_row(loaded[0])
    assert len(loaded) == 72 and first["answer"] == ["SYARIKAT PERNIAGAAN GIN KEE"] and first["field"] == "company"
    assert first["image"].size == (940, 2077)
    assert np.asarray(first["image"]).std() > 10  # a receipt, not a grey sheet
    assert loaded["answer"][1] == ["11/01/2018"]


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared real data is not here")
def test_real_mathematics():
    loaded = load_rows(REAL / "mathv_test")
    bad = check_rows(loaded)
    assert len(loaded) == 100 and len(bad) == 10
    assert all("2 image markers (<image1>, <image2>)" in one.reason for one in bad)
    good = require_good_rows(loaded, "skip")
    made = [episode_row(one) for one in good]
    assert len(made) == 90 and not any("<image" in one["question"] for one in made)
    assert all(one["image"].size == (one["width"], one["height"]) for one in made)
