"""The base model of the demo: a tiny Qwen2.5-VL that reads letters and finds frames, and knows nothing of looking.

It stands in for an instruction-tuned checkpoint. Three kinds of demonstrations:

- ``read``:   the picture of one frame alone, solid or in dots, then the answer;
- ``locate``: a whole picture, the question and "Where is it?", and the frame's box, as Qwen2.5-VL grounds on request;
- ``guess``:  a whole picture in the dialogue of training, then an answer at once, right by chance only.

It is never shown a box inside its reasoning. Token ids come from the same encoder as rollouts.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from demos.searching.task import COLOURS, QUESTION, Sheet, draw_frame, frame_box
from vt_trl.chat import ChatEncoder
from vt_trl.dialogue import Demonstration, Dialogue, demonstrate, replay
from vt_trl.envs import DirectEnv, Environment
from vt_trl.families import family_of
from vt_trl.features import ImageFeatures
from vt_trl.muon import MuonAndAdam
from vt_trl.tiny import build_tiny

_FIRST = {"read": 3.0}  # shares of a batch; together with the others from the start, reading is not learned for long
_THEN = {"read": 0.25, "locate": 1.5, "guess": 0.125}
LOCATE = f"{QUESTION} Where is it?"
BEFORE, AFTER = "It is here: ", "legible"  # the reasoning of a rationale before and behind its look


@dataclass(frozen=True)
class Schooling:
    """Size of the base model and of its training. ``rows`` is the pool of pictures, seen several times."""

    hidden_size: int = 128
    layers: int = 2
    vision_layers: int = 2
    steps: int = 300
    reading: float = 0.14  # share of the steps, at first, in which it learns to read alone
    batch: int = 32  # demonstrations per step, times the share of each kind
    rows: int = 4096
    frames: tuple[int, ...] = (1, 2, 3, 4)  # in a picture
    matrix_rate: float = 0.02  # of Muon; the rest is Adam's
    other_rate: float = 2e-3


def box_reply(row: Mapping[str, Any], sheet: Sheet) -> str:
    """The frame's box in pixels of the picture as shown, at half of each side."""
    return json.dumps({"bbox_2d": [round(one) for one in frame_box(row, sheet, 0.5)]})


def guess_reply(letter: str) -> str:
    return f"<think>{AFTER}</think><answer>{letter}</answer>"


def phrases(sheet: Sheet) -> list[str]:
    """Fixed texts of an episode, for the tokenizer to take in as few tokens; letters stay tokens of their own.

    The box of a frame is one token, as models with tokens for places have it: spelled in numbers, its second number
    needs the frame found once more, and a network of two layers takes long over that. Any other box is spelled.
    """
    cells = itertools.product(range(sheet.cells), repeat=2)
    asked = [*QUESTION.split(" {colour}"), LOCATE.removeprefix(QUESTION), *[f" {one}" for one in COLOURS]]
    said = [f"<think>{AFTER}</think><answer>", f"{AFTER}</think><answer>", "</answer>", f"<think>{BEFORE}"]
    return [*asked, *said, *[box_reply({"cell": cell}, sheet) for cell in cells]]


@dataclass
class _Kind:
    """One kind of demonstration: its episode, what is said in it, and which of a row's pictures it shows."""

    environment: Environment
    question: str
    reply: Callable[[Mapping[str, Any]], str]
    picture: str  # "sheet" or "frame"


