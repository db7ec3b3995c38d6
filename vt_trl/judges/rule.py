r"""Right or wrong by rule where a rule is sure, and no verdict where none is: a cascade asks a language model then.

A rule must be right in both directions. Prose that does not match proves nothing, so it is left open; what can be read
in two ways (03/04/2021) is wrong only if every reading says so. Texts are untrusted: they are never evaluated, and
patterns are linear or see a bounded text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

from vt_trl.errors import ConfigError
from vt_trl.judges import choice, notation, quantity
from vt_trl.judges.base import Case, Judge, Judgement
from vt_trl.rewards.accuracy import answers_match, normalise, unboxed

RULE_VERSION = 1  # in the fingerprint: count it up with any change that can change a verdict
MAX_CHARS = {"prediction": 2000, "gold": 4000, "question": 20000}  # longer texts are only compared as they are

_REFUSAL = re.compile(
    r"(?:(?:i'm |i am )?(?:sorry|unfortunately),? )?(?:but )?(?:as an? [\w -]{1,30},? )?"
    r"(?:no idea|unable to|(?:there is )?(?:not enough|insufficient) information|cannot be (?:determined|seen)|"
    r"i (?:cannot|can't|can not|could not|couldn't|am unable|am not able|do not know|don't know))\b"
)
_GUESS = re.compile(
    r"\b(?:but|however|although|guess|probably|likely|may|maybe|might|perhaps|looks?|seems?|appears?)\b"
)
_NO_ANSWER = re.compile(
    r"\b(?:unknown|cannot|can't|no|not|none|nothing|nobody|unclear|insufficient|un\w+able|impossible)\b|n/a|^0$|^zero\b"
)
# Words around the answer in a sentence that adds nothing; all others must stand in the question.
_FILLER_WORDS = """
a an the is are was were it its it's this that these there here in on at of has had have he she his her their they we
can see shows show showed says say reads read displays stands stand gives given number value amount total answer equals
called named labeled labelled marked which so
"""
_FILLERS = set(_FILLER_WORDS.split())
_SPOILERS = {"not", "no", "or", "than", "but", "and", "more", "less", "least", "most", "except", "between", "never"}

_WORKING = re.compile(r"[\d .,()-]{1,60}[+*/×÷-][\d .,()+*/×÷-]{1,60}= ?(?=[^=]+$)")  # 52 + 34 = 86
_INITIALS = re.compile(r"(?<!\S)(?:[^\W\d_]\.){1,8}[^\W\d_]?(?!\S)|[^\W\d_]\.(?!\S)")
_LETTER_HYPHEN = re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})")
_SENTENCE_START = re.compile(r"[\w' -]+(?: |: ?)[\"']?")
# A plain word: the text is no formula, and a computer-algebra system would read nonsense into it.
_WORD = re.compile(r"(?<![\\\w{])(?!(?:sin|cos|tan|cot|log|exp|sqrt|frac|arc\w{3}|max|min)\b)[^\W\d_]{3,}")
_FORMULA = re.compile(r"[\\^*+=/{}()\[\]<>√|]")


class RuleJudge(Judge):
    """Judges what rules can decide and fails ("no rule fits") on the rest, such as free text that does not match.

    ``relative_tolerance``: how far a number may be off, as a share of the accepted one; ChartQA's relaxed accuracy
    takes 0.05. ``anls_threshold``: decide all that is left by text similarity, see ``anls``; DocVQA takes 0.5. The
    digits must agree all the same, because a total with one wrong digit is wrong.
    """

    name = "rule"

    def __init__(self, *, relative_tolerance: float = 0.0, anls_threshold: float | None = None) -> None:
        if not 0 <= relative_tolerance < 1:
            raise ConfigError(f"relative_tolerance is {relative_tolerance}; give a share from 0 to below 1, say 0.05")
        if anls_threshold is not None and not 0 < anls_threshold <= 1:
            raise ConfigError(f"anls_threshold is {anls_threshold}; give a similarity above 0 and up to 1, say 0.5")
        self.settings = {"relative_tolerance": relative_tolerance, "anls_threshold": anls_threshold}

    async def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        found = [decide(case.question, case.golds, case.prediction, **self.settings) for case in cases]
        return [Judgement.failed("no rule fits") if one is None else Judgement.of(one, "by rule") for one in found]

    def fingerprint(self) -> dict[str, Any]:
        return {"name": self.name, "version": RULE_VERSION, **self.settings}

    @property
    def cached(self) -> bool:
        """A rule is faster than a disk."""
        return False


def decide(
    question: str,
    golds: Iterable[str],
    prediction: str,
    *,
    relative_tolerance: float = 0.0,
    anls_threshold: float | None = None,
) -> bool | None:
    """Whether the prediction is one of the accepted answers; None if no rule can tell. Never raises for any text."""
    if not prediction.strip():
        return False
    golds = [gold for gold in golds if gold.strip()]
    if _plain(prediction) in map(_plain, golds):
        return True
    sizes = len(prediction), max(map(len, golds), default=0), len(question)
    if not golds or any(size > limit for size, limit in zip(sizes, MAX_CHARS.values(), strict=True)):
        return None
    if not unboxed(prediction).strip() or normalise(prediction) == normalise(question):
        return False
    verdicts = {_decide_one(question, gold, prediction, Fraction(str(relative_tolerance))) for gold in golds}
    if True in verdicts or verdicts == {False}:
        return True in verdicts
    if anls_threshold is None:
        return None
    alike = [gold for gold in golds if _digits(gold) == _digits(prediction)]
    return anls(prediction, alike, anls_threshold) > 0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def anls(prediction: str, golds: Iterable[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the closest accepted answer, and 0 where that is below the threshold.

    Biten et al. 2019, "Scene Text Visual Question Answering": 1 - edits / length of the longer text; case and runs of
    space do not count. A similarity of the threshold itself counts, as in the script that scores DocVQA.
    """
    best = 0.0
    given = _plain(prediction)
    for gold in map(_plain, golds):
        shorter, longer = sorted((len(given), len(gold)))
        if not longer or shorter / longer >= max(threshold, best):  # else the lengths alone rule it out
            similarity = 1 - _edits(given, gold) / max(longer, 1)
            best = max(best, similarity if similarity >= threshold else 0.0)
    return best


