"""Numbers with their unit, currency, percent sign or scale word: all readings of a text, compared exactly.

What can be read in two ways ("5 m": metres or minutes) has several readings. Texts come from ``notation.clean``: lower
case, one form per character, single spaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

# One dimension a line, its units split by "|": factor to the base unit (":" offset), then names without plural "s".
_UNIT_TABLE = """
length 1e-9 nm nanometer nanometre|1e-6 μm um micron micrometer micrometre|1e-3 mm millimeter millimetre
length .01 cm centimeter centimetre|.1 dm decimeter decimetre|1 m meter metre|1000 km kilometer kilometre
length .0254 in inch inche inches|.3048 ft foot feet|.9144 yd yard|1609.344 mi mile
mass 1e-9 μg ug mcg microgram|1e-6 mg milligram|1e-3 g gr gram gramme|1 kg kilo kilogram|1000 t tonne metric_ton ton
mass 907.18474 ton short_ton|.45359237 lb pound|.028349523125 oz ounce
time 1e-6 μs microsecond|1e-3 ms millisecond|1 s sec second|60 min minute m|3600 h hr hour|86400 d day|604800 wk week
calendar 1 month|12 y yr year|120 decade|1200 century centuries
temperature 1 k kelvin|1:273.15 °c c celsius degree_celsius degree_c|1:273.15 ° degree deg
temperature 5/9:45967/180 °f f fahrenheit degree_fahrenheit degree_f|5/9:45967/180 ° degree deg
angle 1 ° degree deg
volume 1e-3 ml milliliter millilitre cc cm3 cubic_centimeter cubic_centimetre|.01 cl|.1 dl|1 l liter litre dm3
volume 1000 m3 cubic_meter cubic_metre
area 1e-6 mm2|1e-4 cm2 square_centimeter square_centimetre sq_cm|1 m2 square_meter square_metre sq_m|1e4 ha hectare
area 1e6 km2 square_kilometer square_kilometre sq_km|.09290304 ft2 square_foot square_feet sq_ft|4046.8564224 acre
area 2589988.110336 square_mile sq_mi
speed 1 m/s meter_per_second metre_per_second|5/18 km/h kmh kph kilometer_per_hour kilometre_per_hour
speed .44704 mph mi/h mile_per_hour
data 1 byte b|1000 kb kilobyte|1024 kb kib kilobyte|1e6 mb megabyte|1048576 mb mib megabyte
data 1e9 gb gigabyte|1073741824 gb gib gigabyte|1e12 tb terabyte|1099511627776 tb tib terabyte
current 1e-3 ma milliamp milliampere|1 a amp ampere
voltage 1 v volt|1000 kv kilovolt
power 1 w watt|1000 kw kilowatt
frequency 1 hz hertz|1000 khz kilohertz|1e6 mhz megahertz|1e9 ghz gigahertz
% 1 % percent per_cent pct
π 1 π pi
USD 1 $ usd us$ dollar us_dollar|.01 cent ¢
EUR 1 € eur euro|.01 cent
GBP 1 £ gbp pound quid|.01 pence penny
JPY 1 ¥ jpy yen
CNY 1 ¥ cny rmb yuan
INR 1 ₹ inr rs rupee
KRW 1 ₩ krw won
CHF 1 chf franc
MYR 1 rm myr ringgit
IDR 1 rp idr rupiah
"""
_SCALES = {"hundred": 100, "dozen": 12, "thousand": 10**3, "k": 10**3, "million": 10**6, "mn": 10**6, "mio": 10**6}
_SCALES |= {"m": 10**6, "billion": 10**9, "bn": 10**9, "b": 10**9, "trillion": 10**12, "tn": 10**12}
_SCALES |= {"lakh": 10**5, "crore": 10**7}
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_TEN_NAMES = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: number for number, word in enumerate(f"{_ONES} eighteen nineteen".split())}
_TENS = {word: 10 * number for number, word in enumerate(_TEN_NAMES.split(), 2)}

_MAX_CHARS = 80  # a longer text is no single number
_ABOUT = re.compile(r"(?:about|approximately|approx\.?|around|roughly|circa|ca\.|~|≈) ?")
_SPELLED = re.compile(r"(minus |negative )?([a-z]{2,9})(?:[- ]([a-z]{3,5}))?\b")
_POWER = re.compile(r"(?<=\d) ?(?:[×x·*]|\\times|\\cdot) ?10\^\{?([-+]?\d{1,2})\}?(?!\d)")
_FRACTION = re.compile(r"\\[dt]?frac\{(\d{1,9})\}\{(\d{1,9})\}")
_QUANTITY = re.compile(
    r"(?P<sign>[-+]?) ?(?:(?P<money>[^\W\d_]{0,3}[$€£¥₹₩]|[^\W\d_]{2,4})\.? ?)?(?P<minus>[-+]?)"
    r"(?:(?P<whole>\d{1,9} )?(?P<top>\d{1,9}) ?/ ?(?P<bottom>\d{1,9})"
    r"|(?P<comma>(?:\d{1,3}(?:[. ]\d{3})+|\d+),(?:\d{1,2}|\d{4,}))"  # 47,30 and 1.234,56
    r"|(?P<number>(?:\d{1,3}(?:[ ,]\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d{1,2})?|\.\d+))"
    r"(?P<glue> ?-?)(?P<rest>(?![\d,.])[\w°%$€£¥₹₩¢][\w°%$€£¥₹₩ ./^-]*)?"
)
_DOTTED = re.compile(r"[1-9]\d{0,2}\.\d{3}")  # 1.234 may be 1234 in German
_NOUN = re.compile(r"[^\W\d_]{2,20}(?: [^\W\d_]{2,20}){0,2}")
# Words that make of a number something else than so many of a thing.
_CHANGES = """
and or not no to of out per than from point more less fewer times plus minus squared cubed am pm bc ad bce ce th st nd
rd half halves third thirds quarter quarters fourths fifths tenths hundredths
"""
_NO_NOUN = {*_CHANGES.split(), *_WORDS, *_TENS, *_SCALES}
# What may stand behind a unit and says only what is measured; "per" changes all but shares and money.
_ADDED = re.compile(
    r"off|discount|vol\.?|abv|by volume|alcohol|long|wide|tall|high|deep|thick|old|each|of age"
    r"|(?:square |cubic )?units|in (?:total|all|length|width|height|weight|size)"
    r"|of (?:the )?[^\W\d_]{2,20}(?: [^\W\d_]{2,20})?"
    r"|(?P<rate>(?:per|a|each) (?:year|annum|month|week|day|person|piece|kg|kilo)|annually)"
)

_UNIT_WORD = r"((?:square |cubic )?[^\W\d_]{2,14}|[°%$€£¥][cf]?)"
_ASKED = re.compile(rf"(?:\bhow many|\bnumber of|\bin|__|\(in) ?{_UNIT_WORD}|(?:__|\(in) ?([a-z])\b")
_COUNT = re.compile(r"\bhow many\b|\bnumber of\b", re.I)
_PERCENT = re.compile(r"%|\bpercent|\bper cent\b|\bpct\b", re.I)
_SCALED = re.compile(r"\b(?:thousand|million|billion|trillion)s?\b", re.I)
_DATE = re.compile(r"\b(?:dates?|days?|when)\b", re.I)
VAGUE = re.compile(
    r"\b(?:about|approx|approximate|approximately|estimated?|roughly|around|nearly|almost|closest)\b|[~≈]", re.I
)
_SIGNLESS = re.compile(r"decreas|declin|drop|loss|lost|lose|fall|fell|less|lower|reduc|below|chang|differ", re.I)
_VAGUE_SHARE = Fraction(1, 20)  # how far apart two numbers may be where the question asks for an estimate
_ROUNDING = Fraction(1, 10**6), Fraction(1, 10**9)  # relative and absolute: what a division leaves


@dataclass(frozen=True)
class Unit:
    """``value * factor + offset`` is in the dimension's base unit. Dimension "": none given; "?": only a noun."""

    dimension: str
    name: str
    factor: Fraction = Fraction(1)
    offset: Fraction = Fraction(0)