class Lessons:
    """Pixel tensors of all rows, and the loss of a random batch of one kind."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        rows: Sequence[dict[str, Any]],
        zoom: Environment,
        sheet: Sheet,
        seed: int = 0,
    ):
        self.model, self.rows, self.sheet = model, rows, sheet
        self.tokenizer = processor.tokenizer
        family = family_of(model.config)
        self.encoder = ChatEncoder(self.tokenizer, family, ImageFeatures(processor.image_processor))
        self.image_id = self.tokenizer.convert_tokens_to_ids(family.image_token)
        direct = DirectEnv("full", {"system": "", "task": "{question}"}, max_pixels=zoom.rule.max_pixels, min_pixels=1)
        self.kinds = {
            "read": _Kind(direct, QUESTION, lambda row: guess_reply(row["answer"][0]), "frame"),
            "locate": _Kind(direct, LOCATE, lambda row: box_reply(row, sheet), "sheet"),
            "guess": _Kind(zoom, QUESTION, lambda row: guess_reply(row["answer"][0]), "sheet"),
        }
        self._known: dict[tuple[Any, ...], Demonstration] = {}
        self._positions: dict[str, torch.Tensor] = {}
        self._views(processor.image_processor, seed)

    def _views(self, image_processor: Any, seed: int) -> None:
        half, rng = self.sheet.side // 2, np.random.default_rng(seed)
        sheets = [row["image"].resize((half, half), Image.Resampling.LANCZOS) for row in self.rows]
        frames = [
            draw_frame(row["answer"][0], row["colour"], bool(index % 2), rng, self.sheet)
            for index, row in enumerate(self.rows)
        ]
        self.pixels, self.grids = {}, {}
        for name, images in (("sheet", sheets), ("frame", frames)):
            inputs = image_processor(images=images, return_tensors="pt")
            self.pixels[name] = inputs["pixel_values"].view(len(images), -1, inputs["pixel_values"].shape[-1])
            self.grids[name] = inputs["image_grid_thw"][0]

    def demonstration(self, name: str, index: int) -> Demonstration:
        """Tokens of a row's demonstration; rows that say the same share it, for the picture's pixels do not matter."""
        row, kind = self.rows[index], self.kinds[name]
        reply = kind.reply(row)
        key = (name, row["colour"], reply)
        if key not in self._known:
            image = row["image"] if kind.picture == "sheet" else row["image"].crop(frame_box(row, self.sheet))
            asked = {**row, "image": image, "question": kind.question.format(colour=row["colour"])}
            if kind.environment.max_turns == 1:
                dialogue = _answered(kind.environment, asked, reply)
            else:
                dialogue = replay(kind.environment, asked, [reply])
            self._known[key] = demonstrate(dialogue, self.encoder)
        return self._known[key]

    def loss(self, name: str, chosen: torch.Tensor) -> torch.Tensor:
        """Cross entropy over the trained tokens of one kind, summed over a demonstration, averaged over ``chosen``."""
        kind, told = self.kinds[name], [self.demonstration(name, int(index)) for index in chosen]
        ids = torch.tensor([one.token_ids for one in told])
        keep = torch.tensor(told[0].loss_mask).nonzero()[:, 0] - 1
        visual = (ids == self.image_id).int()
        grid = self.grids[kind.picture]
        if name not in self._positions:
            self._positions[name] = self.model.model.get_rope_index(
                ids[:1], mm_token_type_ids=visual[:1], image_grid_thw=grid[None]
            )[0]
        logits = self.model(
            input_ids=ids,
            pixel_values=self.pixels[kind.picture][chosen].flatten(0, 1),
            image_grid_thw=grid.repeat(len(chosen), 1),
            mm_token_type_ids=visual,
            position_ids=self._positions[name].expand(-1, len(chosen), -1),
            use_cache=False,
            logits_to_keep=keep,
        ).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, keep + 1].flatten(), reduction="sum") / len(chosen)


def _answered(environment: Environment, row: dict[str, Any], reply: str) -> Dialogue:
    """A one-turn dialogue; what is said there need not have the layout of training."""
    dialogue = Dialogue(environment, row)
    dialogue.say(reply)
    return dialogue


def school(
    path: Path,
    rows: Sequence[dict[str, Any]],
    zoom: Environment,
    settings: Schooling | None = None,
    seed: int = 0,
    progress: Callable[[int, dict[str, float]], Any] = lambda step, losses: None,
    sheet: Sheet | None = None,
) -> Path:
    """Build a tiny checkpoint, train it on demonstrations made from ``rows`` (decoded), and save it at ``path``.

    Rows with fewer frames come first, and the pool that is drawn from grows.
    """
    settings, sheet = settings or Schooling(), sheet or Sheet()
    sizes = {name: getattr(settings, name) for name in ("hidden_size", "layers", "vision_layers")}
    build_tiny(path, seed=seed, corpus=phrases(sheet), **sizes)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    lessons = Lessons(model, AutoProcessor.from_pretrained(path), rows, zoom, sheet, seed)
    optimizer = MuonAndAdam(model, settings.matrix_rate, settings.other_rate)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(settings.steps):
        done = step / settings.steps
        rate = min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(0.8 * math.pi * done))
        eased = 1.3 * (done - settings.reading) / (1 - settings.reading)  # pictures with few frames come first
        losses = {}
        for name, share in (_FIRST if done < settings.reading else _THEN).items():
            pool = len(rows) if name == "read" else math.ceil(len(rows) * min(1.0, max(0.25, eased)))
            chosen = torch.randint(pool, (round(settings.batch * share),), generator=generator)
            loss = lessons.loss(name, chosen)
            loss.backward()
            losses[name] = loss.item()
        optimizer.step(rate)
        progress(step + 1, losses)
    model.eval()
    model.save_pretrained(path)
    return path
