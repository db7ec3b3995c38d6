"""A trained policy as a model of VLMEvalKit, and a launcher that makes it known there; no file of theirs is changed.

    python -m vt_trl.integrations.vlmevalkit --kit VLMEvalKit --pretrained runs/mine-export --data MMBench_DEV_EN

All options that are not the launcher's go to VLMEvalKit's ``run.py``. One question at a time, as VLMEvalKit asks.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vt_trl.commands.options import add_model_options, model_settings
from vt_trl.errors import ConfigError, DataError
from vt_trl.integrations.player import Player
from vt_trl.integrations.questions import plain_answer

logger = logging.getLogger(__name__)


def model_class(base: type) -> type:
    """The model as a subclass of VLMEvalKit's ``BaseModel``, made of a :class:`Player`."""

    class VisionThinkModel(base):
        INTERLEAVE = True

        def __init__(self, player: Player):
            super().__init__()
            self.player = player

        def use_custom_prompt(self, dataset: str) -> bool:
            return False

        def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
            """The plain answer to ``text`` and ``image`` parts; "" for a question that cannot be shown, and said."""
            tally = self.player.tally
            number = len(tally.visual_tokens) + len(tally.refused)
            row = self.player.row(chat_messages(message), f"{dataset}/{number}")
            (outcome,) = self.player.play([row])
            if isinstance(outcome, DataError):
                logger.warning("a question could not be shown; its answer is empty: %s", outcome)
                return ""
            return plain_answer(outcome)

    return VisionThinkModel


def chat_messages(message: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """VLMEvalKit's parts (``type``, ``value``, and for texts sometimes ``role``) as one chat message of the user."""
    parts = [
        {"type": "text", "text": one["value"]} if one["type"] == "text" else {"type": one["type"], "url": one["value"]}
        for one in message
    ]
    return [{"role": "user", "content": parts}]


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The launcher's options; ``rest`` holds the others, for ``run.py``."""
    parser = argparse.ArgumentParser("python -m vt_trl.integrations.vlmevalkit", allow_abbrev=False)
    parser.add_argument("--kit", required=True, help="a checkout of VLMEvalKit, installed with its requirements")
    parser.add_argument("--pretrained", required=True, help="a folder or a Hub name")
    parser.add_argument("--policy", default=None, help="two-turn, always-full, ... (default: as trained)")
    parser.add_argument("--name", default="vt_trl", help="the model's name in VLMEvalKit's results")
    parser.add_argument("--max-pictures", type=int, default=8, help="most pictures in one question")
    add_model_options(parser)
    options, options.rest = parser.parse_known_args(arguments)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Register the model under ``--name`` and run VLMEvalKit's ``run.py``. Raises ConfigError without the kit."""
    options = parse_args(arguments)
    script = Path(options.kit).expanduser().resolve() / "run.py"
    if not script.is_file():
        raise ConfigError(f"--kit is {options.kit}, which has no run.py; name a checkout of VLMEvalKit.")
    sys.path.insert(0, str(script.parent))
    config = importlib.import_module("vlmeval.config")
    player = Player(
        options.pretrained,
        options.policy,
        options.environment_args,
        max_pictures=options.max_pictures,
        **model_settings(options),
    )
    model = model_class(importlib.import_module("vlmeval.vlm.base").BaseModel)
    config.supported_VLM[options.name] = lambda **unused: model(player)
    sys.argv = [str(script), "--model", options.name, *options.rest]
    runpy.run_path(str(script), run_name="__main__")
    print(f"vt_trl: {player.tally.summary()}")
    if player.tally.refused:
        print(f"vt_trl: {player.tally.refusals()}")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