@dataclass(frozen=True)
class Quantity:
    """One reading of a number.

    ``step`` is what one more in the last written digit adds, 0 for a fraction; ``scale`` what a word such as "million"
    stands for; ``added`` what follows the unit, such as "off"; ``dotted`` if a point may separate thousands; ``tight``
    if the unit is one letter right behind the number, as in 12A, which may be no unit at all.
    """

    value: Fraction
    step: Fraction
    unit: Unit
    scale: int = 1
    added: str = ""
    dotted: bool = False
    tight: bool = False

    def within(self, unit: Unit) -> Quantity:
        """The same amount in another unit of its dimension."""
        base = self.value * self.unit.factor + self.unit.offset
        step = self.step * self.unit.factor / unit.factor
        return replace(self, value=(base - unit.offset) / unit.factor, step=step, unit=unit)


def _unit_table() -> dict[str, list[Unit]]:
    table: dict[str, list[Unit]] = {}
    for line in _UNIT_TABLE.strip().splitlines():
        dimension, _, units = line.partition(" ")
        for unit in units.split("|"):
            scale, *names = unit.split()
            factor, _, offset = scale.partition(":")
            made = Unit(dimension, names[0], Fraction(factor), Fraction(offset or 0))
            for name in names:
                table.setdefault(name.replace("_", " "), []).append(made)
    return table


