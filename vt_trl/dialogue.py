"""One episode in messages alone, without tokens: for a person, for a model behind an endpoint, for demonstrations.

The bookkeeping is that of :mod:`vt_trl.rollout`, so that statuses, faults and messages are those of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vt_trl.chat import ChatEncoder
from vt_trl.envs import Environment
from vt_trl.envs.base import check_pictures, message
from vt_trl.errors import ConfigError, DataError
from vt_trl.images import png_uri
from vt_trl.types import INSERTED, Done, Message, Observation, Region, Rollout, RolloutStatus, TextPart, Turn


class Dialogue:
    """An episode under way on a decoded row (``vt_trl.data.episode_row``). Raises DataError when it cannot start."""

    def __init__(self, environment: Environment, row: dict[str, Any]):
        self.row = row
        check_pictures(environment, row)
        first = environment.reset(row)
        self.environment = environment.fork()  # as in training, so that a broken fork() shows up here
        self.messages: list[Message] = list(first.messages)
        self.prompt_messages = len(first.messages)
        self.images: list[Image.Image] = [image for one in self.messages for image in one.images]
        self.turns: list[Turn] = []
        self.asked = self.attempted = False
        self.regions: list[Region] = []
        self.parts: dict[int, Region] = {}
        self.end: Done | None = None

    def say(self, reply: str, truncated: bool = False) -> Observation | Done:
        """Hand a reply to the environment and note what came of it."""
        outcome = self.environment.step(reply, truncated=truncated)
        self.turns.append(Turn(reply, (), (), finished=not truncated, faults=outcome.faults))
        self.messages.append(message("assistant", reply))
        self.attempted = self.attempted or outcome.called
        if isinstance(outcome, Done):
            self.end = outcome
        else:
            self.asked = self.asked or outcome.granted
            self.regions += outcome.regions
            self.parts |= outcome.parts(len(self.images))
            self.messages += outcome.messages
            self.images += [image for one in outcome.messages for image in one.images]
        return outcome

    def stop(self, detail: str) -> None:
        """End an open episode for want of tokens."""
        self.end = Done(RolloutStatus.CONTEXT_LIMIT, detail=detail)

    def rollout(self) -> Rollout:
        """The finished episode, without tokens. Raises RuntimeError while it is still open."""
        if self.end is None:
            raise RuntimeError("The episode is still open; it has no rollout yet.")
        return Rollout(
            row=self.row,
            prompt_ids=[],
            completion_ids=[],
            loss_mask=[],
            logprobs=[],
            images=self.images,
            messages=self.messages,
            prompt_messages=self.prompt_messages,
            turns=self.turns,
            status=self.end.status,
            answer=self.end.answer,
            asked=self.asked,
            attempted=self.attempted,
            detail=self.end.detail,
            regions=self.regions,
            parts=self.parts,
        )


def replay(environment: Environment, row: dict[str, Any], replies: Sequence[str]) -> Dialogue:
    """The finished dialogue of ``replies``. Raises DataError unless they make one well-formed episode."""
    dialogue = Dialogue(environment, row)
    for number, reply in enumerate(replies, start=1):
        if dialogue.end is not None:
            raise DataError(f"the dialogue ends with reply {number - 1} of {len(replies)}; take the rest out")
        outcome = dialogue.say(reply)
        if outcome.faults:
            raise DataError(f"reply {number} is malformed ({', '.join(outcome.faults)}): it would be taught")
    if dialogue.end is None:
        raise DataError(f"the dialogue is still open after its {len(replies)} replies; an answer is missing")
    return dialogue


@dataclass(frozen=True)
class Demonstration:
    """A dialogue as tokens: ``token_ids`` (L,), ``loss_mask`` (L,) with 1 on what the assistant says, and pictures."""

    token_ids: list[int]
    loss_mask: list[int]
    images: list[Image.Image]

    @property
    def labels(self) -> list[int]:
        """(L,) token ids where the loss is, -100 elsewhere."""
        return [token if keep else -100 for token, keep in zip(self.token_ids, self.loss_mask, strict=True)]


def demonstrate(dialogue: Dialogue, encoder: ChatEncoder) -> Demonstration:
    """A finished dialogue as the tokens that a rollout with these replies would have, stop tokens included."""
    prompt = encoder.prompt(dialogue.messages[: dialogue.prompt_messages])
    ids, mask, images = list(prompt.token_ids), [0] * len(prompt.token_ids), list(prompt.images)
    stop = encoder.tokenizer.convert_tokens_to_ids(encoder.family.turn_end)
    told: list[Message] = []
    completion = dialogue.messages[dialogue.prompt_messages :]
    for one, following in zip(completion, [*completion[1:], None], strict=True):
        if one.role != "assistant":
            told.append(one)
            continue
        if told:
            reply, told = encoder.reply(told), []
            ids += reply.token_ids
            mask += [0] * len(reply.token_ids)
            images += reply.images
        goes_on = following is not None and following.role == INSERTED  # in the same turn, without a stop token
        said = encoder.text_ids(one.text) + ([] if goes_on else [stop])
        ids += said
        mask += [1] * len(said)
    return Demonstration(ids, mask, images)


def trl_example(dialogue: Dialogue) -> dict[str, Any]:
    """The dialogue in TRL's conversational format: ``messages`` with typed parts, and ``images`` in their order.

    What was put into the assistant's turn is part of its message there.
    """
    messages: list[dict[str, Any]] = []
    for one in dialogue.messages:
        parts: list[Mapping[str, str]] = [
            {"type": "text", "text": part.text} if hasattr(part, "text") else {"type": "image"} for part in one.parts
        ]
        inside = one.role == INSERTED or (messages and messages[-1]["role"] == one.role == "assistant")
        if inside:
            messages[-1]["content"] += parts
        else:
            messages.append({"role": one.role, "content": parts})
    return {"messages": messages, "images": list(dialogue.images)}


def refuse_inline(environment: Environment) -> None:
    """Raise ConfigError for an environment whose turns go on behind a picture: no chat endpoint can do that."""
    if environment.stop_texts:
        raise ConfigError(
            "the environment puts pictures into the assistant's own turn, which no chat endpoint can go on with; set "
            "shape: tool_call in its environment_args."
        )


def chat_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as a chat-completions endpoint takes them; see :func:`refuse_inline`."""
    found = []
    for one in messages:
        parts: list[dict[str, Any]] = [
            {"type": "text", "text": part.text}
            if isinstance(part, TextPart)
            else {"type": "image_url", "image_url": {"url": png_uri(part.image)}}
            for part in one.parts
        ]
        found.append({"role": one.role, "content": parts if one.images else one.text})
    return found


def collate(
    demonstrations: Sequence[Demonstration], features: Any, *, pad_id: int, image_token_id: int
) -> dict[str, torch.Tensor]:
    """Demonstrations as one batch: ``input_ids``, ``attention_mask``, ``labels`` (B, L), padded on the right.

    With pictures also ``mm_token_type_ids`` (B, L), ``pixel_values`` and ``image_grid_thw``. Raises DataError when a
    picture and its placeholders disagree.
    """
    longest = max(len(one.token_ids) for one in demonstrations)
    ids = torch.full((len(demonstrations), longest), pad_id)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, one in enumerate(demonstrations):
        length = len(one.token_ids)
        ids[row, :length] = torch.tensor(one.token_ids)
        labels[row, :length] = torch.tensor(one.labels)
        mask[row, :length] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    images = [image for one in demonstrations for image in one.images]
    if images:
        batch |= {"mm_token_type_ids": (ids == image_token_id).int(), **features.batch(images)}
    return batch
