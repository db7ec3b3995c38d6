"""The search demo at a size that teaches nothing, and the pieces whose meaning can be checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.progress import Progress

from demos.searching import __main__ as demo
from demos.searching import cells, stages, table
from demos.searching.base import LOCATE, box_reply, phrases
from demos.searching.blind import UNSEEN, TextBoxEnv
from demos.searching.task import COLOURS, QUESTION, Sheet, draw, frame_box, make_rows
from vt_trl.data import episode_row
from vt_trl.envs import make_environment
from vt_trl.tiny import phrase_tokenizer
from vt_trl.types import Done, Observation
from vt_trl.yaml_file import read_yaml

ROOT = Path(__file__).resolve().parents[1]
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


def test_the_box_of_a_frame_is_a_token_and_other_boxes_can_be_written():
    tokenizer = phrase_tokenizer(phrases(SHEET))
    lengths = {len(tokenizer(box_reply(row, SHEET))["input_ids"]) for row in make_rows(40)}
    assert lengths == {1}
    half = '{"bbox_2d": [14, 0, 42, 28]}'
    assert tokenizer.decode(tokenizer(half)["input_ids"]) == half
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


def test_every_stage_runs_and_the_command_goes_on_from_there(tmp_path, monkeypatch):
    """One seed at a size that teaches nothing, in this process; then the command finds all of it made."""
    monkeypatch.setattr(stages, "TRAIN_ROWS", 16)
    monkeypatch.setattr(cells, "single_thread", lambda: None)
    made = stages.World(tmp_path / "seed0", tmp_path / "base", seed=0, eval_count=4)
    with Progress(disable=True) as bar:
        stages.make_base(made.base, bar, steps=1, rows=64)
    for cell in cells.CELLS:
        cells.run_cell(made, cell, 1, 1)
    assert "data:image/png" in (tmp_path / "seed0/report.html").read_text(encoding="utf-8")
    models = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    command = [sys.executable, "-m", "demos.searching", "--seeds", "0", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "missed seed 0: GRPO adds 20 points to the warm start" in run.stdout, run.stderr
    assert len(models) == 6 and models == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    report = json.loads((tmp_path / "zoom.json").read_text(encoding="utf-8"))
    promised = {"accuracy_before", "accuracy_after", "crop_hits", "accuracy_without_crops", "accuracy_without_sft"}
    assert all(0 <= report["seeds"][0][name] <= 1 for name in promised)
    assert {"machine", "versions", "date", "wall_seconds"} <= set(report)


REPORT = {
    "seeds": [{"seed": 3, **dict.fromkeys(table._COLUMNS, 0.25), "cells": {"crops": {"grpo_steps": 9}}}],
    "sizes": {"eval_rows": 7},
    "versions": {"torch": "1", "transformers": "2", "trl": "3"},
    "wall_seconds": 600.0,
    "machine": "a laptop",
    "date": "today",
}


def test_table_has_a_line_per_seed_and_says_where_it_comes_from():
    lines = table.table(REPORT).splitlines()
    assert lines[2] == "| 3 | 0.25 | 0.25 | 0.25 | 0.25 | 0.25 |" and len({line.count("|") for line in lines[:3]}) == 1
    assert "7 held-out pictures" in lines[-1] and "9 GRPO steps" in lines[-1] and "10 minutes; a laptop" in lines[-1]


def test_the_pages_table_is_the_committed_one():
    path = ROOT / "docs" / "environments.md"
    text = path.read_text(encoding="utf-8")
    assert text == table.with_table(text, table.load_report()), (
        "run `python -m demos.searching.table --write docs/environments.md`"
    )


def test_the_committed_run_met_its_targets():
    """Recomputed from the figures, which are those of the recipes as they stand."""
    report = table.load_report()
    assert [one["seed"] for one in report["seeds"]] == [0, 1, 2] and report["wall_seconds"] <= 30 * 60
    for one in report["seeds"]:
        assert all(demo.targets(one).values()) and demo.targets(one) == one["targets_met"]
        assert one["cells"]["crops"]["grpo_steps"] == read_yaml(stages.GRPO)["max_steps"]
