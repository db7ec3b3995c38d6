"""Short answers with a form of their own: dates, times of day, codes, addresses, tuples, ranges, ratios and lists.

Each rule takes the question and two cleaned texts, accepted and given: True or False, or None if it does not apply.
"""

from __future__ import annotations

import re
import unicodedata
from datetime import date

from vt_trl.judges.quantity import read
from vt_trl.rewards.accuracy import normalise, unboxed

_RAISED = re.compile("[⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_REPLACE = (("\\left", ""), ("\\right", ""), ("\\,", " "), ("\\;", " "), ("\\ ", " "), ("\\%", "%"), ("\\$", "$"))
_REPLACE += (("^{\\circ}", "°"), ("^\\circ", "°"), ("\\circ", "°"), ("−", "-"), ("–", "-"), ("‑", "-"), ("’", "'"))
_TEXT_MACRO = re.compile(r"\\(?:text|textbf|mathrm|mathbf) ?\{([^{}]{0,200})\}")
_DOLLARS = re.compile(r"\$([^$\\]{0,200}\\[^$]{0,200})\$")  # a formula, and not two prices
_LEAD_IN = re.compile(
    r"(?:(?:so|thus|therefore|hence),? )?(?:(?:the )?(?:final |correct |right )?"
    r"(?:(?:answer|result)(?: is ?:?| ?:)|(?:option|choice)(?: is| ?:)?(?= \(?[a-j]\b))"
    r"|it is|it's|that is|this is|there (?:is|are)|they are|=) ?(?=\S)"
)

_MONTH_NAMES = "january february march april may june july august september october november december"
_MONTHS = {name: number for number, name in enumerate(_MONTH_NAMES.split(), 1)}
_MONTHS |= {name[:3]: number for name, number in _MONTHS.items()} | {"sept": 9}
_DAYS = "mon(?:day)?|tue(?:s|sday)?|wed(?:nesday)?|thu(?:rs?|rsday)?|fri(?:day)?|sat(?:urday)?|sun(?:day)?"
_WEEKDAY = re.compile(rf"({_DAYS})\.?")
_BEFORE_DATE = re.compile(rf"(?:on )?(?:(?:{_DAYS})\.?,? )?")
_DIGIT_DATE = re.compile(r"(\d{1,4})([-/.])(\d{1,2})\2(\d{1,4})")
_WRITTEN_DATE = re.compile(
    r"(?:(\d{1,2})(?:st|nd|rd|th)?(?: of)?[ -])?([a-z]{3,9})\b\.?"
    r"(?:[ -](\d{1,2})(?:st|nd|rd|th)?\b)?(?:(?:, ?|,? of |[ -])(\d{4}))?"
)
_Date = tuple[int | None, int, int | None]
_CLOCK = re.compile(r"(?:at )?(\d{1,2})(?:[:.](\d{2}))? ?(?:([ap])\.?m|o'clock)?")
_NAMED_TIMES = {"noon": 720, "12 noon": 720, "midday": 720, "midnight": 0, "12 midnight": 0}

_CODE = re.compile(r"[a-z0-9]+(?:[ ()+#-]{1,3}[a-z0-9]+)*\)?")
_NO_CODE = re.compile(r"\b(?:of|in|per|to|and|or|out|x|by|from|at|am|pm|a|the|is)\b")
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,64}(?:\.[\w-]{1,64}){1,4}")
_WEB = re.compile(r"(?:https?://)?(?:www\.)?([\w-]{1,64}(?:\.[\w-]{1,64}){0,4}\.[a-z]{2,10}(?:/[^\s/]{1,200})*)/?")

_TUPLE = re.compile(r"(?:[a-z]'? ?=? ?)?([(\[{])([^()\[\]{}]{1,200})([)\]}])")
_PLAIN = r"-?\d[\d,]{0,20}(?:\.\d{1,20})?"
_RANGE = re.compile(rf"(?:from |between )?({_PLAIN}) ?(?:(:)|to|-|and|until|through) ?({_PLAIN})")
_RATIO = re.compile(r"\bratio\b", re.I)
_SEPARATOR = re.compile(r" ?(?:,? and |[,;&→>]) ?")
_ORDER = re.compile(
    r"\bin (?:the |[a-z]{2,20}ing )?order\b|\border of\b|\brank|\bsort\b|\barrange|\bsequence\b|\bchronolog"
    r"|\b(?:left|right|top|bottom) to (?:left|right|top|bottom)\b",
    re.I,
)
_PERHAPS_ORDER = re.compile(r"\b(?:order|step|steps|first|last|left|right|top|bottom|route|path|from)\b", re.I)
_SEVERAL = re.compile(
    r"\b(?:two|three|four|both|all|(?:what|which|the) (?!(?:i|wa|doe|ha|thi)s\b)[^\W\d_]{1,20}[a-rt-z]s)\b",
    re.I,
)
_ANY = re.compile(r"\b(?:one of|any|either|an? example|name an?)\b", re.I)


