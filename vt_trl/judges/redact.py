"""Keys out of texts that may be logged: known ones, and whatever looks like one."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LOOKS_LIKE_A_KEY = re.compile(
    r"\b(?:sk|hf|pk|rk|gsk|xai)[-_][\w-]{6,}|(?<=[Bb]earer )[\w.~+/=-]{6,}|(?<=api-key: )\S+|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_LONGEST = 300


def without_keys(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without the ``secrets`` and without anything that looks like a key."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return _LOOKS_LIKE_A_KEY.sub("***", text)


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """One line of at most 300 characters without the ``secrets`` and without anything that looks like a key."""
    text = " ".join(without_keys(text, secrets).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
