"""A setup with other settings, and how a change is written down."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from vt_trl.preflight.setup import Setup

CONFIG = "--config_file"  # of accelerate launch
SHARING = {
    "share_images": "each picture's pixels are held once",
    "share_vision": "each picture goes through the tower once",
    "share_prefix": "no padding, and the prompt of a group is computed once",
    "loss_tokens_only": "the head sees sampled tokens only",
}


@dataclass(frozen=True)
class Change:
    """One setting and its new value. ``setting`` is a line of a recipe, or ``--config_file`` of accelerate."""

    setting: str
    value: Any
    why: str

    def __str__(self) -> str:
        if self.setting == CONFIG:
            return f"accelerate launch {CONFIG} {self.value}: {self.why}"
        return f"{self.setting}: {self.value}  ({self.why})"


def changed(setup: Setup, **values: Any) -> Setup:
    """A setup with other settings. They are set on a copy: checked once before, they stay consistent here."""
    args, run = copy.copy(setup.args), copy.copy(setup.run)
    for name, value in values.items():
        setattr(run if hasattr(run, name) and not hasattr(args, name) else args, name, value)
    return replace(setup, args=args, run=run)
