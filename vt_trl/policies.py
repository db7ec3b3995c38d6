"""Who decides how closely to look: the model itself (``two-turn``), or a fixed rule that it is measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vt_trl.boxes import Sight
from vt_trl.envs import DirectEnv, Environment, LookEnv, ResizeEnv, SingleEnv, ZoomEnv, make_environment
from vt_trl.envs.controls import AlwaysAskEnv, ShareEnv
from vt_trl.errors import ConfigError, did_you_mean
from vt_trl.prompts import DIRECT_PROMPTS, Prompts


@dataclass(frozen=True)
class Policy:
    """A named way to play. ``kind``: whose prompts it reads (resize, direct, single, zoom, look, or own)."""

    name: str
    kind: str
    make: Callable[..., Environment]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def has_tool(self) -> bool:
        return self.kind not in ("direct", "single")

    def environment(
        self, args: Mapping[str, Any] | None = None, sight: Sight | None = None
    ) -> Callable[[], Environment]:
        """A factory of its environments, built once here so that wrong settings fail now. Raises ConfigError.

        ``sight``: how the model sees pictures, for environments that have to know.
        """
        settings = {**(args or {}), **self.settings}
        if self.kind in ("own", "zoom", "look"):
            return make_environment(self.name, settings, sight)
        try:
            self.make(**settings)
        except TypeError as error:
            raise ConfigError(f"environment_args do not fit the policy {self.name!r}: {error}.") from error
        return lambda: self.make(**settings)


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("two-turn", "resize", ResizeEnv),
        Policy("always-full", "direct", DirectEnv, {"resolution": "full"}),
        Policy("always-low", "direct", DirectEnv, {"resolution": "low"}),
        Policy("single", "single", SingleEnv),
        Policy("always-ask", "resize", AlwaysAskEnv),
        Policy("zoom", "zoom", ZoomEnv),
        Policy("look", "look", LookEnv),
    )
}


def parse_policy(text: str, seed: int = 0) -> Policy:
    """The policy called ``text``: one of POLICIES, ``share=0.3``, or ``module:Class`` of an environment.

    ``seed`` draws the rows of a share. Raises ConfigError for any other text.
    """
    if text in POLICIES:
        return POLICIES[text]
    if text.startswith("share="):
        try:
            share = float(text.removeprefix("share="))
        except ValueError as error:
            raise ConfigError(f"policy is {text!r}, which holds no number; write it like share=0.3.") from error
        policy = Policy(f"share={share:g}", "direct", ShareEnv, {"share": share, "seed": seed})
        policy.environment()
        return policy
    if ":" in text:
        return Policy(text, "own", Environment)
    hint = did_you_mean(text, POLICIES)
    raise ConfigError(
        f"policy is {text!r}, which is unknown.{hint} Use {', '.join(POLICIES)}, share=0.3, or `module:Class`."
    )


def trained_policy(facts: Mapping[str, Any]) -> Policy:
    """The policy a checkpoint was trained with, by the environment in its notes; ``two-turn`` where nothing is said.

    Raises ConfigError for an environment of the user's own, which only the user can name.
    """
    kind = facts.get("kind", "resize")
    if kind == "own":
        raise ConfigError(
            f"The model was trained with the environment {facts.get('name')}, which is not part of vt_trl; name it: "
            f"policy `module:{facts.get('name')}`."
        )
    if kind in POLICIES:
        return POLICIES[kind]
    return POLICIES["two-turn" if kind == "resize" else f"always-{facts.get('resolution', 'full')}"]


def trained_settings(policy: Policy, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a policy's environment as in training: the resolution rule, and texts where the kind is the same.

    A control keeps its own texts: those of a tool would have it call a tool that it does not have.
    """
    if facts.get("kind") == policy.kind and "settings" in facts:
        return dict(facts["settings"])
    if policy.kind not in ("resize", "direct", "single") or "rule" not in facts:
        return {}
    settings = dict(facts["rule"])
    if facts.get("kind") == policy.kind:
        usual = vars(Prompts() if policy.kind == "resize" else DIRECT_PROMPTS)
        own = {name: text for name, text in facts.get("prompts", {}).items() if usual.get(name) != text}
        settings |= {"prompts": own} if own else {}
    return settings