_UNITS = _unit_table()
_BARE = Unit("", "")


def read(text: str) -> list[Quantity]:
    """All readings of a cleaned text that is one number, with or without a unit; empty if it is anything else."""
    if len(text) > _MAX_CHARS:
        return []
    text = _digits(_FRACTION.sub(r"\1/\2", _POWER.sub(r"e\1", text.replace("\\pi", "π"))))
    match = _QUANTITY.fullmatch(text)
    return (_readings(match) if match else []) or _read_sum(text)


def _readings(match: re.Match[str]) -> list[Quantity]:
    rest, money = (match["rest"] or "").strip(" ."), _currencies(match["money"] or "")
    if (match["money"] and not money) or (match["sign"] and match["minus"]) or not int(match["bottom"] or 1):
        return []
    if rest == "s" and not match["glue"] and match[0].endswith("0s"):  # the 1980s
        return []
    if match["top"]:
        value, step = int(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"])), Fraction(0)
    else:
        comma = match["comma"]
        written = re.sub("[. ]", "", comma).replace(",", ".") if comma else re.sub("[ ,]", "", match["number"])
        digits, _, exponent = written.partition("e")
        value, step = Fraction(written), Fraction(10) ** (int(exponent or 0) - len(digits.partition(".")[2]))
    one = Quantity(-value if "-" in (match["sign"], match["minus"]) else value, step, _BARE)
    tight = not match["glue"] and len(rest) == 1 and rest.isalpha()
    one = replace(one, dotted=bool(_DOTTED.fullmatch(match["number"] or "")), tight=tight)
    units = [found for found in _units(rest, money) if found[0].dimension != "?" or "-" not in match["glue"]]  # 1-way
    readings = [replace(one, unit=unit, added=added) for unit, added in units]
    word, _, behind = rest.partition(" ")
    if scale := _SCALES.get(word):
        for unit, added in _units(behind, money):
            if len(word) > 1 or not match["glue"] or unit.dimension.isupper():  # "5 m" is not 5m, "$5 m" is
                readings.append(Quantity(one.value * scale, step * scale, unit, scale, added))
    return readings


def compare(question: str, golds: Iterable[Quantity], givens: Iterable[Quantity], tolerance: Fraction) -> bool | None:
    """Whether two texts say the same amount: in some reading (True), in none (False), or who knows (None).

    ``tolerance``: by which share of the accepted number the given one may be off.
    """
    verdicts = {_compare(question, gold, given, tolerance) for gold in golds for given in givens}
    return True if True in verdicts else None if None in verdicts else False


def _digits(text: str) -> str:
    """The text without "about" and with a leading number word in digits."""
    text = _ABOUT.sub("", text, count=1) if _ABOUT.match(text) else text
    text = re.sub(r"^(?:minus|negative) (?=[\d.])", "-", text)
    text = re.sub(r"^an? (?=hundred|thousand|million|billion|dozen)", "1 ", text)
    match = _SPELLED.match(text)
    if match is None or match[2] not in {**_WORDS, **_TENS}:
        return text
    sign, first, second = "-" if match[1] else "", match[2], _WORDS.get(match[3] or "", 0)
    if first in _TENS and 0 < second < 10:
        return f"{sign}{_TENS[first] + second}{text[match.end(3) :]}"
    return f"{sign}{_TENS.get(first, _WORDS.get(first))}{text[match.end(2) :]}"


def _read_sum(text: str) -> list[Quantity]:
    """Readings of "1 h 30 min" and "5 feet, 10 inches" as one amount in the first unit."""
    parts = re.split(r"(?:, | and | )(?=\d)", text)
    first, second = map(read, parts) if len(parts) == 2 else ([], [])
    sums = []
    for large in first:
        for small in second:
            known = large.unit.dimension in ("length", "mass", "time", "calendar", "angle", "USD", "EUR", "GBP")
            if known and large.unit.dimension == small.unit.dimension and large.unit.factor > small.unit.factor:
                part = small.within(large.unit)
                sums.append(replace(large, value=large.value + part.value, step=part.step))
    return sums


def _named(name: str) -> list[Unit]:
    name = name.replace("^", "").replace("° ", "°").replace("degrees ", "degree ").replace("s per ", " per ")
    return _UNITS.get(name) or (_UNITS.get(name[:-1], []) if name.endswith("s") and len(name) > 2 else [])


def _currencies(name: str) -> list[Unit]:
    return [unit for unit in _named(name) if unit.dimension.isupper()]


def _units(rest: str, money: list[Unit]) -> list[tuple[Unit, str]]:
    """What the words behind a number can mean, with what is added; a currency before it admits no other unit."""
    if not rest:
        return [(unit, "") for unit in money] or [(_BARE, "")]
    words = rest.split(" ")
    for count in range(len(words), -1, -1):
        unit_name, added = " ".join(words[:count]), " ".join(words[count:])
        found = [unit for unit in _named(unit_name) if not money or unit in money] if count else money or [_BARE]
        match = _ADDED.fullmatch(added)
        if found and (not added or match):
            rated = match and match["rate"]
            rates = [unit for unit in found if unit.dimension.isupper() or unit.dimension == "%"]
            return [(unit, added) for unit in (rates if rated else found) if unit.dimension or words[0] != "of"]
    if not money and _NOUN.fullmatch(rest) and _NO_NOUN.isdisjoint(words):
        return [(Unit("?", " ".join(map(singular, words))), "")]
    return []


def singular(word: str) -> str:
    """The word without a plural "s"."""
    return word[:-1] if word.endswith("s") and len(word) > 3 else word


@lru_cache(maxsize=1024)
def _asked(question: str) -> list[Unit]:
    """The unit that the question wants ("how many cm", "in metres", "___ kg"), in all readings; empty if unclear."""
    names = {singular(match[1] or match[2]) for match in _ASKED.finditer(question.casefold())}
    found = [units for units in map(_named, names) if units]
    return found[0] if len({units[0].name for units in found}) == 1 else []


def _compare(question: str, gold: Quantity, given: Quantity, tolerance: Fraction) -> bool | None:
    ours, theirs = gold.unit, given.unit
    dimensions = {ours.dimension, theirs.dimension}
    if len(dimensions) == 1 and (ours.dimension != "?" or ours.name == theirs.name):
        same = _same(question, gold, given.within(ours), tolerance)
        asked = {unit.name for unit in _asked(question) if unit.dimension == ours.dimension}
        # "How many minutes are 2 hours?" is not answered by "2 hours", and 5 g of salt are not 5 g of sugar.
        restated = ours.name != theirs.name and asked and theirs.name not in asked
        return None if same and (restated or (gold.added and given.added and gold.added != given.added)) else same
    if "" in dimensions:
        return _compare_bare(question, gold, given, tolerance)
    return None if dimensions & {"?", "π"} or dimensions == {"time", "calendar"} else False


def _compare_bare(question: str, gold: Quantity, given: Quantity, tolerance: Fraction) -> bool | None:
    """One side has a unit and the other none: it may be left out, but not if it contradicts the one asked for."""
    unit = gold.unit if gold.unit.dimension else given.unit
    bare_gold = not gold.unit.dimension

    def same(as_unit: Unit, factor: int = 1) -> bool | None:
        bare = gold if bare_gold else given
        bare = replace(bare, value=bare.value * factor, step=bare.step * factor, unit=as_unit).within(unit)
        return _same(question, bare, given, tolerance) if bare_gold else _same(question, gold, bare, tolerance)

    plain = same(unit)
    if unit.dimension == "π":
        return None
    if unit.dimension == "?":
        mentioned = unit.name.split()[-1] in map(singular, re.findall(r"[^\W\d_]+", question.casefold()))
        return plain if mentioned or (plain and not bare_gold) else None
    if unit.dimension == "%":
        share = same(unit, 100)
        if share or (plain and (not bare_gold or _PERCENT.search(question))):
            return True
        return False if share is False and plain is False else None
    asked = [one for one in _asked(question) if one.dimension == unit.dimension]
    if plain and (gold.tight or given.tight):
        return None
    if plain and bare_gold and not asked and (_asked(question) or _COUNT.search(question)):
        return None  # 12 mm are no number of windows, and 5 dollars no number of euros
    if asked and unit.name not in {one.name for one in asked}:
        converted = same(asked[0])
        unclear = converted if bare_gold else converted is False and plain
        return None if unclear else converted
    if plain is False and not asked:
        others = {one for units in _UNITS.values() for one in units if one.dimension == unit.dimension}
        return None if any(same(one) for one in others) else False
    return plain


def _same(question: str, gold: Quantity, given: Quantity, tolerance: Fraction) -> bool | None:
    """Two amounts in one unit. None where rounding, a sign or a scale that goes without saying may explain them."""
    ours, theirs = gold.value, given.value
    apart, larger = abs(ours - theirs), max(abs(ours), abs(theirs))
    whole = ours.denominator == theirs.denominator == 1
    if not apart or (not whole and apart <= max(_ROUNDING[0] * larger, _ROUNDING[1])):
        return True
    if apart <= tolerance * abs(ours):
        return True
    if apart <= max(gold.step, given.step) / 2 or (VAGUE.search(question) and apart < _VAGUE_SHARE * larger):
        return None
    if ours == -theirs and _SIGNLESS.search(question):  # "dropped by": 5 or -5
        return None
    if ours and theirs:
        ratio = max(ours / theirs, theirs / ours)
        thousands = ratio in (10**3, 10**6, 10**9)
        # 1.2 on an axis in millions
        unsaid = 1 in (gold.scale, given.scale) and ours / gold.scale == theirs / given.scale
        if unsaid or (ratio == 1000 and gold.dotted != given.dotted) or (thousands and _SCALED.search(question)):
            return None
        if ratio == 100 and not gold.unit.dimension and not given.unit.dimension and _PERCENT.search(question):
            return None
        if ours * theirs == 1 and not gold.step and not given.step and _DATE.search(question):  # 3/4 and 4/3
            return None
    return False