def tidy(text: str) -> str:
    r"""What counts of a text: the inside of ``\boxed{}``, in one form per character and lower case, without quotes."""
    text = _DOLLARS.sub(r"\1", _TEXT_MACRO.sub(r"\1", unboxed(text)))
    for old, new in _REPLACE:
        text = text.replace(old, new)
    text = unicodedata.normalize("NFKC", _RAISED.sub(lambda match: f"^{match[0]}", text)).casefold()
    text = " ".join(text.split()).strip("*`_ ")
    while len(text) > 2 and text[0] == text[-1] and text[0] in "\"'$":
        text = text[1:-1].strip()
    text = text.rstrip(" .,;:")
    if text[-1:] in ("!", "?") and not text[-2:-1].isdigit():  # 5! is a number
        text = text[:-1].rstrip()
    return text


def clean(text: str) -> str:
    """The same without "the answer is", "it is" and the like in front."""
    text = tidy(text)
    lead = _LEAD_IN.match(text)
    return text[lead.end() :].strip() if lead else text


def same_date(question: str, gold: str, given: str) -> bool | None:
    """Right if both can only be the same day, month or weekday, wrong if they cannot be."""
    ours, theirs = _WEEKDAY.fullmatch(gold), _WEEKDAY.fullmatch(given)
    if ours and theirs:
        return ours[1][:3] == theirs[1][:3]
    dates = _dates(gold), _dates(given)
    if not all(dates):
        return None
    named = [set(day[:3] for day in re.findall(rf"\b(?:{_DAYS})\b", text)) for text in (gold, given)]
    if all(named) and named[0] != named[1]:  # Thursday, 14 June is not Tuesday, 14 June
        return False
    if dates[0] == dates[1] and len(dates[0]) == 1:
        return True
    fits = (all(a == b or None in (a, b) for a, b in zip(x, y, strict=True)) for x in dates[0] for y in dates[1])
    return None if any(fits) else False


def _dates(text: str) -> set[_Date]:
    """All dates (year, month, day) that a text can be; None for a part it leaves out. Two-digit years: any century."""
    before = _BEFORE_DATE.match(text)
    text = text[before.end() :] if before else text
    found: set[_Date] = set()
    if match := _DIGIT_DATE.fullmatch(text):
        first, second, third = match[1], match[3], match[4]
        orders = [(first, second, third)] if len(first) in (2, 4) and len(third) <= 2 else []
        orders += [(third, second, first), (third, first, second)] if len(first) <= 2 and len(third) in (2, 4) else []
        for year, month, day in orders:
            years = [int(year)] if len(year) == 4 else [1900 + int(year), 2000 + int(year)]
            found |= {(one, int(month), int(day)) for one in years}
    elif (match := _WRITTEN_DATE.fullmatch(text)) and match[2] in _MONTHS and not (match[1] and match[3]):
        day = match[1] or match[3]
        found = {(int(match[4]) if match[4] else None, _MONTHS[match[2]], int(day) if day else None)}
    return {one for one in found if _valid(*one)}


def _valid(year: int | None, month: int, day: int | None) -> bool:
    try:
        date(2000 if year is None else year, month, 1 if day is None else day)
    except ValueError:
        return False
    return True


def same_time(question: str, gold: str, given: str) -> bool | None:
    """Times of day. Without am or pm, an hour up to 12 may be in either half of the day."""
    ours, theirs = _times(gold), _times(given)
    if not ours or not theirs or _RATIO.search(question):
        return None
    if ours == theirs:
        return True
    return None if ours & theirs else False


def _times(text: str) -> frozenset[int]:
    """The minutes since midnight that a text can mean; empty if it is no time of day."""
    if text in _NAMED_TIMES:
        return frozenset([_NAMED_TIMES[text]])
    match = _CLOCK.fullmatch(text)
    if match is None or ("." in text and not match[3]) or not (match[2] or match[3] or text.endswith("clock")):
        return frozenset()
    hour, minute = int(match[1]), int(match[2] or 0)
    if hour > 23 or minute > 59 or (match[3] and not 0 < hour <= 12):
        return frozenset()
    if match[3]:
        return frozenset([hour % 12 * 60 + minute + 720 * (match[3] == "p")])
    either = 0 < hour <= 12
    return frozenset([hour % 12 * 60 + minute, hour % 12 * 60 + minute + 720] if either else [hour * 60 + minute])


