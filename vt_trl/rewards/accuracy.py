"""Rule-based accuracy: is the text inside the answer tags one of the accepted answers?

Only the answer is compared, never the reasoning around it. In order: equal after normalisation; equal as numbers
(thousands separators, percent, currency); the same choice letter; equal as mathematics (math-verify).
"""

from __future__ import annotations

import math
import re
import unicodedata
from functools import lru_cache
from typing import Any

from vt_trl.envs.reply import parse_reply
from vt_trl.types import Rollout

_NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?(e[-+]?\d{1,3})?")
_CHOICE = re.compile(r"\(?([a-z])[).:]?(\s.*)?", re.DOTALL)
_MATH_HINT = re.compile(r"[\\^_=+*/{}]|\bpi\b|\bsqrt\b")
_MAX_MATH_CHARS = 200  # longer texts are prose, and a computer-algebra system is no place for them


def accuracy_reward(
    completions: list[list[dict[str, Any]]],
    answer: list[str | list[str]],
    rollout: list[Rollout] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 or 0.0 per completion; an episode without an answer scores 0.0 and has its own status in the logs.

    ``answer``: one or several accepted answers per row.
    """
    given = [one.answer for one in rollout] if rollout is not None else [_final_answer(c) for c in completions]
    golds = [[gold] if isinstance(gold, str) else list(gold) for gold in answer]
    return [
        float(text is not None and any(answers_match(text, gold) for gold in accepted))
        for text, accepted in zip(given, golds, strict=True)
    ]


def _final_answer(messages: list[dict[str, Any]]) -> str | None:
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    return parse_reply(str(replies[-1])).answer if replies else None


@lru_cache(maxsize=65536)
def answers_match(given: str, gold: str) -> bool:
    """Whether two short answers mean the same by rule. Symmetric up to a choice letter's text; never raises."""
    given, gold = unboxed(given), unboxed(gold)
    if normalise(given) == normalise(gold):
        return True
    numbers = as_number(given), as_number(gold)
    if None not in numbers:
        return math.isclose(*numbers, rel_tol=1e-6, abs_tol=1e-9)
    if len(gold.strip()) == 1 and gold.strip().isalpha():
        choice = _CHOICE.fullmatch(given.strip().casefold())
        # "A" followed by a word is an article, not a choice: only "A)", "(A)", "A." and "A: ..." name one.
        marked = choice is not None and (choice[2] is None or given.strip()[1:2] in ").:" or given.strip()[0] == "(")
        return bool(marked and choice[1] == gold.strip().casefold())
    return _equal_as_mathematics(given, gold)


def unboxed(text: str) -> str:
    r"""The content of the last ``\boxed{…}`` with balanced braces, or the text itself."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return text
    depth, begin = 0, start + len("\\boxed")
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[begin + 1 : index]
    return text


def normalise(text: str) -> str:
    """Case, width, surrounding punctuation, a leading article and runs of space do not matter."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    text = text.strip(" .,;:!?\"'`$")
    return re.sub(r"^(the|a|an) ", "", text)


def as_number(text: str) -> float | None:
    """The text as one finite number: ``1,234.5``, ``12%`` (12), ``$3``, ``-4e2``. None if it is not just a number."""
    text = unicodedata.normalize("NFKC", text).casefold().strip().strip("$€£¥").rstrip("%").strip().rstrip(".")
    if not any(character.isdigit() for character in text) or not _NUMBER.fullmatch(text):
        return None
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _equal_as_mathematics(given: str, gold: str) -> bool:
    if max(len(given), len(gold)) > _MAX_MATH_CHARS or not (_MATH_HINT.search(gold) and given.strip()):
        return False
    from math_verify import parse, verify  # slow to import, and needed only for mathematics

    try:
        # Timeouts of math-verify use signals, which only work in the main thread; the length limit stands in for them.
        parsed = [parse(f"${text.strip().strip('$')}$", parsing_timeout=None) for text in (gold, given)]
        return bool(parsed[0] and parsed[1]) and bool(verify(*parsed, timeout_seconds=None))
    except Exception:  # math-verify lets SymPy errors of any kind through; an unreadable formula is not equal
        return False
