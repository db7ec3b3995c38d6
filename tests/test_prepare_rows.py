"""The row format: what its optional columns may hold, and what a question may not."""

import pytest
from helpers import png

from data_prep import STEPS
from vt_trl import cli
from vt_trl.rows import FEATURES, examine

GOOD = {"id": "a", "image": png((1, 2, 3), (40, 30)), "question": "How many?", "answer": ["3"], "data_source": "x"}


def reasons(**changes) -> str:
    return "; ".join(examine(GOOD | changes).reasons)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"needs_full": True, "solution": "$3$", "choices": None, "region": None},
        {"region": [0, 0, 40, 30]},
        {"region": [1.5, 2, 3, 4.25]},
        {"choices": ["3", "4"]},
        {"choices": ["Three ", "Four"], "answer": "three"},
        {"choices": ["Three", "Four"], "answer": "(B)"},
        {"choices": [], "region": []},
        {"question": "<image>\nIs it {x} or [y] in the image?"},
        {"question": "What is the text of the placeholder field?"},
    ],
)
def test_good_rows(changes):
    assert reasons(**changes) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"region": [0, 0, 41, 30]}, r"region [0, 0, 41, 30] is outside the picture of 40 x 30"),
        ({"region": [-1, 0, 4, 3]}, "outside"),
        ({"region": [4, 0, 4, 3]}, "is empty"),
        ({"region": [0, 0, 4]}, "not four numbers"),
        ({"region": [0, 0, 4, float("nan")]}, "not four numbers"),
        ({"region": "0 0 4 3"}, "not four numbers"),
        ({"choices": ["4", "5"]}, "the answer ('3') is not among the 2 choices"),
        ({"choices": ["4", "5"], "answer": "C"}, "('C') is not among"),
        ({"choices": "34"}, "no list of texts"),
        ({"choices": ["3", " "]}, "no list of texts"),
        ({"question": "<|vision_start|><|image_pad|><|vision_end|>How many?"}, "placeholder ('<|vision_start|>')"),
        ({"question": "{question} Answer briefly."}, "placeholder ('{question}')"),
        ({"question": "<image_2> How many?"}, "placeholder ('<image_2>')"),
        ({"question": "TODO"}, "placeholder ('TODO')"),
        ({"question": "N/A"}, "placeholder"),
        ({"question": "<image>"}, "question is empty"),
        ({"answer": []}, "answer is empty"),
        ({"image": b"GIF89a"}, "cannot read the image"),
    ],
)
def test_bad_rows(changes, words):
    assert words in reasons(**changes)


def test_every_reason_is_given():
    found = examine({"image": b"", "question": "", "answer": "", "choices": ["a", ""], "region": [1]}).reasons
    assert len(found) == 5
    assert examine({}).reasons[0] == "cannot read the image: it is missing"


def test_the_picture_is_decoded_once():
    assert examine(GOOD).picture.size == (40, 30)
    assert examine(GOOD | {"image": b"x"}, decode=False).reasons == []


def test_features_hold_every_column():
    assert list(FEATURES)[:5] == ["id", "image", "question", "answer", "data_source"]
    assert set(FEATURES) - set(GOOD) == {"needs_full", "choices", "region", "solution"}


def test_steps_are_found_by_name(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["prepare", "no-such-step"])
    assert end.value.code == 2 and "there is no step 'no-such-step'" in capsys.readouterr().err
    for name in STEPS:
        with pytest.raises(SystemExit) as end:
            cli.main(["prepare", name, "--help"])
        assert end.value.code == 0 and f"vt-trl prepare {name}" in capsys.readouterr().out
