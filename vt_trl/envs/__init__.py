"""Environments: what a policy sees and may do. ``make_environment`` turns a recipe's line into a factory."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

from vt_trl.boxes import Sight
from vt_trl.envs.base import Environment
from vt_trl.envs.look import LookEnv, ZoomEnv
from vt_trl.envs.resize import DirectEnv, ResizeEnv, SingleEnv
from vt_trl.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

ENVIRONMENTS: dict[str, type[Environment]] = {
    "resize": ResizeEnv,
    "direct": DirectEnv,
    "single": SingleEnv,
    "zoom": ZoomEnv,
    "look": LookEnv,
}

__all__ = [
    "ENVIRONMENTS",
    "DirectEnv",
    "Environment",
    "LookEnv",
    "ResizeEnv",
    "SingleEnv",
    "ZoomEnv",
    "import_object",
    "make_environment",
]


def import_object(path: str, what: str) -> Any:
    """The object at ``module:name`` of the user's own recipe. Raises ConfigError that says what is missing."""
    module_name, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two: no or a relative module
        raise ConfigError(
            f"{what} is {path!r}, but {error}. Write it as `module:Name`, with the module importable from where "
            f"you start the run."
        ) from error


def make_environment(
    name: str, settings: Mapping[str, Any] | None = None, sight: Sight | None = None
) -> Callable[[], Environment]:
    """A factory for the environment called ``name``, built once here so that wrong settings fail at start.

    ``sight``: how the model sees pictures, for environments that have to know (``Environment.sighted``).
    """
    if ":" in name:
        cls = import_object(name, "environment")
    elif name in ENVIRONMENTS:
        cls = ENVIRONMENTS[name]
    else:
        hint = did_you_mean(name, ENVIRONMENTS)
        raise ConfigError(
            f"environment is {name!r}, which is unknown.{hint} Use one of {', '.join(ENVIRONMENTS)}, "
            f"or `module:Class`."
        )
    if not (inspect.isclass(cls) and issubclass(cls, Environment)):
        raise ConfigError(f"environment {name!r} is not a subclass of vt_trl.envs.Environment.")
    wanted = (settings or {}).get("boxes")
    if sight is not None and cls.sighted and wanted not in (None, sight.boxes):
        logger.warning(
            f"boxes is {wanted}, and the model's family writes {sight.boxes}: it has to learn another frame. Leave "
            f"boxes out to have the family's."
        )
    settings = dict(settings or {}) | ({"sight": sight} if sight is not None and cls.sighted else {})
    try:
        cls(**settings)
    except TypeError as error:
        raise ConfigError(f"environment_args do not fit {cls.__name__}: {error}.") from error
    return lambda: cls(**settings)
