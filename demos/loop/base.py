"""The base model of the demo: a tiny Qwen2.5-VL that reads digits and answers at once, mostly wrongly.

It stands in for an instruction-tuned checkpoint. Demonstrations, by share:

- ``caption``: asked to read, it writes the digits down;
- ``direct``:  asked for the sum, it answers at once (the right answer, which it cannot learn from four digits on);
- ``asked``:   asked for the sum "step by step", it writes every step down and then answers;
- ``steps``:   asked for the sum alone, it does so, too, rarely.

Token ids come from the same encoder as rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from data_prep.describing import CAPTION
from demos.loop.task import QUESTION, make_rows, running_sums
from vt_trl.chat import ChatEncoder
from vt_trl.dialogue import Demonstration, collate
from vt_trl.envs import SingleEnv
from vt_trl.envs.base import system, user
from vt_trl.families import family_of
from vt_trl.features import ImageFeatures
from vt_trl.muon import MuonAndAdam
from vt_trl.tiny import build_tiny
from vt_trl.types import Message

DESCRIBE = "Describe the picture."  # what `vt-trl prepare distill` asks a captioner, with CAPTION
AT_ONCE = "<think>plain</think><answer>"
STEP_BY_STEP = f"{QUESTION} Step by step."
LENGTHS = {"glyph": (4,), "caption": (2, 3, 4), "direct": (2, 3, 4), "asked": (2, 3, 4), "steps": (3, 4)}


@dataclass(frozen=True)
class WarmStart:
    """Size of the model and of its training. ``rows`` is the pool of pictures, seen several times."""

    hidden_size: int = 64
    layers: int = 2
    vision_layers: int = 2
    steps: int = 350
    glyph_steps: int = 100  # before them: one digit four times, so that attention has something to find later
    batch: int = 64
    rows: int = 8000
    matrix_rate: float = 0.02  # of Muon; the rest is Adam's
    other_rate: float = 2e-3
    shares: Mapping[str, float] = field(
        default_factory=lambda: {"caption": 0.2, "direct": 0.197, "asked": 0.6, "steps": 0.003}
    )


def phrases(prompts: Mapping[str, str]) -> list[str]:
    """Fixed texts, for the tokenizer to take in as few tokens; digits and signs stay tokens of their own."""
    said = ["<think>", "</think><answer>", "</answer>", AT_ONCE, "</think>", "<answer>", "Wait, "]
    return [*prompts.values(), QUESTION, STEP_BY_STEP.removeprefix(QUESTION), CAPTION, DESCRIBE, *said]


def reply_of(kind: str, row: Mapping[str, Any]) -> str:
    if kind in ("glyph", "caption"):
        return row["digits"]
    if kind == "direct":
        return f"{AT_ONCE}{row['answer']}</answer>"
    return f"<think>{running_sums(row['digits'])}</think><answer>{row['answer']}</answer>"


def caption_messages(image: Any) -> tuple[Message, ...]:
    """What `vt-trl prepare distill` shows a captioner."""
    return system(CAPTION), user(image, DESCRIBE)


def demonstrations(
    encoder: ChatEncoder, prompts: Mapping[str, str], shares: Mapping[str, float], rows: int, seed: int
):
    """The pool of demonstrations, each kind by its share."""
    environment = SingleEnv(prompts)
    stop = encoder.tokenizer.convert_tokens_to_ids(encoder.family.turn_end)
    found = []
    for number, (kind, share) in enumerate(shares.items()):
        for row in make_rows(round(rows * share), LENGTHS[kind], seed * 10 + number, same=kind == "glyph"):
            describes = kind in ("glyph", "caption")
            row |= {"question": STEP_BY_STEP} if kind == "asked" else {}
            asked = caption_messages(row["image"]) if describes else environment.reset(row).messages
            prompt = encoder.prompt(asked)
            said = [*encoder.text_ids(reply_of(kind, row)), stop]
            mask = [0] * len(prompt.token_ids) + [1] * len(said)
            found.append(Demonstration([*prompt.token_ids, *said], mask, prompt.images))
    return found


def warm_start(
    path: Path,
    prompts: Mapping[str, str],
    settings: WarmStart | None = None,
    seed: int = 0,
    progress: Callable[[int, float], Any] = lambda step, loss: None,
) -> Path:
    """Build a tiny checkpoint, train it on demonstrations, and save it; ``progress(steps done, loss)``."""
    settings = settings or WarmStart()
    size = {name: getattr(settings, name) for name in ("hidden_size", "layers", "vision_layers")}
    build_tiny(path, seed=seed, corpus=phrases(prompts), **size)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(path)
    encoder = ChatEncoder(processor.tokenizer, family_of(model.config), ImageFeatures(processor.image_processor))
    glyphs = demonstrations(encoder, prompts, {"glyph": 1.0}, settings.rows, 500 + seed)
    _fit(model, encoder, glyphs, settings, settings.glyph_steps, seed, progress, decay=False)
    pool = demonstrations(encoder, prompts, settings.shares, settings.rows, 1000 + seed)
    _fit(model, encoder, pool, settings, settings.steps, seed, progress)
    model.save_pretrained(path)
    return path


def _fit(
    model: Any,
    encoder: ChatEncoder,
    pool: list,
    settings: WarmStart,
    steps: int,
    seed: int,
    progress: Callable,
    decay: bool = True,
) -> None:
    tokenizer = encoder.tokenizer
    image_id = tokenizer.convert_tokens_to_ids(encoder.family.image_token)
    optimizer = MuonAndAdam(model, settings.matrix_rate, settings.other_rate)
    rng = np.random.default_rng(seed)
    model.train()
    for step in range(steps):
        rate = min(1.0, (step + 1) / 20) * (min(1.0, 2 * (1 - step / steps) + 0.02) if decay else 1.0)
        chosen = [pool[number] for number in rng.integers(0, len(pool), size=settings.batch)]
        batch = collate(chosen, encoder.features, pad_id=tokenizer.pad_token_id, image_token_id=image_id)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step(rate)
        progress(step + 1, loss.item())
    model.eval()
