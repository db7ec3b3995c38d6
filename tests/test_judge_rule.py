"""The rule judge: what it must find right, what wrong, and what it must leave to a judge that can read."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vt_trl.errors import ConfigError
from vt_trl.judges.base import Case, Verdict
from vt_trl.judges.rule import MAX_CHARS, RuleJudge, _edits, anls, decide

VALUE, CATS, SIGN = "What is the value?", "How many cats are there?", "What does the sign read?"
CITY = "What is it? A. Paris B. London C. Rome D. New York"
SIZE = "What is it?\n(A) 5 cm\n(B) 10 cm\n(C) 15 cm\nAnswer with the option's letter from the given choices directly."
DIGITS, PICK = "Pick (1) cat (2) dog", "Pick: A. 5 B. 6 C. 7"

# question, accepted answer, and predictions that are right, wrong and not for a rule to decide
NUMBERS = [
    (VALUE, "1,234", ["1234", "1234.0", "1 234", "+1234"], ["1235", "12345", "-1234"], ["1.234"]),
    (VALUE, "1234.56", ["1,234.56", "1.234,56", "1234,56"], ["1234.65"], ["1234.6"]),
    (VALUE, "1.2 million", ["1,200,000", "1.2M", "1200 thousand"], ["12 million", "1.2 billion"], ["1.2", "1230000"]),
    (VALUE, "3.0 × 10^8", ["3e8", "300,000,000", r"3 \times 10^{8}"], ["3 × 10^7"], []),
    (VALUE, "3.14", ["3.140", "3,14"], ["3.2", "3.15"], ["3.14159", "3.1", "3"]),
    (VALUE, "1/2", ["0.5", ".5", r"\frac{1}{2}", "2/4", "50%"], ["0.6", "1/3", "-1/2"], ["½"]),
    (VALUE, "1 1/2", ["1.5", "3/2"], ["1/2"], []),
    (VALUE, "-4", ["minus four", "−4", "- 4", "-4.0"], ["4", "four"], []),
    (VALUE, "1230000", [], ["1240000"], ["1.2 million"]),
    (VALUE, "10²", ["100", "10^2"], [], ["102"]),
    (VALUE, "2019", ["2019."], ["2020"], ["'19", "the 2010s"]),
    (VALUE, "86", ["52 + 34 = 86", "x = 86"], ["52 + 34 = 84"], ["x = 84", "86+"]),
    (VALUE, "2 dozen", ["24", "two dozen"], ["2 thousand", "12"], ["2"]),
    (CATS, "3", ["three", "3 cats", "three cats", "There are three cats.", "about 3", "~3"], ["two", "4 cats", "0"],
     ["3 dogs", "3rd", "3 cm", "at least 3", "more than 3", "3 and 4", "several", "3-4", "3, 4", "3!", "not 4", "3+"]),
    (CATS, "3", [r"so \boxed{3}"], ["3 or 4", "either 3 or 4", "between 2 and 4", "not 3", r"3, \boxed{4}"], []),
    (CATS, "3 cats", ["3", "three"], ["4", "2 cats"], ["3 dogs"]),
    (CATS, "21", ["twenty-one", "twenty one"], ["twenty", "thirty-one"], []),
    (CATS, "3", [], ["", " ", r"\boxed{}", CATS, "I don't know", "Sorry, but I cannot see it."],
     ["I can't tell, maybe 3"]),
    (CATS, "0", [], [], ["I cannot see any", "none"]),
    ("About how many people are there?", "100", ["100"], ["120"], ["103"]),
    ("How much did it drop?", "-5", ["-5"], ["6"], ["5"]),
    ("What is the revenue, in millions?", "3.5", ["3.5"], ["4.5 million"], ["3.5 million", "3500"]),
    ("What was the total in 2019?", "12", ["The total was 12.", "In 2019 the total was 12."], ["The total was 13."],
     ["In 2019 the total was not 12.", "The total without taxes was 12."]),
]  # fmt: skip
UNITS = [
    (VALUE, "12 cm", ["120 mm", "0.12 m", "12cm", "12", "12 centimetres"], ["12 mm", "13", "12 kg", "$12"], ["120"]),
    (VALUE, "12", ["12 cm"], ["13 cm"], ["120 mm"]),
    ("How long is it in mm?", "12 cm", ["120", "120 mm"], ["13 cm", "130"], ["12"]),
    ("How long is it in mm?", "120", ["120 mm"], ["120 cm"], ["12 cm"]),
    (VALUE, "5 kg", ["5000 g", "5,000 grams", "5 kg of rice"], ["5 g", "5 m", "6 kg"], ["11.02 lb", "5 cats"]),
    (VALUE, "5 m", ["5 meters", "500 cm", "5.0 m", "5 minutes"], ["6 m", "5 km"], []),
    (VALUE, "20 °C", ["68 °F", "20", "20°", "20 degrees Celsius", "293.15 K"], ["20 °F", "21"], []),
    (VALUE, "45°", ["45", r"45^\circ", "45 degrees"], ["46", "45%"], [r"\frac{\pi}{4}"]),
    (VALUE, "90 min", ["1.5 h", "1 hour 30 minutes", "1 h and 30 min"], ["3 h", "90 h"], ["1 h", "0.06 days"]),
    (VALUE, "1 year", ["12 months"], ["2 years"], ["13 months", "365 days"]),
    ("How many minutes are 2 hours?", "120 minutes", ["120"], ["60"], ["2 hours"]),
    (VALUE, "5 ft 10 in", ["70 inches", "5 feet, 10 inches"], ["71 inches"], []),
    (VALUE, "1 GB", ["1024 MB", "1000 MB"], ["100 MB"], []),
    (VALUE, "60 km/h", ["60 kilometers per hour", "60"], ["60 mph", "60 km"], []),
    (VALUE, "1 m²", ["10000 cm^2", "1 square meter"], ["1 cm²", "1 m"], []),
    (VALUE, "9π", [r"9\pi", r"$9 \pi$ square units"], ["6π"], ["9", "28.27"]),
    ("Which seat?", "12A", [], ["13"], ["12", "12B"]),
    (VALUE, "25%", ["0.25", "25", "25 percent", "1/4"], ["0.25%", "26%", "2.5", "$25"], []),
    (VALUE, "0.25", ["25%"], ["26%"], []),
    (VALUE, "25", [], ["26%", "0.25"], ["25%"]),
    ("What percentage?", "25", ["25%"], ["26%"], ["0.25"]),
    (VALUE, "30% off", ["30 percent"], ["40%", "30 euros"], []),
    (VALUE, "$5", ["5 dollars", "5", "USD 5.00", "US$5", "500 cents"], ["€5", "5 yen", "$6"], ["A$5", "$5 million"]),
    (VALUE, "£3", ["3 pounds", "GBP 3"], ["3 lb", "$3"], []),
    (VALUE, "RM 12.50", ["12.50", "MYR 12.5"], ["12.60"], []),
    ("How many euros?", "5", ["€5", "5 euros"], ["€6"], ["$5"]),
    (VALUE, "1990s", [], [], ["1990"]),
]  # fmt: skip
CHOICES = [
    (CITY, "A", ["a", "(A)", "A.", "A) Paris", "Paris", r"\boxed{A}", r"\boxed{\text{(A)}}", "The answer is A.",
                 "Option A", "Answer: A (Paris)"],
     ["B", "London", "B. London", "A or B", "A, B", "A/C", "not A", "A. London"],
     ["Berlin", "A cat", "E", "Paris or Rome"]),
    (CITY, "Paris", ["A", "A. Paris"], ["B", "London"], ["E"]),
    (CITY, "(D) New York", ["D", "New York", "d) new york"], ["A"], ["NYC"]),
    (SIZE, "A", ["5 cm", "50 mm", "5"], ["10 cm", "B", "12"], ["large"]),
    (SIZE, "C", ["15 cm", "C"], [], []),
    (PICK, "B", ["6", "6.0", "six", "B) 6"], ["5", "A", "8", "B: 7"], []),
    (DIGITS, "2", ["dog", "(2)"], ["1", "cat"], ["bird"]),
    ("Pick (1) 2 (2) 3 (3) 4", "2", [], [], ["3"]),
    (VALUE, "C. Paris", ["C", "Paris", "C) paris"], ["B"], ["C. London", "London"]),
    (VALUE, "C", ["C: it is Paris, not London"], ["D", "C and D"], ["C, or maybe B", "C++", "CO2"]),
    (VALUE, "A, C", ["A and C"], ["A, B", "A"], ["A or C"]),
    (VALUE, "J. Smith", [], [], ["A. Smith", "J. Jones"]),
    (VALUE, "Lincoln", [], [], ["A. Lincoln"]),
]  # fmt: skip
POLAR = [
    (VALUE, "yes", ["Yes.", "True", "yes, it is", "Yes, a small one"], ["no", "yes and no"],
     ["yes, but no", "yes, it is not", "yes, if any", "not really"]),
    (VALUE, "No", ["false", "No, it is not."], ["yes", "true"], ["No. 5", "no idea", "No parking"]),
    ("Is the door open?", "Yes", ["It is open.", "The door is open"], ["It is not open", "It isn't open"],
     ["It is closed", "open"]),
    ("Is the dog chasing the cat?", "Yes", [], [], ["The cat is chasing the dog", "It is a cat"]),
    ("Is it raining? Answer yes or no.", "No", ["It's not raining."], ["It is raining."], []),
    ("Are there more cats than dogs?", "Yes", [], [], ["There are more dogs than cats"]),
]  # fmt: skip
DATES = [
    (VALUE, "2021-03-05", ["March 5, 2021", "5 March 2021", "5th of Mar 2021", "Friday, March 5, 2021"],
     ["2021-03-06"], ["05/03/2021", "March 5", "03-05-2021"]),
    (VALUE, "2021-03-25", ["25/03/2021", "3/25/2021", "25.03.2021"], ["26.03.2021", "25/04/2021"], []),
    (VALUE, "25/12/18", [], ["2018-12-24"], ["2018-12-25"]),
    (VALUE, "Mar 2021", ["March 2021"], ["April 2021"], ["2021", "2021-03-05"]),
    (VALUE, "Monday", ["Mon"], ["Sunday"], ["weekend"]),
    (VALUE, "Thursday, 14 June", ["14 June", "Thu 14 June"], ["Tuesday, 14 June", "Thursday, 15 June"], []),
    (VALUE, "15:30", ["3:30 pm", "3:30 P.M."], ["15:45", "3:30 am", "noon"], ["3:30"]),
    (VALUE, "noon", ["12 pm", "12:00 pm"], ["12 am", "midnight"], ["12:00"]),
]  # fmt: skip
TEXTS = [
    (VALUE, "ice cream", ["Ice-cream", "the ice cream", "It is ice cream.", "**ice cream**", "'ice cream'"],
     ["not ice cream"], ["cream", "sorbet", "ice cream or cake", "vanilla ice cream"]),
    (VALUE, "U.S.A.", ["USA", "usa"], [], ["America"]),
    (VALUE, "Beyoncé", ["Beyonce"], [], []),
    (VALUE, "Paris, France", [], [], ["Paris", "France, Texas"]),
    (VALUE, "Room 5", [], ["Room 6", "Room 15"], ["Room 05", "5"]),
    (VALUE, "class of 1999", [], ["class of 1998"], ["class of 99"]),
    (SIGN, "Stop", ['The sign reads "stop".', "It says: Stop"], ["not stop"], ["The sign reads do not stop"]),
    ("Is it stop or go?", "go", [], [], ["stop go"]),
    (VALUE, "555-123-4567", ["(555) 123-4567", "5551234567"], ["555-123-4568"], ["+1 555 123 4567"]),
    (VALUE, "INV-2023-0087", ["INV 2023 0087"], ["INV-2023-0078", "INV-0087-2032"], ["the invoice"]),
    (VALUE, "Q3 2020", [], ["Q3 2021"], ["2020 Q3"]),
    (VALUE, "a.b@c.com", [], ["ab@c.com"], ["c.com"]),
    (VALUE, "www.abc.com", ["https://abc.com/"], ["www.abd.com"], ["abc"]),
    (VALUE, "(1, 2)", ["(1.0,2)", r"\left(1,\,2\right)", "P(1,2)"], ["(2, 1)", "(1, 2, 3)"], ["[1, 2]", "1"]),
    (VALUE, "{1, 2}", [r"\{2, 1\}"], ["{1, 2, 3}"], []),
    (VALUE, "2010-2015", ["2010 to 2015", "from 2010 to 2015", "2010–2015"], ["2010-2016"], ["2015-2010"]),
    ("What is the ratio?", "2:3", ["2 to 3"], ["3:2", "2:5"], ["4:6"]),
    (VALUE, "red, green and blue", ["blue, red and green"], ["red, green", "red, green, blue, pink"],
     ["red", "red, green, pink"]),
    ("Which two colours?", "red and blue", ["blue and red"], ["red"], ["crimson and blue"]),
    ("Name them in order.", "red, blue", ["red and blue"], ["blue, red"], []),
    (VALUE, "Oslo, Norway, Europe", [], [], ["Oslo, Norway"]),
    (VALUE, r"2\sqrt{3}", [r"\sqrt{12}"], [], [r"3\sqrt{2}"]),
    (VALUE, "x+1", ["1+x"], [], ["x-1", "x+1 or x"]),
]  # fmt: skip


def flat(table):
    rows = [
        (*one[:2], text, want)
        for one in table
        for want, texts in zip((True, False, None), one[2:], strict=True)
        for text in texts
    ]
    return pytest.mark.parametrize(("question", "gold", "prediction", "verdict"), rows)


@flat(NUMBERS + UNITS)
def test_numbers_and_units(question, gold, prediction, verdict):
    assert decide(question, [gold], prediction) is verdict


@flat(CHOICES + POLAR)
def test_closed_questions(question, gold, prediction, verdict):
    assert decide(question, [gold], prediction) is verdict


@flat(DATES + TEXTS)
def test_dates_and_texts(question, gold, prediction, verdict):
    assert decide(question, [gold], prediction) is verdict


def test_several_accepted_answers():
    assert decide(VALUE, ["a dozen", "12 eggs"], "12") is True
    assert decide(VALUE, ["5", "6"], "7") is False
    assert decide(VALUE, ["5", "the first one"], "7") is None  # nobody knows what the second one means
    assert decide(VALUE, ["5", " "], "7") is False
    assert decide(VALUE, [], "7") is None


def test_relative_tolerance_is_a_share_of_the_accepted_number():
    for prediction, right in (("105", True), ("95", True), ("105.1", False), ("94", False)):
        assert decide(VALUE, ["100"], prediction, relative_tolerance=0.05) is right
    assert decide(VALUE, ["100"], "130", relative_tolerance=0.3) is True  # exact, although 0.3 is no binary fraction
    assert decide(VALUE, ["1 m"], "103 cm", relative_tolerance=0.05) is True
    assert decide(VALUE, ["-100"], "100", relative_tolerance=0.9) is False


def test_anls_by_hand():
    assert anls("Hello  World", ["hello world"]) == 1.0
    assert anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)  # k-s, e-i, +g
    assert anls("ab", ["abcd"]) == 0.5  # at the threshold
    assert anls("ab", ["abcde"]) == 0.0  # 0.4
    assert anls("ab", ["abcde"], threshold=0.4) == pytest.approx(0.4)
    assert anls("acme ltd", ["acme inc", "acne ltd", "x"]) == pytest.approx(1 - 1 / 8)
    assert (anls("", ["a"]), anls("a", [""]), anls("", [""]), anls("a", [])) == (0.0, 0.0, 1.0, 0.0)


@given(st.text("abc", max_size=12), st.text("abcd", max_size=12))
def test_edits_are_those_of_the_textbook(one, other):
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    assert _edits(one, other) == row[-1]


@pytest.mark.parametrize(
    ("gold", "prediction", "verdict"),
    [
        ("Lindenhof Bakery", "Lindenhoff Bakery", True),
        ("Lindenhof Bakery", "The Corner Cafe", False),
        ("Invoice 4711 of May", "Invoice 4712 of May", False),  # alike, but for a digit
        ("12.50", "12.60", False),
        ("Monday", "Sunday", False),  # 4 of 6 letters are the same, but a rule knows weekdays
    ],
)
def test_similarity_decides_what_is_left(gold, prediction, verdict):
    assert decide(VALUE, [gold], prediction, anls_threshold=0.5) is verdict


UNIT_PAIRS = [
    ("km", "m", 1000),
    ("hours", "min", 60),
    ("kg", "grams", 1000),
    ("ft", "inches", 12),
    ("tonnes", "kg", 1000),
]


@given(st.integers(1, 10**30), st.sampled_from(UNIT_PAIRS))
def test_amounts_are_equal_or_not_in_both_directions(number, units):
    large, small, ratio = units
    one, other = f"{number} {large}", f"{number * ratio:,} {small}"
    assert decide(VALUE, [one], other) is decide(VALUE, [other], one) is True
    one = f"{number + 1} {large}"
    assert decide(VALUE, [one], other) is decide(VALUE, [other], one) is False


PIECES = [
    "\\boxed{", "}", "\\frac", "{1}", "1", "12", "1,234", ",", ".", "%", "$", "€", "^", "=", "A", ")", "(", "[", " ",
    "²", "½", "e9", "-", "°", "cm", "m", " or ", "and", "not", "five", "million", "/", "2021", "March", ":", "pm",
    "yes", "no,", "it is", "option", "@", "www.", ".com", "*", "×10^", "\n", "\x00", "\ud800", "ß", "İ", "ﬁ", "٣",
    "一", "about", " per ", "'", '"', "A.", "B.", "(1)", "(2)", "how many", "in", "?", "\\{", "π", "!", "→", "&",
]  # fmt: skip
TEXT = st.text(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=10).map("".join)


@given(TEXT, TEXT, TEXT, st.sampled_from([None, 0.5]))
def test_no_text_raises(question, gold, prediction, threshold):
    verdict = decide(question, [gold], prediction, anls_threshold=threshold, relative_tolerance=0.05)
    assert verdict in (True, False, None)


@given(TEXT.filter(str.strip), TEXT)
def test_every_answer_matches_itself(text, question):
    assert decide(text, [text], text) is True
    assert decide(question, ["7", text], f" {text}\n") is True


HOSTILE = [
    "1", "1,", "1 ", "a", "a ", "A, ", "__", "(", "\\boxed{", "{", "$", "$\\", "'", "un", "not ", "or ", "a.b", "a@",
    "5-", "(A) ", "1. ", "\\text{", "5 m ", " and", "²", "\u0301", "the ", "a.", "1+", "it is ", "- ",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_texts_are_no_work(piece):
    # 100,000 characters, and as much as is looked at: anything quadratic or worse would take minutes.
    endless = piece * (100_000 // len(piece))
    prediction, gold, question = (endless[:size] for size in MAX_CHARS.values())
    assert decide(endless, [endless + "x"], endless) is None
    assert decide("", ["7"], f"{endless}x") is None
    assert decide(question, [f"{gold[:-1]}x"], f"{prediction[:-1]}y", anls_threshold=0.5) in (True, False)
    assert decide(question, ["7 cm"], prediction) in (False, None)


def test_the_judge_maps_verdicts_and_names_its_settings():
    judge = RuleJudge(relative_tolerance=0.05)
    cases = [
        Case.of(VALUE, "5", "five"),
        Case.of(VALUE, "5", "7"),
        Case.of(VALUE, "a car", "a sedan"),
        Case.of(VALUE, "5", ""),
    ]
    found = asyncio.run(judge.judge(cases))
    assert [one.verdict for one in found] == [Verdict.RIGHT, Verdict.WRONG, Verdict.FAILED, Verdict.WRONG]
    assert found[2].detail == "no rule fits"
    assert not judge.cached
    prints = [json.dumps(one.fingerprint()) for one in (judge, RuleJudge(), RuleJudge(anls_threshold=0.5))]
    assert len(set(prints)) == 3 and all("version" in one for one in prints)


@pytest.mark.parametrize(
    "settings", [{"relative_tolerance": 5}, {"relative_tolerance": -0.1}, {"relative_tolerance": float("nan")},
                 {"anls_threshold": 0}, {"anls_threshold": 50}]
)  # fmt: skip
def test_settings_that_cannot_work(settings):
    with pytest.raises(ConfigError, match="share|similarity"):
        RuleJudge(**settings)


def test_labelled_rows():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "judge_rows.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    cases = [Case.of(row["question"], row["answer"], row["prediction"]) for row in rows]
    verdicts = [decide(case.question, case.golds, case.prediction) for case in cases]
    decided = [(row, one) for row, one in zip(rows, verdicts, strict=True) if one is not None]
    assert len(decided) >= 0.5 * len(rows)
    assert [row["id"] for row, one in decided if one != (row["label"] == "right")] == []
