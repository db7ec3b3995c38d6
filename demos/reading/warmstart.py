"""The base model of the demo: a tiny Qwen2.5-VL that reads and makes both moves, with no idea when to make which.

It stands in for an instruction-tuned checkpoint. Three kinds of demonstrations, in equal numbers, none of which knows
whether its picture is easy or hard:

- ``direct``: the full picture, then the answer;
- ``answer``: the half picture, then the answer (on a hard picture that teaches a guess);
- ``ask``:    the half picture, a call, the full picture, then the answer.

A half picture is followed by a call with probability ``ask_share``. Token ids come from the same encoder as rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from demos.reading.task import QUESTION
from vt_trl.chat import ChatEncoder
from vt_trl.dialogue import demonstrate, replay
from vt_trl.envs import DirectEnv, Environment, ResizeEnv
from vt_trl.families import family_of
from vt_trl.features import ImageFeatures
from vt_trl.tiny import build_tiny

CLEAR, BLURRED = "<think>clear</think>", "<think>blurred</think>"
CALL = '<tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'


@dataclass(frozen=True)
class WarmStart:
    """Size of the model and of its training. ``rows`` is the pool of pictures, seen several times."""

    hidden_size: int = 192
    layers: int = 2
    vision_layers: int = 2
    steps: int = 300
    batch: int = 32  # demonstrations of each kind per step
    rows: int = 8000
    learning_rate: float = 1e-3
    ask_share: float = 0.4
    kinds: tuple[str, ...] = ("direct", "answer", "ask")


def answer_reply(letter: str) -> str:
    return f"{CLEAR}<answer>{letter}</answer>"


def phrases(prompts: dict[str, str]) -> list[str]:
    """Fixed texts of an episode, for the tokenizer to take in as few tokens; letters stay tokens of their own."""
    said = [CLEAR, BLURRED, CALL, f"{CLEAR}<answer>", "</answer>", BLURRED + CALL]
    return [*prompts.values(), QUESTION, *said]


class _Demonstration:
    """One kind of episode as a fixed token layout; only the letter and the pictures change from row to row."""

    def __init__(self, environment: Environment, replies: Sequence[str], row: dict[str, Any], encoder: ChatEncoder):
        said = demonstrate(replay(environment, row, replies), encoder)
        ids, self.images = said.token_ids, said.images
        self.ids = torch.tensor(ids)
        self.keep = torch.tensor(said.loss_mask).nonzero()[:, 0] - 1  # positions whose next token is trained
        letter = encoder.text_ids(row["answer"][0])
        if len(letter) != 1 or ids.count(letter[0]) != 1:
            raise RuntimeError("The answer must be one token that occurs once in the demonstration.")
        self.slot = ids.index(letter[0])


def _positions(model: Any, ids: torch.Tensor, visual: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Rotary positions (3, 1, L) of a layout: the same for all its rows, so computed once."""
    return model.model.get_rope_index(ids[None], mm_token_type_ids=visual[None], image_grid_thw=grid)[0]


class _Batches:
    """Pixel tensors of all rows at both resolutions, and the loss of a random batch of one kind."""

    def __init__(self, model: Any, processor: Any, rows: Sequence[dict[str, Any]], kinds: dict[str, _Demonstration]):
        self.model, self.kinds = model, kinds
        tokenizer, image_processor = processor.tokenizer, processor.image_processor
        token = family_of(model.config).image_token
        self.image_id = tokenizer.convert_tokens_to_ids(token)
        self.letters = torch.tensor([tokenizer.convert_tokens_to_ids(row["answer"][0]) for row in rows])
        rule = ResizeEnv(min_pixels=1).rule
        views = [rule.views(row["image"]) for row in rows]
        self.pixels: dict[tuple[int, int], torch.Tensor] = {}
        self.grids: dict[tuple[int, int], torch.Tensor] = {}
        for images in ([view.full for view in views], [view.low for view in views]):
            inputs = image_processor(images=images, return_tensors="pt")
            size = images[0].size
            self.pixels[size] = inputs["pixel_values"].view(len(rows), -1, inputs["pixel_values"].shape[-1])
            self.grids[size] = inputs["image_grid_thw"][0]

    def loss(self, name: str, chosen: torch.Tensor) -> torch.Tensor:
        """Cross entropy over the trained tokens of one kind, summed over a demonstration, averaged over ``chosen``."""
        kind, count = self.kinds[name], len(chosen)
        ids = kind.ids.repeat(count, 1)
        ids[:, kind.slot] = self.letters[chosen]
        visual = (kind.ids == self.image_id).int()
        sizes = [image.size for image in kind.images]
        grid = torch.stack([self.grids[size] for size in sizes])
        pixels = torch.cat([self.pixels[size][chosen] for size in sizes], dim=1)
        logits = self.model(
            input_ids=ids,
            pixel_values=pixels.flatten(0, 1),
            image_grid_thw=grid.repeat(count, 1),
            mm_token_type_ids=visual.repeat(count, 1),
            position_ids=_positions(self.model, kind.ids, visual, grid).expand(-1, count, -1),
            use_cache=False,
            logits_to_keep=kind.keep,
        ).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, kind.keep + 1].flatten(), reduction="sum") / count


def warm_start(
    path: Path,
    rows: Sequence[dict[str, Any]],
    prompts: dict[str, str],
    settings: WarmStart | None = None,
    seed: int = 0,
    progress: Callable[[int, float], Any] = lambda step, loss: None,
) -> Path:
    """Build a tiny checkpoint, train it on demonstrations made from ``rows``, and save it at ``path``.

    ``rows`` are decoded rows of the reading task; ``progress(steps done, loss)`` is called after each step.
    """
    settings = settings or WarmStart()
    build_tiny(
        path,
        seed=seed,
        corpus=phrases(prompts),
        hidden_size=settings.hidden_size,
        layers=settings.layers,
        vision_layers=settings.vision_layers,
    )
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(path)
    encoder = ChatEncoder(processor.tokenizer, family_of(model.config), ImageFeatures(processor.image_processor))
    pixels = rows[0]["image"].width * rows[0]["image"].height
    answer = answer_reply(rows[0]["answer"][0])
    resize, full = ResizeEnv(prompts, min_pixels=pixels), DirectEnv("full", prompts, min_pixels=pixels)
    kinds = {
        "direct": _Demonstration(full, [answer], rows[0], encoder),
        "answer": _Demonstration(resize, [answer], rows[0], encoder),
        "ask": _Demonstration(resize, [BLURRED + CALL, answer], rows[0], encoder),
    }
    batches = _Batches(model, processor, rows, {name: kinds[name] for name in settings.kinds})
    _fit(model, batches, settings, seed, progress)
    model.save_pretrained(path)
    return path


def _fit(model: Any, batches: _Batches, settings: WarmStart, seed: int, progress: Callable[[int, float], Any]) -> None:
    shares = {"direct": 1.0, "answer": 2 * (1 - settings.ask_share), "ask": 2 * settings.ask_share}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(settings.steps):
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        total = 0.0
        for name in settings.kinds:
            share = shares[name]
            chosen = torch.randint(len(batches.letters), (round(settings.batch * share),), generator=generator)
            loss = batches.loss(name, chosen) * share
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1, total)
    model.eval()
