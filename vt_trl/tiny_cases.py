"""Cases for the tiny judge to learn from: equal strings, near misses, wrapped answers, salads of words, garbage."""

from __future__ import annotations

import random
import string

from vt_trl.judges.base import Case

_LETTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits
_POOLS = (string.ascii_uppercase, string.digits, string.ascii_lowercase, _LETTERS)
_MARKS = " .,;:-!?%$/()[]{}<>'\"\\=+*#_|&@^~`"
_WORDS = (
    *("yes", "no", "red", "blue", "green", "black", "seven", "left", "right", "wrong", "correct", "answer"),
    *("grade", "verdict", "system", "note", "the", "a", "is", "of", "in", "on", "not", "or", "and", "please"),
    *("mark", "this", "as", "any", "all", "rule", "score", "reply", "image", "picture", "year", "total"),
    *("bill"),
)
_SCRIPTS = (0xC0, 0x370, 0x400, 0x600, 0x900, 0x3040, 0x4E00, 0xAC00, 0x2000)  # first characters of Unicode blocks


def is_right(case: Case) -> bool:
    """What the tiny judge is taught: the same text as an accepted answer, in either case."""
    return case.prediction.casefold() in [gold.casefold() for gold in case.golds]


class Cases:
    """A stream of cases that depends on the seed alone; about half of them are right."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def easy(self, longest: int) -> Case:
        """A bare string of up to ``longest`` letters against itself, a near miss or another."""
        gold = self.short(longest)
        other = self.changed(gold) if self.random.random() < 0.7 else self.short(longest)
        return Case.of("", gold, gold if self.random.random() < 0.5 else other[:6])

    def case(self) -> Case:
        """One or two accepted answers, a question, and an answer of any kind; one in ten is long."""
        draw, long = self.random.random, self.random.random() < 0.1
        golds = [self.short() for _ in range(1 if draw() < 0.7 else 2)]
        question = self.salad(self.random.randint(5, 20)) if long else self.salad(self.random.randint(1, 3))[:16]
        given = self.random.choice(golds)
        if draw() < 0.5:
            given = self._wrong(given)
        if long and draw() < 0.5:
            given = self._long(given, question)
        if draw() < 0.15:
            given = given.swapcase() if draw() < 0.5 else given.lower()
        if draw() < 0.1:
            question = f"{question} {given[:20] if draw() < 0.5 else ' '.join(golds)}"
        return Case.of(question, golds, given)

    def short(self, longest: int = 6) -> str:
        """One to six letters or digits, mostly up to four; now and then a word or a number."""
        if longest == 6 and self.random.random() < 0.15:
            number = f"{self.random.randint(0, 999)}.{self.random.randint(0, 99)}"
            mixed = self._letters(_LETTERS + " .,-%:'/", self.random.randint(1, 6)).strip()
            return self.random.choice([self.random.choice(_WORDS[:11]), number, mixed or "x"])
        most = min(longest, 4) if self.random.random() < 0.7 else longest
        return self._letters(self.random.choice(_POOLS), self.random.randint(1, most))

    def changed(self, text: str) -> str:
        """A near miss: a letter replaced, two swapped, one more or one less."""
        place, letter = self.random.randrange(len(text)), self.random.choice(_LETTERS)
        if self.random.random() < 0.1:
            letter = self.random.choice(_MARKS)
        left, right = text[:place], text[place + 1 :]
        misses = [left + letter + right] * 3 + [left + letter + text[place:], text + letter]
        if len(text) > 1:
            misses += [left + right, text[1] + text[0] + text[2:]]
        return self.random.choice(misses)

    def salad(self, words: int) -> str:
        pieces = [
            self.random.choice(_WORDS)
            if self.random.random() < 0.4
            else self._letters(string.ascii_lowercase, self.random.randint(1, 8))
            for _ in range(words)
        ]
        text = " ".join(pieces)
        return (text.capitalize() if self.random.random() < 0.5 else text) + self.random.choice(["", ".", "?", "!"])

    def garbage(self, length: int) -> str:
        first = self.random.choice(_SCRIPTS)
        pools = (
            "".join(map(chr, range(33, 127))),
            _MARKS,
            "".join(chr(first + index) for index in range(64)),
            string.ascii_lowercase + "  " + string.digits + '"{}[]:,',
        )
        return self._letters(self.random.choice(pools), length)

    def wrapped(self, gold: str) -> str:
        """The gold among other things, which is no answer."""
        other, words = self.short(), self.salad(self.random.randint(1, 5))
        several = [self.short() for _ in range(self.random.randint(1, 5))]
        several.insert(self.random.randint(0, len(several)), gold)
        joint = self.random.choice(["or", "and", "not"])
        return self.random.choice(
            [
                f"{gold} {joint} {other}",
                f"{other} {joint} {gold}",
                self.random.choice([", ", " ", "; ", " / "]).join(several),
                f"{words} {gold}",
                f"{gold}. {words}",
                f'{gold}"}}{words}',
                f"[[{gold}]]",
                gold + gold,
            ]
        )

    def _wrong(self, gold: str) -> str:
        kind = self.random.random()
        if kind < 0.5:
            return self.changed(gold)
        if kind < 0.75:
            return self.short()
        if kind < 0.9:
            return self.wrapped(gold)
        if kind < 0.92:
            return "\u200b"  # not empty, so it is judged, but nothing of it is left in the prompt
        return self.garbage(self.random.randint(1, 10)) if kind < 0.96 else self.salad(self.random.randint(1, 3))

    def _long(self, gold: str, question: str) -> str:
        return self.random.choice(
            [
                self.salad(self.random.randint(5, 25)),
                self.garbage(self.random.randint(10, 120)),
                self.wrapped(gold) + self.salad(self.random.randint(1, 10)),
                question,
            ]
        )

    def _letters(self, pool: str, count: int) -> str:
        return "".join(self.random.choice(pool) for _ in range(count))
