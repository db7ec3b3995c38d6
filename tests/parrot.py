"""A tiny checkpoint that has learnt a few replies by heart, so that a whole command can be run on a real model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import picture
from helpers import CALL, SHORT_PROMPTS, answer
from transformers import AutoModelForImageTextToText, AutoProcessor

from vt_trl.chat import ChatEncoder
from vt_trl.dialogue import Demonstration, collate, demonstrate, replay
from vt_trl.envs import DirectEnv, Environment, ResizeEnv
from vt_trl.families import family_of
from vt_trl.features import ImageFeatures
from vt_trl.tiny import build_tiny

Lesson = tuple[Environment, dict[str, Any], Sequence[str]]  # where, on which row, and what to say there
_SURE = 0.95  # of every token: far from the next best


def make_parrot(folder: Path, lessons: Sequence[Lesson], steps: int = 400) -> Path:
    """Write a checkpoint that plays the lessons, and return its folder. Raises RuntimeError when it does not learn."""
    build_tiny(folder, hidden_size=64, corpus=[CALL, *(answer(digit) for digit in "78")])
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    encoder = ChatEncoder(processor.tokenizer, family_of(model.config), ImageFeatures(processor.image_processor))
    shown: list[Demonstration] = [demonstrate(replay(*lesson), encoder) for lesson in lessons]
    image_id = processor.tokenizer.convert_tokens_to_ids(encoder.family.image_token)
    batch = collate(shown, encoder.features, pad_id=processor.tokenizer.pad_token_id, image_token_id=image_id)
    targets = batch["labels"][:, 1:]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        output = model(**batch)
        chance = output.logits[:, :-1].softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        if chance[targets != -100].min() > _SURE:
            model.save_pretrained(folder)
            return folder
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise RuntimeError(f"after {steps} steps the least likely token still has {chance[targets != -100].min():.3f}")


@dataclass(frozen=True)
class Reader:
    """A checkpoint that asks for the full picture of a question to be read and answers one to be said at once.

    ``rows``: for it, with the answers that it gives; ``rows_folder``: the same as files, and a fifth
    one whose picture is broken.
    """

    path: Path
    rows: list[dict[str, Any]]
    rows_folder: Path
    environment: dict[str, Any]


def make_reader(folder: Path) -> Reader:
    """Build it: what it answers to "Read it" hangs on the picture, which it asks for first."""
    environment = {"min_pixels": 3136, "prompts": SHORT_PROMPTS}
    asked = [("Read it", 0, "7"), ("Read it", 1, "8"), ("Say it", 0, "8"), ("Say it", 1, "8")]
    rows = [
        {"id": f"row-{number}", "image": picture(seed), "question": question, "answer": [gold]}
        for number, (question, seed, gold) in enumerate(asked)
    ]
    lessons: list[Lesson] = []
    for row in rows:
        said = [answer(row["answer"][0])]
        calls = [CALL] if row["question"] == "Read it" else []
        lessons += [(ResizeEnv(**environment), row, [*calls, *said]), (DirectEnv("full", **environment), row, said)]
    rows_folder = folder / "rows"
    rows_folder.mkdir(parents=True)
    lines = []
    for row in rows:
        row["image"].save(rows_folder / f"{row['id']}.png")
        lines.append(json.dumps(row | {"image": f"{row['id']}.png"}))
    (rows_folder / "broken.png").write_bytes(b"broken")
    lines.append(json.dumps(rows[0] | {"id": "broken", "image": "broken.png"}))
    (rows_folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return Reader(make_parrot(folder / "model", lessons), rows, rows_folder, environment)
