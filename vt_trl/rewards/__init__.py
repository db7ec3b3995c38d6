"""Reward functions, plain callables with TRL's signature, by name for recipes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vt_trl.envs import import_object
from vt_trl.errors import ConfigError, did_you_mean
from vt_trl.rewards.accuracy import accuracy_reward, answers_match
from vt_trl.rewards.advantages import group_advantages
from vt_trl.rewards.format import format_reward
from vt_trl.rewards.penalty import PENALTIES, group_penalty
from vt_trl.rewards.reasoned import reasoned_reward
from vt_trl.rewards.region import (
    iou_reward,
    length_reward_paper,
    length_reward_released,
    only_when_right,
    region_reward,
)

if TYPE_CHECKING:
    from vt_trl.config import VTGRPOConfig

RewardFunction = Callable[..., list[float | None]]
REWARDS: dict[str, RewardFunction] = {
    "accuracy": accuracy_reward,
    "format": format_reward,
    "region": region_reward,
    "iou": iou_reward,
    "length_paper": length_reward_paper,
    "length_released": length_reward_released,
    "reasoned": reasoned_reward,
}
PRESETS: dict[str, dict[str, float]] = {  # reward -> weight
    # VLM-R3 (arXiv 2505.16192) as published and as released
    "paper": {"accuracy": 1.0, "format": 1.0, "region": 1.0, "length_paper": 1.0},
    "released": {"accuracy": 1.0, "format": 0.5, "region": 1.0, "length_released": 1.0},
    # OpenVLThinker (arXiv 2503.17352): right 1, right without reasoning 0.5, wrong 0; the format is only logged.
    "openvlthinker": {"accuracy": 0.5, "reasoned": 0.5, "format": 0.0},
}

__all__ = [
    "PENALTIES",
    "PRESETS",
    "REWARDS",
    "accuracy_reward",
    "answers_match",
    "format_reward",
    "group_advantages",
    "group_penalty",
    "iou_reward",
    "keep_when_right",
    "length_reward_paper",
    "length_reward_released",
    "make_reward",
    "make_rewards",
    "only_when_right",
    "reasoned_reward",
    "region_reward",
]


def make_rewards(args: VTGRPOConfig) -> list[RewardFunction]:
    """The reward functions of a run, in the order of ``args.rewards``; with ``args.judge`` it decides ``accuracy``.

    Of those that only right answers earn it is the inner function: who uses them calls :func:`keep_when_right`.
    """
    made = [_judge_reward(args) if name == "accuracy" and args.judge else make_reward(name) for name in args.rewards]
    return [getattr(reward, "ungated", reward) for reward in made]


def keep_when_right(parts: torch.Tensor, rewards: Sequence[RewardFunction], correct: torch.Tensor) -> torch.Tensor:
    """Scores (N, F) with 0 where a reward is for right answers only and ``correct`` (N,) is not above 0.5."""
    gated = torch.tensor([getattr(reward, "only_when_right", False) for reward in rewards])
    return torch.where(gated & ~(correct > 0.5).unsqueeze(1), 0.0, parts)


def _judge_reward(args: VTGRPOConfig) -> RewardFunction:
    from vt_trl.judges import make_judge, make_judge_reward
    from vt_trl.judges.cache import default_folder

    return make_judge_reward(
        make_judge(args.judge, args.judge_args),
        lenient=args.judge_lenient,
        cache_dir=(args.judge_cache_dir or default_folder()) if args.judge_cache else None,
        max_failed=args.judge_max_failed,
    )


def make_reward(name: str) -> RewardFunction:
    """The reward called ``name`` in a recipe: a known one, or ``module:function``."""
    if ":" in name:
        reward: Any = import_object(name, "a reward")
        if not callable(reward):
            raise ConfigError(f"the reward {name!r} is not callable.")
        return reward
    if name not in REWARDS:
        hint = did_you_mean(name, REWARDS)
        raise ConfigError(
            f"the reward {name!r} is unknown.{hint} Use one of {', '.join(REWARDS)}, or `module:function`."
        )
    return REWARDS[name]
