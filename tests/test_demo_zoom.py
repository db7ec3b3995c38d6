"""The search demo at a size that teaches nothing, and the pieces whose meaning can be checked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.progress import Progress

from demos.searching import __main__ as demo
from demos.searching import stages
from demos.searching.base import LOCATE, phrases
from demos.searching.blind import UNSEEN, TextBoxEnv
from demos.searching.task import COLOURS, QUESTION, Sheet, draw, frame_box, make_rows
from vt_trl.data import episode_row
from vt_trl.envs import make_environment
from vt_trl.tiny import phrase_tokenizer
from vt_trl.types import Done, Observation

SHEET = Sheet()


@pytest.fixture
def world(tmp_path: Path) -> stages.World:
    return stages.World(tmp_path, tmp_path / "base", seed=0, eval_count=4)


def pixels(image: Image.Image, box: list[float] | None = None, side: int = 0) -> np.ndarray:
    image = image if box is None else image.crop(tuple(int(one) for one in box))
    image = image.resize((side, side), Image.Resampling.LANCZOS) if side else image
    return np.asarray(image.convert("L"), dtype=float)


def mean_gap(side: int, box: list[float] | None) -> float:
    """How far the mean pictures of two letters are apart, in grey levels: 0 when the letter leaves no trace."""
    places = dict(zip(COLOURS, [(0, 0), (2, 0), (0, 2), (2, 2)], strict=True))
    rng = np.random.default_rng(5)
    means = []
    for letter in "AH":
        images = [draw(places, dict.fromkeys(COLOURS, letter), rng, SHEET)[0] for _ in range(150)]
        means.append(np.mean([pixels(image, box, side) for image in images], axis=0))
    return float(np.abs(means[0] - means[1]).max())


def test_letters_are_legible_in_a_crop_alone():
    assert mean_gap(0, [0, 0, SHEET.cell, SHEET.cell]) > 20
    assert mean_gap(SHEET.side // 2, None) < 6  # as shown; grain averaged over 150 pictures
    assert mean_gap(SHEET.cell, [0, 0, 2 * SHEET.cell, 2 * SHEET.cell]) < 6  # a crop twice as wide is as blind


def test_rows_are_good_balanced_and_the_same_again():
    rows, again = make_rows(72, 3), make_rows(72, 3)
    assert [row["answer"] for row in rows] == [row["answer"] for row in again]
    for name in ("data_source", "answer"):
        counts = {value: sum(row[name] == value for row in rows) for value in {row[name] for row in rows}}
        assert max(counts.values()) - min(counts.values()) <= 1 and len(counts) > 3
    for row in rows:
        x1, y1, x2, y2 = frame_box(row, SHEET)
        ink = row["region"]
        assert x1 < ink[0] < ink[2] < x2 and y1 < ink[1] < ink[3] < y2
        corner = np.asarray(row["image"])[int(y1) + 2, int(x1) + 2].astype(float)
        assert np.abs(corner - COLOURS[row["colour"]]).max() < 50  # the frame is where the row says


def test_a_box_is_a_few_tokens_and_half_frames_can_be_written():
    tokenizer = phrase_tokenizer(phrases(SHEET))
    lengths = {len(tokenizer(f'{{"bbox_2d": [{x}, 0, {x + 28}, 42]}}')["input_ids"]) for x in (0, 14, 28, 42, 56)}
    assert lengths == {5}
    where, which = (tokenizer(text.format(colour="red"))["input_ids"] for text in (LOCATE, QUESTION))
    assert len(which) == 3 and where[:3] == which  # one token for a colour, whatever is asked about it


def test_rationales_are_clean_episodes_whose_crop_holds_the_letter(world):
    from datasets import load_from_disk

    from vt_trl.sft import played

    for row in load_from_disk(stages.save_rationales(world)).select(range(6)):
        dialogue = played(row, lambda: make_environment("zoom", world.environment_args)())
        crop = dialogue.images[1]
        assert crop.size == (56, 56)
        assert stages._holds(dialogue.regions[0].box, row["region"])
        original = pixels(row["image"], row["crops"])
        assert np.abs(pixels(crop) - original).max() <= 1  # at the original's own scale


def test_boxes_that_show_nothing_still_count_as_looks(world):
    row = episode_row(make_rows(1)[0] | {"answer": ["A"]})
    player = TextBoxEnv(**world.environment_args)
    player.reset(row)
    look = player.step('<think>It is here: {"bbox_2d": [0, 0, 28, 28]}')
    assert isinstance(look, Observation) and look.granted and not look.messages[0].images
    assert UNSEEN in look.messages[0].text and len(look.regions) == 1
    end = player.step("legible</think><answer>A</answer>")
    assert isinstance(end, Done) and end.answer == "A" and not end.faults


def test_every_stage_runs_and_is_not_run_again(tmp_path, monkeypatch):
    """One seed at a size that teaches nothing; the report has every promised key and admits what was missed."""
    steps = ["--base-steps", "1", "--sft-steps", "1", "--grpo-steps", "1", "--eval-rows", "4"]
    monkeypatch.setattr(stages, "TRAIN_ROWS", 16)
    monkeypatch.setattr(stages, "RATIONALES", 16)
    monkeypatch.setattr(demo, "single_thread", lambda: None)
    options = demo.parse_args([*steps, "--seeds", "0", "--out", str(tmp_path)])
    with Progress(disable=True) as bar:
        demo.run_base(options, bar)
    results = {(0, cell): demo.run_cell(options, 0, cell) for cell in demo.CELLS}
    report = demo.report_of(options, results)
    (figures,) = report["seeds"]
    promised = {"accuracy_before", "accuracy_after", "crop_hits", "accuracy_without_crops", "accuracy_without_sft"}
    assert all(0 <= figures[name] <= 1 for name in promised)
    assert not figures["targets_met"]["GRPO adds 20 points to the warm start"]
    assert {"machine", "versions", "date"} <= set(report)
    assert "data:image/png" in (tmp_path / "seed0/report.html").read_text(encoding="utf-8")
    monkeypatch.setattr(demo, "_train_cell", lambda *arguments: pytest.fail("it was finished"))
    assert demo.run_cell(options, 0, "crops") == json.loads(json.dumps(results[0, "crops"]))
