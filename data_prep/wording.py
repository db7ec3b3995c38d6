"""Words, sentences, scripts and repetitions of a text in any language. Pure functions."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")  # Chinese and Japanese have no spaces
_END = re.compile(r"[.!?]+[\"')\]]*(?:\s+|$)|[。！？]+[\"')\]]*\s*|\n\s*")  # of a sentence or a line
_COMMAND = re.compile(r"\\[A-Za-z]+|\b[^\W\d_]\b")  # of LaTeX, and names of variables: in no language
_NEUTRAL = {"GREEK", "MATHEMATICAL", "FULLWIDTH", "MODIFIER", "MICRO", "OHM", "KELVIN", "ANGSTROM", "SCRIPT"}
_GRAM = 6
_STUCK = re.compile(r"(\w)\1{29,}")  # one letter again and again
_USUAL = 0.25  # share of a question's letters from which a script is one of its own
_DESCRIPTION = re.compile(
    r"\b(?P<the>the|this|that|my|your)\s+(?:(?:given|provided|above|text|textual|image|image's|picture|picture's)\s+){0,3}"
    r"(?:descriptions?|captions?)(?:\s+of\s+(?:the|this)\s+(?:image|picture))?"
    r"(?P<verb>\s+(?:says|states|mentions|describes|tells\s+(?:us|me)|notes|reads))?\b",
    re.I,
)


def words(text: str) -> list[str]:
    """Words, numbers and signs, without case; each Chinese or Japanese character is one."""
    return _WORD.findall(text.casefold())


def fold(text: str) -> str:
    """The text in one form per character, without case and with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def sentences(text: str) -> list[str]:
    """Sentences and lines with the space behind them; together they are the text."""
    ends = [0, *(match.end() for match in _END.finditer(text)), len(text)]
    return [text[start:end] for start, end in zip(ends, ends[1:], strict=False) if end > start]


def repeated_share(text: str) -> float:
    """Share of 6-word sequences that have stood there before; 1 for a text stuck at one letter."""
    if _STUCK.search(text):
        return 1.0
    tokens = words(text)
    grams = [tuple(tokens[at : at + _GRAM]) for at in range(len(tokens) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def foreign_share(text: str, question: str) -> float:
    """Share of letters in scripts that ``question`` is not written in; formulas and names of variables do not count.

    0 where the question has no letters of its own to compare with.
    """
    asked, given = _scripts(question), _scripts(text)
    own = {script for script, letters in asked.items() if letters >= _USUAL * asked.total()}
    if not own or not given:
        return 0.0
    return sum(letters for script, letters in given.items() if script not in own) / given.total()


def _scripts(text: str) -> Counter[str]:
    found = Counter(_script(letter) for letter in _COMMAND.sub(" ", text) if letter.isalpha())
    return Counter({script: letters for script, letters in found.items() if script not in _NEUTRAL})


@lru_cache(maxsize=8192)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split()[0]


def mentions_description(text: str) -> bool:
    """Whether a question is about a caption or a description itself."""
    return bool(re.search(r"\b(?:caption|description)", text, re.I))


def seen(text: str) -> str:
    """Reasoning about a description as about the picture itself: "the caption says" becomes "the picture shows"."""

    def instead(match: re.Match[str]) -> str:
        the = "The" if match["the"][0].isupper() else "the"
        return f"{the} picture{' shows' if match['verb'] else ''}"

    return _DESCRIPTION.sub(instead, text)
