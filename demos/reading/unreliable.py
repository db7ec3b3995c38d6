"""The reading task with a tool that sometimes shows nothing: the second turn's reliability as a setting.

The paper finds that penalising every request collapses to never asking. By expectation alone asking stays right
wherever it wins more than the penalty, so one suspect is a second turn that does not always pay; here its share is a
number.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from PIL import Image

from vt_trl.envs import ResizeEnv
from vt_trl.errors import ConfigError


class UnreliableEnv(ResizeEnv):
    """ResizeEnv whose tool shows an empty grey picture, not the full one, with probability 1 - ``reliability``."""

    any_pictures = False
    same_replies = False

    def __init__(self, reliability: float = 1.0, prompts: Mapping[str, str] | None = None, **resolution: int):
        if not 0 <= reliability <= 1:
            raise ConfigError(f"reliability is {reliability}; it is a probability, from 0 to 1.")
        super().__init__(prompts, **resolution)
        self.reliability = reliability
        self.blank = Image.new("RGB", (1, 1))

    def reset(self, row):
        observation = super().reset(row)
        self.blank = Image.new("RGB", self.views.full.size, (128, 128, 128))
        return observation

    def tool_image(self) -> Image.Image:
        # Python's generator is seeded by the trainer, differently on each process; every rollout draws for itself.
        return self.views.full if random.random() < self.reliability else self.blank
