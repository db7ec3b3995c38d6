"""Reward functions, plain callables with TRL's signature, by name for recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vt_trl.envs import import_object
from vt_trl.errors import ConfigError, did_you_mean
from vt_trl.rewards.accuracy import accuracy_reward, answers_match
from vt_trl.rewards.advantages import group_advantages
from vt_trl.rewards.format import format_reward
from vt_trl.rewards.penalty import PENALTIES, group_penalty

if TYPE_CHECKING:
    from vt_trl.config import VTGRPOConfig

RewardFunction = Callable[..., list[float | None]]
REWARDS: dict[str, RewardFunction] = {"accuracy": accuracy_reward, "format": format_reward}

__all__ = [
    "PENALTIES",
    "REWARDS",
    "accuracy_reward",
    "answers_match",
    "format_reward",
    "group_advantages",
    "group_penalty",
    "make_reward",
    "make_rewards",
]


def make_rewards(args: VTGRPOConfig) -> list[RewardFunction]:
    """The reward functions of a run, in the order of ``args.rewards``; with ``args.judge`` it decides ``accuracy``."""
    return [_judge_reward(args) if name == "accuracy" and args.judge else make_reward(name) for name in args.rewards]


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
