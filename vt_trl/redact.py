"""Keys out of texts that may be logged: known ones, and whatever looks like one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

_LOOKS_LIKE_A_KEY = re.compile(
    r"\b(?:sk|hf|pk|rk|gsk|xai)[-_][\w-]{6,}|(?<=[Bb]earer )[\w.~+/=-]{6,}|(?<=api-key: )\S+|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_SECRET_NAME = re.compile(r"(?:^|_)(?:token|secret|password|passwd|credentials?|key)$", re.IGNORECASE)
_NO_SECRETS = {"eos_token", "pad_token"}
_LONGEST = 300


def names_secret(name: str) -> bool:
    """Whether a setting or a variable of this name holds a key, a token or a password."""
    return bool(_SECRET_NAME.search(name)) and name not in _NO_SECRETS


def environment_secrets() -> list[str]:
    """What the environment of this process calls a key, longest first."""
    found = {value for name, value in os.environ.items() if names_secret(name)}
    return sorted((text for text in found if len(text) >= 6), key=len, reverse=True)


def without_keys(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without the ``secrets`` and without anything that looks like a key."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return _LOOKS_LIKE_A_KEY.sub("***", text)


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """One line of at most 300 characters without the ``secrets`` and without anything that looks like a key."""
    text = " ".join(without_keys(text, secrets).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
