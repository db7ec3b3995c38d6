"""The collapse alarm: a figure that stays outside its band for many steps is said aloud, and can be acted on.

A policy that always or never asks for the full image looks healthy by its reward alone (VisionThink, Figure 3a): the
loss falls, and what the method is for is gone. So are a policy whose entropy is spent and one that is never right.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vt_trl.errors import ConfigError

logger = logging.getLogger(__name__)

ACTIONS = ("off", "warn", "stop", "theta")
DEFAULT_BANDS: dict[str, list[float | None]] = {
    "request_rate": [0.02, 0.98],
    "accuracy": [0.02, None],
    "entropy": [0.005, None],
}
_ADVICE = {
    "request_rate": "Look at penalty, penalty_theta (larger asks more) and at how many rows need the full image.",
    "accuracy": "Look at whole episodes (log_completions: true): a wrong prompt, judge or column scores everything 0.",
    "entropy": "Look at learning_rate, beta and entropy_coef: samples of a group are nearly all the same.",
}


def check_bands(bands: Mapping[str, Any] | None) -> dict[str, tuple[float | None, float | None]]:
    """Bands by the name of a logged figure. Raises ConfigError for what is no band."""
    checked = {}
    for name, band in (DEFAULT_BANDS if bands is None else bands).items():
        numbers = isinstance(band, list | tuple) and len(band) == 2
        if (
            not numbers
            or not all(edge is None or isinstance(edge, int | float) for edge in band)
            or set(band) == {None}
        ):
            raise ConfigError(
                f"alarm_bands.{name} is {band!r}; write two numbers, or null for an open side: [0.02, 0.98]."
            )
        low, high = band
        if None not in band and low >= high:
            raise ConfigError(f"alarm_bands.{name} is {band!r}: the first number must be below the second.")
        checked[name] = (low, high)
    return checked


@dataclass
class AlarmState:
    """What a resumed run has to know: steps outside by figure, and theta where the alarm has moved it."""

    outside: dict[str, int] = field(default_factory=dict)
    theta: float | None = None


class CollapseAlarm(TrainerCallback):
    """Counts logs in a row that lie outside a band; at ``patience`` it acts, and again after as many more.

    ``action``: ``warn``; ``stop`` the run after a checkpoint; or move ``theta`` by ``theta_step``, down when the
    policy asks too often and up when it asks too rarely (only for ``request_rate``; other figures are warned of). The
    request rate is watched only where the environment has more than one turn.
    """

    def __init__(self, trainer: Any, args: Any, has_tool: bool):
        self.trainer, self.action = trainer, args.alarm_action
        self.patience, self.theta_step = args.alarm_patience, args.alarm_theta_step
        self.bands = {
            name: band for name, band in check_bands(args.alarm_bands).items() if has_tool or name != "request_rate"
        }
        self.state = AlarmState()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.state = AlarmState(**state)
        if self.state.theta is not None:
            self.trainer.args.penalty_theta = self.state.theta

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> TrainerControl:
        for name, (low, high) in self.bands.items() if self.action != "off" and logs else ():
            if name not in logs:
                continue
            value = float(logs[name])
            side = (
                "below" if low is not None and value < low else "above" if high is not None and value > high else None
            )
            self.state.outside[name] = self.state.outside.get(name, 0) + 1 if side else 0
            if side and self.state.outside[name] % self.patience == 0:
                self._act(name, value, side, low if side == "below" else high, control)
        return control

    def _act(self, name: str, value: float, side: str, edge: float, control: TrainerControl) -> None:
        count = self.state.outside[name]
        said = (
            f"{name} is {value:.3g}, {side} {edge:g} for {count} logs in a row (alarm_bands). {_ADVICE.get(name, '')}"
        )
        if self.action == "theta" and name == "request_rate":
            theta = self.trainer.args.penalty_theta
            moved = theta + (self.theta_step if side == "below" else -self.theta_step)
            self.state.theta = self.trainer.args.penalty_theta = min(1.0, max(0.0, round(moved, 6)))
            logger.warning(f"{said} penalty_theta goes from {theta:g} to {self.state.theta:g}.")
        elif self.action == "stop":
            logger.error(f"{said} The run stops with a checkpoint (alarm_action: stop).")
            control.should_save = control.should_training_stop = True
        else:
            logger.warning(said)