def same_code(question: str, gold: str, given: str) -> bool | None:
    """Serial, phone and plate numbers: spaces and hyphens do not count, every other character does."""
    ours, theirs = _code(gold), _code(given)
    if not ours or not theirs or (_dates(gold) and _dates(given)):
        return None
    if ours == theirs:
        return True
    if sorted(re.split("[ -]", gold)) == sorted(re.split("[ -]", given)) or ours in theirs or theirs in ours:
        return None  # "Q3 2020" and "2020 Q3"; with and without a country code
    digits = min(sum(map(str.isdigit, code)) for code in (ours, theirs))
    return False if digits > 3 or len(ours) == len(theirs) else None


def _code(text: str) -> str:
    """The letters and digits of a code: of words with digits and only short ones without, six in all; else ""."""
    words = re.split("[ ()+#-]+", text.strip("+#("))
    plain = [word for word in words if word.isalpha()]
    if not _CODE.fullmatch(text.strip("+#(")) or _NO_CODE.search(text) or any(len(word) > 3 for word in plain):
        return ""
    code = "".join(words)
    mixed = any(not word.isdigit() and not word.isalpha() for word in words) or bool(plain)
    digits = sum(map(str.isdigit, code))
    return code if len(code) > 5 and (digits > 6 or (mixed and digits > 1)) else ""


def same_address(question: str, gold: str, given: str) -> bool | None:
    """E-mail and web addresses: every character counts, but not the scheme, "www." and a last slash."""
    mails = _EMAIL.fullmatch(gold), _EMAIL.fullmatch(given)
    if all(mails):
        return gold == given
    webs = _WEB.fullmatch(gold), _WEB.fullmatch(given)
    if not webs[0] or not webs[1]:
        return None
    ours, theirs = webs[0][1], webs[1][1]
    return True if ours == theirs else None if ours in theirs or theirs in ours else False


def same_tuple(question: str, gold: str, given: str) -> bool | None:
    """Points, vectors and sets of plain numbers in the same brackets."""
    texts = [text.replace("\\", "") for text in (gold, given)]
    matches = [_TUPLE.fullmatch(text) for text in texts]
    if not matches[0] or not matches[1] or matches[0].group(1, 3) != matches[1].group(1, 3):
        return None
    rows = [[read(part.strip()) for part in re.split("[,;]", match[2])] for match in matches if match]
    if any(len(row) < 2 or any(len(one) != 1 or one[0].unit.dimension for one in row) for row in rows):
        return None
    values = [[one[0].value for one in row] for row in rows]
    return set(values[0]) == set(values[1]) if matches[0][1] == "{" else values[0] == values[1]


def same_range(question: str, gold: str, given: str) -> bool | None:
    """Ranges, scores and ratios of plain numbers: 2010-2015 is 2010 to 2015, and 2:3 is not 3:2."""
    matches = _RANGE.fullmatch(gold), _RANGE.fullmatch(given)
    if not matches[0] or not matches[1]:
        return None
    (a, b), (c, d) = ([read(match[1]), read(match[3])] for match in matches if match)
    if not (a and b and c and d) or (_times(gold) and _times(given) and not _RATIO.search(question)):
        return None
    a, b, c, d = (one[0].value for one in (a, b, c, d))
    if (a, b) == (c, d):
        return True
    return None if a * d == b * c or ((a, b) == (d, c) and not _RATIO.search(question)) else False


def same_list(question: str, gold: str, given: str) -> bool | None:
    """Lists of short names: the same in any order, unless the question asks for one; wrong if some are missing."""
    ours, theirs = _items(gold), _items(given)
    if len(ours) < 2 or not theirs:
        return None
    if ours == theirs:
        return True
    if set(ours) == set(theirs):
        if _ORDER.search(question) or "→" in gold:
            return False
        return None if _PERHAPS_ORDER.search(question) or any(map(str.isdigit, gold)) else True
    # "Paris, France", "car, auto" and "Bosnia and Herzegovina" are no lists of which all is wanted.
    sure = _SEVERAL.search(question) or (" and " in gold and len(theirs) > 1)
    missing, more = set(theirs) < set(ours) and not _ANY.search(question), set(theirs) > set(ours)
    return False if sure and (missing or more) else None


def _items(text: str) -> list[str]:
    """The items of a list, one if it is none; empty if they are no names of one or two words, or alternatives."""
    items = [normalise(item) for item in _SEPARATOR.split(text)]
    short = all(item and len(item) < 40 and item.count(" ") < 2 for item in items)
    return items if short and not re.search(r"\b(?:or|not|but)\b|/", text) else []