def _edits(one: str, other: str) -> int:
    """Levenshtein distance, a column of the table per step as bits of whole numbers (Myers 1999, Hyyrö 2003)."""
    if not one:
        return len(other)
    places: dict[str, int] = {}
    for index, character in enumerate(one):
        places[character] = places.get(character, 0) | 1 << index
    full, last = (1 << len(one)) - 1, 1 << (len(one) - 1)
    up, down, edits = full, 0, len(one)  # up, down: cells that are one more, one less than the cell above
    for character in other:
        equal = places.get(character, 0)
        vertical = equal | down
        diagonal = (((equal & up) + up) ^ up) | equal
        right, left = down | (full & ~(diagonal | up)), up & diagonal
        edits += bool(right & last) - bool(left & last)
        right, left = right << 1 | 1, left << 1
        up, down = (left | ~(vertical | right)) & full, right & vertical & full
    return edits


def _decide_one(question: str, gold: str, prediction: str, tolerance: Fraction) -> bool | None:
    wanted, given = notation.clean(gold), notation.clean(prediction)
    verdict, wanted = choice.choice(question, wanted, given)
    if verdict is not None or not wanted:
        return verdict
    ours = quantity.read(wanted)
    theirs = ours and (quantity.read(given) or quantity.read(_number_in(question, given)))
    if ours and theirs:
        return quantity.compare(question, ours, theirs, tolerance)
    verdict = choice.polar(question, wanted, given, notation.tidy(prediction))
    if verdict is not None:
        return verdict
    hedged = (" or " in given and "," not in wanted) or given.endswith(("+", "-", "*", "/", "^", "=", "<", ">"))  # 3+
    symbolic = not (re.fullmatch("[a-z]", wanted) or hedged or _WORD.search(given) or _WORD.search(wanted))
    if _spellings(wanted) & _spellings(given) or (symbolic and answers_match(given, wanted)):
        return True
    for rule in _RULES:
        verdict = rule(question, wanted, given)
        if verdict is not None:
            return verdict
    return False if _refused(wanted, given) or (ours and _several_numbers(given)) else None


