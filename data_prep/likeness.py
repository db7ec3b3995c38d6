"""Which rows say the same twice: the same picture, and questions that differ in spelling or filler words only."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vt_trl.errors import ConfigError

_ALIKE = 88.0  # of 100, per word: "colour" and "color", not "million" and "billion"
_FILLER = {
    "a",
    "an",
    "the",
    "this",
    "that",
    "of",
    "is",
    "are",
    "was",
    "were",
    "do",
    "does",
    "please",
    "image",
    "picture",
}


def words_of(question: str) -> tuple[str, ...]:
    """The words of a question that carry it, in order: a small word such as "not" does, "the" does not."""
    words = re.findall(r"\d[\d.,]*\d|\w+", question.casefold())
    return tuple(word for word in words if word not in _FILLER) or tuple(words)


def alike(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two questions are the same, word for word in order, up to spelling. Numbers must be equal.

    Word by word, because questions about charts differ in one word ("highest", "lowest") or one digit, and a likeness
    of whole texts (MinHash, edit distance) calls those near.
    """
    from rapidfuzz import fuzz

    return len(one) == len(other) and all(
        a == b or (a.isalpha() and b.isalpha() and fuzz.ratio(a, b) >= _ALIKE) for a, b in zip(one, other, strict=True)
    )


def duplicates(
    pixels: np.ndarray, question: Callable[[int], str], answers: Callable[[int], Sequence[str]], alive: np.ndarray
) -> dict[int, str]:
    """Rows to drop, with the reason; the first of each kind stays.

    ``pixels``: hash of each row's picture (R,); ``alive``: which rows (R,) to look at; texts by row number.
    """
    try:
        import rapidfuzz  # noqa: F401
    except ImportError as error:
        raise ConfigError("Finding duplicates needs the package rapidfuzz: pip install 'vt-trl[prepare]'.") from error
    groups: dict[int, list[int]] = defaultdict(list)
    values, counts = np.unique(pixels[alive], return_counts=True)
    shared = alive & np.isin(pixels, values[counts > 1])
    for number in np.flatnonzero(shared).tolist():
        groups[int(pixels[number])].append(number)
    dropped = {}
    for numbers in groups.values():
        kept: dict[int, list[tuple[tuple[str, ...], int]]] = defaultdict(list)  # by number of words
        for number in numbers:
            words = words_of(question(number))
            first = next((place for other, place in kept[len(words)] if alike(words, other)), None)
            if first is None:
                kept[len(words)].append((words, number))
            else:
                agree = {one.casefold() for one in answers(number)} & {one.casefold() for one in answers(first)}
                dropped[number] = "duplicate" if agree else "same question, another answer"
                dropped[number] += f": row {first}"
    return dropped


def cap_for_share(counts: Mapping[str, int], share: float) -> int:
    """The largest number of rows per source with which no source is more than ``share`` of what is kept."""
    if not 0 < share <= 1 or share * len(counts) < 1:
        least = f"1/{len(counts)}" if counts else "0"
        raise ConfigError(f"--max-share {share} cannot be kept with {len(counts)} sources; {least} to 1 can.")
    low, high = 0, max(counts.values(), default=0)
    while low < high:
        cap = (low + high + 1) // 2
        kept = [min(count, cap) for count in counts.values()]
        low, high = (cap, high) if max(kept) <= share * sum(kept) else (low, cap - 1)
    return low


def over_cap(sources: Sequence[str], order: np.ndarray, alive: np.ndarray, cap: int) -> list[int]:
    """Rows beyond ``cap`` per source; of each source the rows with the smallest ``order`` (R,) stay."""
    seen: Counter[str] = Counter()
    dropped = []
    for number in np.argsort(order, kind="stable").tolist():
        if alive[number]:
            seen[sources[number]] += 1
            if seen[sources[number]] > cap:
                dropped.append(number)
    return sorted(dropped)
