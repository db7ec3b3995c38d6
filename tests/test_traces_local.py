"""Traces by a checkpoint on this machine, from the command to the rows: some are kept, the others have a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import picture
from helpers import CALL, SHORT_PROMPTS, answer, png
from parrot import make_parrot

from data_prep import traces
from data_prep.writers import Steered
from vt_trl.data import load_rows
from vt_trl.envs import ResizeEnv

SMALL = {"min_pixels": 3136, "prompts": SHORT_PROMPTS}
# What the model says to a question and the hint that goes with needs_full; it takes no hint to "Say it".
LESSONS = [("Say it", None, [answer("7")]), ("Say it", True, [answer("7")]), ("Look", True, [CALL, answer("7")])]
ROWS = [
    {"question": "Say it", "answer": "7"},
    {"question": "Say it", "answer": "8"},
    {"question": "Say it", "answer": "7", "needs_full": True},
    {"question": "Look", "answer": "7", "needs_full": True},
    {"question": "Look", "answer": "7", "image": "bad.png"},
]


@pytest.fixture
def parrot(tmp_path) -> Path:
    shown = {"id": "a", "image": picture(1, (112, 56)), "answer": ["7"]}
    lessons = [
        (Steered(ResizeEnv(**SMALL)), {**shown, "question": question, "needs_full": full}, replies)
        for question, full, replies in LESSONS
    ]
    return make_parrot(tmp_path / "parrot", lessons)


def test_what_a_local_model_writes_is_kept_or_rejected_by_reason(parrot, tmp_path):
    rows, out = tmp_path / "rows", tmp_path / "out"
    rows.mkdir()
    picture(1, (112, 56)).save(rows / "good.png")
    (rows / "bad.png").write_bytes(png((0, 0, 0))[:40])
    lines = [json.dumps({"id": f"r{number}", "image": "good.png"} | row) for number, row in enumerate(ROWS)]
    (rows / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = ["--dataset", rows, "--out", out, "--writer", "local", "--model", parrot, "--backend", "transformers"]
    words += ["--environment-args", json.dumps(SMALL), "--max-turn-tokens", 24, "--temperature", 0.01]
    traces.run(traces.parser().parse_args([*map(str, words), "--unit-rows", "4"]))

    kept = {row["id"]: (row["replies"], row["route"], row["written_by"]) for row in load_rows(out)}
    assert kept == {
        "r0": ([answer("7")], "direct", str(parrot)),
        "r3": ([CALL, answer("7")], "asked", str(parrot)),
    }
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    reasons = [(one["id"], one["attempt"], one["reason"]) for one in rejected]
    assert reasons == [
        ("r1", 0, "wrong"),
        ("r2", 0, "wrong_route"),
        ("r1", 1, "wrong"),
        ("r2", 1, "wrong_route"),
        ("r4", 0, "bad_row"),
    ]
    assert all(one["replies"] == [answer("7")] for one in rejected[:4])