def _number_in(question: str, given: str) -> str:
    """The result of a calculation, or the only number of a sentence that adds nothing to the question; else empty."""
    if working := _WORKING.match(given):
        return given[working.end() :]
    known = set(re.findall(r"[\w'-]+", question.casefold()))
    words = [word.strip('.,;:?"()') for word in given.split()]
    places = [place for place, word in enumerate(words) if any(map(str.isdigit, word))]
    places = places if len(places) == 1 else [place for place in places if words[place] not in known]
    if len(places) != 1 or len(words) > 40:
        return ""
    for end in range(min(len(words), places[0] + 4), places[0], -1):
        around, number = {*words[: places[0]], *words[end:]}, " ".join(words[places[0] : end])
        if around <= known | _FILLERS and around.isdisjoint(_SPOILERS) and quantity.read(number):
            return number
    return ""


def _restated(question: str, gold: str, given: str) -> bool | None:
    """Right if the answer is the accepted one behind words of the question: 'The sign reads "open"'."""
    bare, wanted = normalise(given), normalise(gold)
    before = bare.removesuffix(wanted)
    if before == bare or not _SENTENCE_START.fullmatch(before) or " or " in question:
        return None
    words = re.findall(r"[\w'-]+", before.casefold())
    known = set(re.findall(r"[\w'-]+", question.casefold())) | _FILLERS
    linked = ":" in before or words[-1] in _FILLERS
    return True if linked and set(words) <= known and _SPOILERS.isdisjoint(words) else None


def _not_this(question: str, gold: str, given: str) -> bool | None:
    """Wrong if one is the other with "not" before it."""
    pairs = (gold, given), (given, gold)
    return False if any(normalise(f"not {one}") == normalise(other) for one, other in pairs) else None


def _refused(gold: str, given: str) -> bool:
    """Whether the answer says that it has none, although there is one, and does not name it."""
    told = normalise(gold) in given or _NO_ANSWER.search(gold) or choice.is_polar(gold)
    match = _REFUSAL.match(given)
    return bool(match) and not told and not _GUESS.search(given, match.end())


def _spellings(text: str) -> set[str]:
    """Forms of a text in which ice-cream is ice cream and icecream, U.S. is US, and Beyoncé is Beyonce."""
    text = _INITIALS.sub(lambda match: match[0].replace(".", ""), normalise(text).replace(", ", " "))
    if len(text) > 4:
        apart = unicodedata.normalize("NFD", text)
        text = unicodedata.normalize("NFC", re.sub(r"(?<=[a-z])[\u0300-\u036f]+", "", apart))
    return {_LETTER_HYPHEN.sub(between, text) for between in (" ", "")}


def _several_numbers(text: str) -> bool:
    """Whether a text offers different numbers to pick from: "5 or 6", "between 5 and 6"."""
    between = re.fullmatch(r"between (.{1,30}) and (.{1,30})", text)
    options = between.groups() if between else re.split(r",? or |, ", text.removeprefix("either "))
    first, *others = [quantity.read(part) for part in options]
    if not (between or " or " in text) or not all([first, *others]):
        return False
    return any(quantity.compare("", first, other, Fraction(0)) is False for other in others)


def _same_but_number(question: str, gold: str, given: str) -> bool | None:
    """Wrong if two texts with one whole number each differ in nothing else: "Room 5" and "Room 6"."""
    numbers = re.findall("[0-9]+", gold), re.findall("[0-9]+", given)
    if not len(numbers[0]) == len(numbers[1]) == 1 or _FORMULA.search(gold) or quantity.VAGUE.search(question):
        return None
    frames = {re.sub("[0-9]+", "0", text) for text in (gold, given)}
    one, other = (found[0].lstrip("0") for found in numbers)
    short_year = {len(one), len(other)} == {2, 4} and (one.endswith(other) or other.endswith(one))  # class of 99
    return False if len(frames) == 1 and one != other and not short_year else None


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


# From the surest to the least sure; each returns None where it does not apply.
_RULES: tuple[Callable[[str, str, str], bool | None], ...] = (
    notation.same_date,
    notation.same_time,
    notation.same_tuple,
    notation.same_range,
    notation.same_address,
    notation.same_code,
    notation.same_list,
    _same_but_number,
    _not_this,
    _restated,
)
