"""A checkpoint that answers a suite's questions, and keeps count of what became of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vt_trl.commands.options import json_option
from vt_trl.errors import ConfigError, DataError, did_you_mean
from vt_trl.evaluation.rows import play
from vt_trl.inference import PolicyModel
from vt_trl.integrations.questions import Tally, question_row
from vt_trl.policies import parse_policy, trained_policy
from vt_trl.types import Rollout

SETTINGS = ("revision", "backend", "device", "dtype", "max_turn_tokens", "max_completion_length", "max_model_length")
_OWN = ("pretrained", "policy", "environment_args", "batch_size", "max_batch_size", "max_pictures", "unbox", "seed")


class Player:
    """Args as for :class:`vt_trl.integrations.lmms_model.VisionThinkModel`. Raises ConfigError like it."""

    def __init__(
        self,
        pretrained: str,
        policy: str | None = None,
        environment_args: str | Mapping[str, Any] | None = None,
        max_pictures: int = 8,
        seed: int = 0,
        **settings: Any,
    ):
        _check(pretrained, settings, max_pictures)
        texts = {name: str(settings[name]) for name in ("revision", "device") if settings.get(name) is not None}
        settings = {"backend": "auto"} | settings | texts
        self.model = PolicyModel(str(pretrained), **settings, max_images=2 * max_pictures)
        args = environment_args or {}
        args = json_option(args, "environment_args") if isinstance(args, str) else args
        chosen = parse_policy(str(policy), seed) if policy else trained_policy(self.model.notes.environment)
        environment = chosen.environment(self.model.settings_for(chosen, args), self.model.sight)
        self.any_pictures = environment().any_pictures
        self.policy, self.max_pictures, self.tally = chosen.name, max_pictures, Tally()
        self._environment = environment

    def row(self, messages: Sequence[Mapping[str, Any]], id: str) -> dict[str, Any] | DataError:
        """The row of a question, or why there is none."""
        try:
            row = question_row(messages, id, self.max_pictures)
            if len(row["images"]) != 1 and not self.any_pictures:
                reason = f"the environment takes one picture, and the question has {len(row['images'])}"
                raise DataError(reason, id=id)
        except DataError as error:
            return error
        return row

    def play(self, rows: Sequence[dict[str, Any] | DataError]) -> list[Rollout | DataError]:
        """Play rows together, greedy, and count what became of them."""
        outcomes, seconds = play(rows, self.model.runner(self._environment), self.model.sampling)
        self.tally.seconds += seconds
        for outcome in outcomes:
            self.tally.add(outcome)
        return outcomes


def _check(pretrained: Any, settings: Mapping[str, Any], max_pictures: Any) -> None:
    if not pretrained:
        raise ConfigError("pretrained is not set; name a folder or a model on the Hub: --model_args pretrained=PLACE.")
    for name in settings:
        if name not in SETTINGS:
            known = (*_OWN, *SETTINGS)
            raise ConfigError(
                f"model_args has {name!r}, which is unknown.{did_you_mean(name, known)} Use {', '.join(known)}."
            )
    if not isinstance(max_pictures, int) or max_pictures < 1:
        raise ConfigError(f"max_pictures is {max_pictures!r}; it counts pictures, so set 1 or more.")
