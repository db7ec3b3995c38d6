"""Rule-based accuracy: is the text inside the answer tags one of the accepted answers?

Only the answer is compared, never the reasoning around it. In order: as numbers where both are (thousands separators,
percent, currency); equal after normalisation; the same choice letter; equal as mathematics (math-verify).
"""

from __future__ import annotations

import math
import re
import threading
import unicodedata
from decimal import Decimal
from functools import lru_cache
from typing import Any

from vt_trl.envs.reply import parse_reply
from vt_trl.types import Rollout

_NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?(e[-+]?\d{1,3})?")
_SUPERSCRIPT = re.compile("[⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_EDGES = " .,;:!?\"'`$"  # what may stand around an answer
_CHOICE = re.compile(r"\(?([a-z])([).:])?(\s.*)?", re.DOTALL)
_TEXT_MACRO = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\{([^{}]*)\}")
_MATH_HINT = re.compile(r"[\\^_=+*/{}]|\bpi\b|\bsqrt\b")
_MAX_MATH_CHARS = 200  # longer texts are prose, and a computer-algebra system is no place for them
_MATH_SECONDS = 5
# What a few characters can blow up: whole numbers are powered and multiplied out inside C, where no signal gets in.
_COSTLY = re.compile(r"!|\\(sum|prod|int|lim|[dt]?binom|gamma|zeta|gcd|lcm|[bp]?mod)|exp.*exp", re.I | re.S)
_EXPONENT = re.compile(
    r"(?:\^|\*\*)\s*(?P<group>[+-]?\s*(?:\d+|[a-z]|\\(?:circ|prime)\b)|\{[^{}^]*\}|\([^()^]*\))?", re.I
)
_MAX_EXPONENT = 10**6  # product of all exponents of a text
# How a policy may write a number: "x = " and arithmetic, but no list, union or equation to hedge with.
_VALUE = re.compile(
    r"\s*([a-z]\w*\s*=)?(\\(d?frac|tfrac|sqrt|pi|cdot|times|left|right|%|,)|[\s\d+\-*/^.(){}%]|pi)+", re.I
)
_HEDGES = (r"\cup", r"\cap", r"\lor", r"\vee", r"\pm", r"\\")


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
    numbers = as_number(given), as_number(gold)
    if None not in numbers:
        return _equal_numbers(*numbers)
    if normalise(given) == normalise(gold):
        return True
    if len(gold.strip()) == 1 and gold.strip().isalpha():
        choice = _CHOICE.fullmatch(given.strip().casefold())
        # "A" followed by a word is an article, not a choice: only "A)", "(A)", "A." and "A: ..." name one.
        marked = choice is not None and (choice[2] is not None or choice[3] is None)
        return bool(marked and choice[1] == gold.strip().casefold())
    return _equal_as_mathematics(given, gold)


def unboxed(text: str) -> str:
    r"""The content of the last ``\boxed{…}`` with balanced braces and without ``\text{…}``, or the text itself."""
    content = boxed(text)
    return text if content is None else _TEXT_MACRO.sub(r"\1", content)


def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{…}`` as it is written, braces inside balanced; None where none is closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[begin + 1 : index]
    return None


def normalise(text: str) -> str:
    """Case, width, surrounding punctuation, a leading article and runs of space do not matter.

    A text of nothing but punctuation stays as it is, and so do the point of ``.5`` and the factorial of ``5!``.
    """
    text = " ".join(_compatible(text).casefold().split())
    left = text.lstrip(_EDGES)
    if left[:1].isdigit() and text[: len(text) - len(left)].endswith("."):
        left = f".{left}"
    bare = left.rstrip(_EDGES)
    if bare[-1:].isdigit() and left[len(bare) :].startswith("!"):
        bare += "!"
    return re.sub(r"^(the|a|an) ", "", bare) or text


def _compatible(text: str) -> str:
    """One form per character (NFKC), but raised digits stay exponents: 10² is 10^2 and not 102."""
    return unicodedata.normalize("NFKC", _SUPERSCRIPT.sub(lambda match: f"^{match[0]}", text))


def _equal_numbers(one: Decimal, other: Decimal) -> bool:
    """Whole numbers are equal or not, however long (a receipt's number, say); fractions up to rounding."""
    if one == one.to_integral_value() and other == other.to_integral_value():
        return one == other
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)


def as_number(text: str) -> Decimal | None:
    """The text as one finite number: ``1,234.5``, ``12%`` (12), ``$3``, ``-4e2``. None if it is not just a number."""
    text = _compatible(text).casefold().strip().strip("$€£¥").rstrip("%").strip().rstrip(".")
    if not any(character.isdigit() for character in text) or not _NUMBER.fullmatch(text):
        return None
    try:
        value = Decimal(text.replace(",", ""))
    except ArithmeticError:
        return None
    return value if math.isfinite(float(value)) else None


def _cheap(text: str) -> bool:
    """Whether a computer-algebra system surely survives the text: ``9^{9^9}`` alone would keep it busy for ever."""
    product, end = 1, -1
    for power in _EXPONENT.finditer(text):
        digits = "".join(filter(str.isdigit, power["group"] or "99999"))  # without a group: nested, or a command
        if len(digits) > 4 or not text[max(end, 0) : power.start()].strip() and end >= 0:  # long, or 9^9^9
            return False
        product, end = product * max(1, int(digits or 1)), power.end()
    return product <= _MAX_EXPONENT and not _COSTLY.search(text)


def _equal_as_mathematics(given: str, gold: str) -> bool:
    if not given.strip() or max(len(given), len(gold)) > _MAX_MATH_CHARS or not _cheap(given):
        return False
    if as_number(gold) is not None:
        comparable = _VALUE.fullmatch(given)
    else:
        comparable = _MATH_HINT.search(gold) and not any(sign in given and sign not in gold for sign in _HEDGES)
    if not comparable:
        return False
    from math_verify import parse, verify  # slow to import, and needed only for mathematics

    # Timeouts of math-verify use signals, which only work in the main thread; elsewhere the limits above stand alone.
    seconds = _MATH_SECONDS if threading.current_thread() is threading.main_thread() else None
    try:
        parsed = [parse(f"${text.strip().strip('$')}$", parsing_timeout=seconds) for text in (gold, given)]
        return bool(parsed[0] and parsed[1]) and bool(verify(*parsed, timeout_seconds=seconds))
    except Exception:  # math-verify lets SymPy errors of any kind through; an unreadable formula is not equal
        return False
