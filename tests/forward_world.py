"""A tiny model in double precision and a batch of two groups with pictures in prompts and completions."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from vt_trl.forward.attention import install
from vt_trl.forward.layout import IGNORED
from vt_trl.forward.passes import Policy
from vt_trl.packing import pack
from vt_trl.types import Rollout, RolloutStatus, Turn

CPU = torch.device("cpu")


class Pixels:
    """Pictures are tuples (number, height, width) in patches; their patches are random, but always the same."""

    def __init__(self, width: int):
        self.width = width

    def preprocess(self, image: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        number, height, wide = image
        generator = torch.Generator().manual_seed(number)
        patches = torch.randn(height * wide, self.width, dtype=torch.float64, generator=generator)
        return patches, torch.tensor([1, height, wide])

    def patches(self, image: Any) -> torch.Tensor:
        return self.preprocess(image)[0]

    def grid(self, image: Any) -> torch.Tensor:
        return self.preprocess(image)[1]

    def visual_tokens(self, image: Any) -> int:
        return image[1] * image[2] // 4


class Exact(Policy):
    """A policy whose output head stays in double precision; TRL's fused one adds up in single precision."""

    def run(self, inputs: dict[str, Any]) -> Any:
        inputs = dict(inputs)
        labels = inputs.pop("shift_labels", None)
        shifted = labels is not None
        labels = labels if shifted else inputs.pop("labels")
        inputs.pop("mm", None)
        hidden = self.whole.model(**inputs, use_cache=False).last_hidden_state
        hidden, labels = (hidden, labels) if shifted else (hidden[:, :-1], labels[:, 1:])
        table = self.whole.lm_head(hidden).log_softmax(-1)
        keep = labels != IGNORED
        logprobs = table.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * keep
        return SimpleNamespace(log_probs=logprobs, entropy=-(table.exp() * table).sum(-1) * keep, aux_loss=None)


class World:
    """``model``, ``policy`` and ``batch``; ``text`` draws ids that are neither control tokens nor placeholders."""

    def __init__(self, checkpoint: Any, seed: int = 0):
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(checkpoint)
        text, vision = config.text_config, config.vision_config
        # Two heads that share their keys, so that grouped queries are tested.
        text.hidden_size = vision.hidden_size = vision.out_hidden_size = 128
        text.num_attention_heads, text.num_key_value_heads = 2, 1
        text.intermediate_size = vision.intermediate_size = 128
        vision.num_heads = 2
        self.model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").double()
        with torch.no_grad():
            for weight in self.model.parameters():
                if weight.ndim > 1:
                    weight.mul_(4)  # or attention hardly matters
        self.image_id, self.start_id, self.end_id = (
            config.image_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        )
        self.features = Pixels(vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
        self.policy = Exact(self.model, self.model, self.image_id, nullcontext)
        install("sdpa")

    def text(self, count: int) -> list[int]:
        return torch.randint(10, 200, (count,)).tolist()

    def shown(self, image: tuple[int, int, int]) -> list[int]:
        return [self.start_id, *[self.image_id] * self.features.visual_tokens(image), self.end_id]

    def rollout(self, prompt: list[int], images: list[Any], turns: list[int], told: list[list[int]]) -> Rollout:
        """``turns``: tokens of each; ``told``: what the tool says between two of them, or after the last."""
        ids, mask, made = [], [], []
        for number, count in enumerate(turns):
            turn = self.text(count)
            made.append(Turn("", tuple(turn), (0.0,) * count, True))
            ids, mask = ids + turn, mask + [1] * count
            if number < len(told):
                ids, mask = ids + told[number], mask + [0] * len(told[number])
        zeros = [0.0] * len(ids)
        return Rollout({"id": "r"}, prompt, ids, mask, zeros, images, [], 0, made, RolloutStatus.ANSWERED)

    def rollouts(self) -> list[Rollout]:
        """Two groups: direct answers, answers after a picture or two, and one that ends with what the tool said."""
        low, high, other, crop = (1, 4, 6), (2, 8, 12), (3, 6, 4), (4, 4, 4)
        first = [*self.text(3), *self.shown(low), *self.text(4)]
        second = [*self.text(5), *self.shown(other), *self.text(2)]
        tool = lambda image: [*self.text(2), *self.shown(image), *self.text(2)]  # noqa: E731
        return [
            self.rollout(first, [low], [7], []),
            self.rollout(first, [low, high], [3, 5], [tool(high)]),
            self.rollout(first, [low, high, crop], [4, 2, 3], [tool(high), tool(crop)]),
            self.rollout(second, [other], [1], []),
            self.rollout(second, [other, crop], [6], [tool(crop)]),
            self.rollout(second, [other, crop], [2, 9], [tool(crop)]),
        ]

    def pack(self, rollouts: list[Rollout], **settings: Any) -> dict[str, Any]:
        same = {"pad_id": 0, "image_token_id": self.image_id, "device": CPU}
        # Pictures are told apart by identity.
        pictures: dict[Any, Any] = {}
        for one in rollouts:
            one.images = [pictures.setdefault(image, image) for image in one.images]
        return pack(rollouts, self.features, **same | settings)
