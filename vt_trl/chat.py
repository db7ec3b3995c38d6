"""Messages to token ids, exactly once: text that looks like a control token stays text.

A dialogue is rendered as an alternation of control tokens, written as ids, and runs of plain text, encoded with the
tokenizer's special tokens switched off. So ``<|image_pad|>`` in a question is a handful of ordinary tokens and can
neither count as an image nor end a turn. For clean text the ids equal those of the model's own chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vt_trl.families import Family
from vt_trl.features import ImageFeatures
from vt_trl.types import INSERTED, ImagePart, Message, TextPart


@dataclass(frozen=True)
class Encoded:
    """Token ids (L,) with visual placeholders expanded, and the images in the order of their runs."""

    token_ids: list[int]
    images: list[Image.Image]
    visual_tokens: int


class ChatEncoder:
    """Encodes prompts and environment replies for one tokenizer and family."""

    def __init__(self, tokenizer: Any, family: Family, features: ImageFeatures):
        self.tokenizer = tokenizer
        self.family = family
        self.features = features
        self._control = family.control_ids(tokenizer)
        self._control_values = frozenset(self._control.values())

    def prompt(self, messages: Sequence[Message]) -> Encoded:
        """The opening of a dialogue up to the first assistant turn, with the family's default system message."""
        default = self.family.default_system
        if default is not None and messages[0].role != "system":
            messages = [Message("system", (TextPart(default),)), *messages]
        return self._encode(messages, opening="")

    def reply(self, messages: Sequence[Message]) -> Encoded:
        """What stands between a sampled stop token and the next assistant turn.

        An :data:`~vt_trl.types.INSERTED` message stands inside the assistant's turn: its parts and nothing around.
        """
        if messages[0].role == INSERTED:
            ids, images, visual, text = self._parts([part for one in messages for part in one.parts], "")
            return Encoded(ids + self.text_ids(text), images, visual)
        return self._encode(messages, opening="\n")

    def decode(self, token_ids: Sequence[int], stop_ids: set[int]) -> str:
        """Text of a sampled turn without its stop token; control tokens inside would stay visible."""
        ids = list(token_ids)
        if ids and ids[-1] in stop_ids:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def text_ids(self, text: str) -> list[int]:
        """Plain text (an assistant turn of a demonstration, say) as ids, none of which is a control token."""
        if not text:
            return []
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not self._control_values.isdisjoint(ids):
            # A tokenizer that ignores split_special_tokens would let a data set inject control tokens.
            raise ValueError(
                f"The tokenizer {type(self.tokenizer).__name__} turned plain text into a control token; "
                f"use a fast tokenizer, whose special tokens can be switched off."
            )
        return ids

    def _encode(self, messages: Sequence[Message], opening: str) -> Encoded:
        family, ids, images, visual = self.family, [], [], 0
        text = opening  # text since the last control token; encoded in one piece, as the chat template would
        for message in messages:
            ids += self.text_ids(text) + [self._control[family.turn_start]]
            found, shown, count, text = self._parts(message.parts, f"{message.role}\n")
            ids += found + self.text_ids(text) + [self._control[family.turn_end]]
            images += shown
            visual += count
            text = "\n"
        ids += self.text_ids(text) + [self._control[family.turn_start]] + self.text_ids("assistant\n")
        return Encoded(ids, images, visual)

    def _parts(
        self, parts: Sequence[TextPart | ImagePart], text: str
    ) -> tuple[list[int], list[Image.Image], int, str]:
        """Ids, pictures, visual tokens of parts after ``text``, and the text after the last picture, not yet ids."""
        family, ids, images, visual = self.family, [], [], 0
        for part in parts:
            if isinstance(part, ImagePart):
                count = self.features.visual_tokens(part.image)
                ids += self.text_ids(text) + [self._control[family.vision_start]]
                ids += [self._control[family.image_token]] * count + [self._control[family.vision_end]]
                images.append(part.image)
                visual += count
                text = ""
            else:
                text += part.text
        return ids, images, visual, text
