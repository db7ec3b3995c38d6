"""Tiny checkpoints that say what a test wants them to say: replies to questions, learnt by heart in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from conftest import picture
from helpers import SHORT_PROMPTS
from transformers import AutoModelForImageTextToText, AutoProcessor

from vt_trl.chat import ChatEncoder
from vt_trl.dialogue import demonstrate, replay
from vt_trl.envs import ResizeEnv
from vt_trl.families import family_of
from vt_trl.features import ImageFeatures
from vt_trl.run_notes import RunNotes, environment_facts
from vt_trl.tiny import build_tiny

STEPS, PICTURES = 200, 4
SIZE = (112, 112)  # of the pictures it is taught with: 4 visual tokens at first, 16 in full


def taught(folder: Path, episodes: Sequence[tuple[str, Sequence[str]]], enough: float = 0.05) -> Path:
    """A checkpoint, with the notes of a run, that gives these replies, turn by turn, to these questions.

    Every reply and every question is one token to it, which is learnt in no time. A question with several replies gets
    either; ``enough``, the loss at which it is taught, has to allow for that. Raises AssertionError if it was not.
    """
    corpus = [*SHORT_PROMPTS.values(), *(text for question, said in episodes for text in (question, *said))]
    build_tiny(folder, corpus=corpus, hidden_size=64)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    features = ImageFeatures(processor.image_processor)
    encoder = ChatEncoder(processor.tokenizer, family_of(model.config), features)
    environment = ResizeEnv(SHORT_PROMPTS, min_pixels=3136)
    image_id = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    shown = [
        [
            demonstrate(replay(environment, {"image": image, "question": question, "answer": [""]}, said), encoder)
            for question, said in episodes
        ]
        for image in (
            picture(number, SIZE) for number in range(PICTURES)
        )  # all with all, or it would learn by picture
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    last: list[float] = []
    for step in range(STEPS):
        losses = [_loss(model, one, features, image_id) for one in shown[step % PICTURES]]
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last = [*last, max(losses).item()][-PICTURES:]
        if len(last) == PICTURES and max(last) < enough:
            break
    else:
        raise AssertionError(f"the replies were not learnt: {last}")
    model.save_pretrained(folder)
    RunNotes(environment=environment_facts(environment, SimpleNamespace(max_turn_tokens=16))).write(folder)
    return folder


def _loss(model, said, features: ImageFeatures, image_id: int) -> torch.Tensor:
    """Cross entropy of the tokens of the replies."""
    ids = torch.tensor([said.token_ids])
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == image_id).int(),
        **features.batch(said.images),
    ).logits
    trained = torch.tensor(said.loss_mask[1:], dtype=torch.bool)
    return F.cross_entropy(logits[0, :-1][trained], ids[0, 1:][trained])
