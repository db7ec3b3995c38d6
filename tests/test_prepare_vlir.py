"""VLIR's layout as traces: every box mapped to the original, every bad record set aside with its reason."""

from __future__ import annotations

import json

import pytest
from helpers import png

from data_prep import vlir
from data_prep.importing import QUARANTINE
from vt_trl.data import load_rows
from vt_trl.envs import make_environment
from vt_trl.errors import DataError
from vt_trl.sft import played

TEXTS = ['<think>Where? {"bbox_2d": [28, 28, 84, 56]}', "Closer.", "It is 7.</think><answer> 7 </answer>"]
GOOD = {
    "image_path": "a.png",
    "question": "What does the sign say?",
    "response_list": TEXTS,
    "img_crop_list": [[28, 28, 84, 56], [0, 0, 112, 112]],
}
BAD = {
    "a box is missing": ({"img_crop_list": [[28, 28, 84, 56]]}, "3 texts and 1 boxes"),
    "no box": ({"response_list": TEXTS[2:], "img_crop_list": []}, "teaches no look"),
    "reversed": ({"img_crop_list": [[84, 28, 28, 56], [0, 0, 112, 112]]}, "box_reversed (box 1)"),
    "outside": ({"img_crop_list": [[28, 28, 84, 56], [0, 0, 112, 162]]}, "box_outside (box 2)"),
    "texts as boxes": ({"img_crop_list": ["crop_1.png", "crop_2.png"]}, "box_no_numbers (box 1)"),
    "empty text": ({"response_list": [TEXTS[0], ' {"bbox_2d": [1, 2, 3, 4]} ', TEXTS[2]]}, "no reasoning"),
    "no answer": ({"response_list": [*TEXTS[:2], "It is 7."]}, "the answer is empty"),
    "no picture": ({"image_path": "b.png"}, "cannot read the image"),
    "out of the folder": ({"image_path": "../a.png"}, "cannot read the image"),
}


@pytest.fixture
def source(tmp_path):
    """Writes records next to a picture of 224 x 112 pixels, which Qwen2.5-VL is shown as it is."""
    root = tmp_path / "vlir"
    root.mkdir()
    (root / "a.png").write_bytes(png("red", (224, 112)))

    def write(*records, **options):
        (root / "data.jsonl").write_text("\n".join(json.dumps(one) for one in records), encoding="utf-8")
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        vlir.run(vlir.parser().parse_args([str(root), "--out", str(tmp_path / "out"), *flags]))
        return tmp_path / "out"

    return write


def test_a_record_becomes_a_trace_that_every_frame_and_shape_can_be_taught(source, capsys):
    (row,) = load_rows(source(GOOD))
    assert row["segments"] == ["Where?", "Closer.", "It is 7."]
    assert row["crops"] == [28, 28, 84, 56, 0, 0, 112, 112]
    assert (row["question"], row["answer"]) == ("What does the sign say?", ["7"])
    assert "1 good + 0 quarantined = 1 rows" in capsys.readouterr().out
    for shape in ("tool_call", "inline"):
        for boxes in ("shown_pixels", "per_mille", "unit"):
            dialogue = played(row, make_environment("zoom", {"shape": shape, "boxes": boxes}))
            assert [one.box for one in dialogue.regions] == [(28, 28, 84, 56), (0, 0, 112, 112)]


@pytest.mark.parametrize(
    ("options", "boxes", "crop"),
    [
        ({"boxes": "original_pixels"}, [10, 20, 30, 40], [10, 20, 30, 40]),
        ({"boxes": "per_mille"}, [250, 500, 750, 1000], [56, 56, 168, 112]),
        ({"boxes": "unit"}, [0.25, 0.5, 0.75, 1], [56, 56, 168, 112]),
        # Shown at half of each side, because of the bound on its area.
        ({"max-pixels": 112 * 56}, [14, 14, 42, 28], [28, 28, 84, 56]),
        ({}, {"bbox_2d": [28, 28, 84, 56]}, [28, 28, 84, 56]),
        ({}, '{"bbox_2d": [28, 28, 84, 56]}', [28, 28, 84, 56]),
    ],
)
def test_boxes_are_mapped_from_the_frame_they_were_written_in(source, options, boxes, crop):
    record = {**GOOD, "response_list": TEXTS[1:], "img_crop_list": [boxes]}
    (row,) = load_rows(source(record, **options))
    assert row["crops"] == pytest.approx(crop)


def test_lists_may_be_json_and_an_answer_column_wins(source):
    record = {**GOOD, "answer": "seven", "response_list": json.dumps(TEXTS)}
    record["img_crop_list"] = json.dumps(GOOD["img_crop_list"])
    (row,) = load_rows(source(record))
    assert (row["answer"], row["segments"][2], len(row["crops"])) == (["seven"], "It is 7.", 8)


@pytest.mark.parametrize(("changes", "reason"), BAD.values(), ids=BAD)
def test_records_that_are_no_rationale_are_set_aside_with_the_reason(source, changes, reason):
    out = source(GOOD, {**GOOD, **changes})
    assert len(load_rows(out)) == 1
    (line,) = (out / QUARANTINE).read_text(encoding="utf-8").splitlines()
    assert any(reason in one for one in json.loads(line)["reasons"])


def test_a_source_of_another_layout_says_what_it_lacks(source):
    with pytest.raises(DataError, match="lacks img_crop_list, response_list"):
        source({"image_path": "a.png", "question": "?", "answer": "7"})
