"""Judges: is an answer right, wrong, or could nobody tell? ``make_judge`` turns a recipe's lines into one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from vt_trl.envs import import_object
from vt_trl.errors import ConfigError, did_you_mean
from vt_trl.judges.base import Case, Judge, Judgement, Verdict
from vt_trl.judges.cascade import CascadeJudge
from vt_trl.judges.local import LocalJudge
from vt_trl.judges.openai import OpenAIJudge
from vt_trl.judges.reward import JudgeReward, make_judge_reward
from vt_trl.judges.rule import RuleJudge


def _cascade(
    rule: Mapping[str, Any] | None = None, llm: str = "openai", llm_args: Mapping[str, Any] | None = None
) -> CascadeJudge:
    """``rule``: settings of the rule; ``llm`` and ``llm_args``: the judge of what it leaves open."""
    return CascadeJudge(make_judge("rule", rule), make_judge(llm, llm_args))


JUDGES: dict[str, Callable[..., Judge]] = {
    "openai": OpenAIJudge,
    "local": LocalJudge,
    "rule": RuleJudge,
    "cascade": _cascade,
}

__all__ = [
    "JUDGES",
    "CascadeJudge",
    "Case",
    "Judge",
    "JudgeReward",
    "Judgement",
    "LocalJudge",
    "OpenAIJudge",
    "RuleJudge",
    "Verdict",
    "make_judge",
    "make_judge_reward",
]


def make_judge(name: str, settings: Mapping[str, Any] | None = None) -> Judge:
    """The judge called ``name``, or ``module:Class``; neither loaded nor connected yet.

    Raises ConfigError for an unknown name, an unknown setting, a wrong value, or a key among the settings.
    """
    settings = dict(settings or {})
    if ":" in name:
        make = import_object(name, "judge")
        if not (inspect.isclass(make) and issubclass(make, Judge)):
            raise ConfigError(f"judge {name!r} is not a subclass of vt_trl.judges.Judge.")
    elif name in JUDGES:
        make = JUDGES[name]
    else:
        hint = did_you_mean(name, JUDGES)
        raise ConfigError(
            f"judge is {name!r}, which is unknown.{hint} Use one of {', '.join(JUDGES)}, or `module:Class`."
        )
    if "api_key" in settings:
        raise ConfigError("judge_args holds api_key: a recipe is saved and shared. Set OPENAI_API_KEY instead.")
    known = inspect.signature(make).parameters
    for setting in settings:
        if setting not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            hint = did_you_mean(setting, known)
            raise ConfigError(f"judge_args has {setting!r}, which the judge {name!r} does not know.{hint}")
    try:
        return make(**settings)
    except TypeError as error:
        raise ConfigError(f"judge_args do not fit the judge {name!r}: {error}.") from error
