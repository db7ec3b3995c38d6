"""Closed questions: one of the options, by letter or by text; yes or no, also by a sentence.

Answers come from ``notation.clean``.
"""

from __future__ import annotations

import re

from vt_trl.judges.notation import clean
from vt_trl.rewards.accuracy import normalise

# How options stand in a question: "(A) …", "A. …" (or "A)", "A:"), "(a) …", "a) …", "(1) …", "1. …".
_MARKERS = (r"\(([A-J])\)", r"(?<![\w(])([A-J])(?:\)|[.:](?=\s))", r"\(([a-j])\)", r"(?<![\w(])([a-j])\)(?=\s)")
_MARKERS += (r"\((\d)\)", r"(?<![\w(.,])(\d)[.)](?=\s)")
_TAIL = re.compile(r"\s(?:please|answer|choose|select|respond|reply|give|pick|hint)\b.*", re.I | re.S)
_LETTER = re.compile(r"[(\[]?([a-z1-9])(?:[)\].:]{0,2}|(?:[)\].:]{1,2} | (?=\())(.+))")
_LETTERS = re.compile(r"(?:either )?\(?[a-j]\)?(?:(?: ?, ?(?:and |or )?| ?[/&] ?| and | or )\(?[a-j]\)?){1,7}")
_SINGLE = re.compile(r"(?<![\w'])[a-j](?![\w'])")

_DOUBT = re.compile(
    r"\b(?:but|or|however|maybe|perhaps|unless|except|although|though|sure|if|only|both|partly|than)\b"
)
_DENIAL = re.compile(r"\b(?:no|not|never|none|neither|false|cannot)\b|n't\b")
_AFFIRMATION = re.compile(r"\b(?:yes|true)\b")
_POLAR = re.compile(
    r"(?:(yes|yeah|yep|true)|no|nope|false)"
    r"(?: ?[,.;:!-]+ ?(\D{1,200})| ((?:it|he|she|they|there|this|that|the)\b\D{0,200}))?"
)
_BOTH_POLES = re.compile(r"(?:both |maybe )?(?:yes|no)(?:,? and |,? or |/|, )(?:maybe )?(?:yes|no)")
_POLAR_QUESTION = re.compile(r"\s*(?:is|are|was|were|does|do|did|has|have|can|could|will|would)\b", re.I)
_IN_PICTURE = re.compile(r"\b(?:in|on|visible in|shown in) (?:the|this) (?:picture|image|photo|photograph|scene)\b")
_VERB_FORMS = """
is are was were does do did has have can could will would isn't aren't wasn't weren't doesn't don't didn't
hasn't haven't can't couldn't won't wouldn't
"""
_PRONOUNS = {"it", "he", "she", "they", "there", "this", "that", "these", "those"}
_NO_END = {"a", "an", "the", "any", "some", "with", "of", "on", "in", "at", "to", "by", "for", "from", "near", "like"}
_VERBS = set(_VERB_FORMS.split())
_FUNCTION_WORDS = {*_VERBS, *_PRONOUNS, "a", "an", "the", "not", "no", "any", "be"}


def choice(question: str, gold: str, given: str) -> tuple[bool | None, str]:
    """A verdict if both are options, by letter or text, and the gold's text without its letter.

    The text is empty if the case is to be left open: a letter and a text that contradict each other, for one.
    """
    options = _options(question)
    if gold != given and any(_is_both(text, options) for text in (gold, given)):
        return None, ""
    ours, theirs = _option(gold, options), _option(given, options)
    wanted = ours[1] if ours and ours[1] else gold
    several = bool(_LETTERS.fullmatch(given)) and len(set(_SINGLE.findall(given))) > 1
    if ours and theirs:
        right = ours[0] == theirs[0]
        clash = ours[1] and theirs[1] and (normalise(ours[1]) == normalise(theirs[1])) != right
        return (None, "") if clash else (right, wanted)
    if ours:
        denied = given.startswith("not ") and given[4:] in (ours[0], ours[1])
        return (False if several or denied or _two_options(given, options) else None), wanted
    if _LETTERS.fullmatch(gold) and " or " not in gold and "/" not in gold:  # all of them are wanted
        letters = _SINGLE.findall(gold), _SINGLE.findall(given)
        if (theirs and not theirs[1]) or (several and set(letters[0]) != set(letters[1])):
            return False, wanted
        if several and letters[0] == letters[1] and " or " not in given:
            return True, wanted
    return None, wanted


def _options(question: str) -> dict[str, str]:
    """The options a question lists, letter to text: the longest run of markers A, B, C, … in one style."""
    best: list[re.Match[str]] = []
    for marker in _MARKERS:
        run: list[re.Match[str]] = []
        for match in re.finditer(marker, question):
            if run and match[1] == chr(ord(run[-1][1]) + 1):
                run.append(match)
            elif match[1] in "Aa1":
                run = [match]
            best = run if len(run) > max(len(best), 1) else best
    if not best:
        return {}
    texts = [question[one.end() : two.start()] for one, two in zip(best, best[1:], strict=False)]
    texts.append(_TAIL.sub("", question[best[-1].end() :].lstrip().partition("\n")[0]))
    return {mark[1].lower(): clean(text.strip(" ,;|/")) for mark, text in zip(best, texts, strict=True)}


def _option(text: str, options: dict[str, str]) -> tuple[str, str] | None:
    """Letter and text of the option that a cleaned text names; the text is empty where nobody knows it."""
    named = [letter for letter, own in options.items() if normalise(own) == normalise(text)]
    if named:
        return (named[0], options[named[0]]) if len(named) == 1 and named[0] != text else None
    match = _LETTER.fullmatch(text)
    if match is None or (match[1] not in options and (options or match[1].isdigit())):
        return None
    letter, rest = match[1], _bare(match[2] or "")
    if options:
        return (letter, options[letter]) if not rest or rest == normalise(options[letter]) else None
    others = set(_SINGLE.findall(rest)) - {"a", "i", letter}
    return None if rest and (letter > "j" or others or _DOUBT.search(rest)) else (letter, rest)


def _is_both(text: str, options: dict[str, str]) -> bool:
    """Whether a text is one option's letter (or number) and another one's text."""
    return text in options and any(text == normalise(own) for letter, own in options.items() if letter != text)


def _two_options(text: str, options: dict[str, str]) -> bool:
    """Whether a text is the letter of one option with the text of another."""
    match = _LETTER.fullmatch(text)
    rest = _bare(match[2] or "") if match else ""
    return bool(match and rest) and any(
        rest == normalise(own) != normalise(options.get(match[1], own)) for own in options.values()
    )


def _bare(text: str) -> str:
    return normalise(text[1:-1] if text.startswith("(") and text.endswith(")") else text)


def is_polar(text: str) -> bool:
    """Whether a text is yes or no, with or without more."""
    return bool(_POLAR.fullmatch(text))


def polar(question: str, gold: str, given: str, sentence: str) -> bool | None:
    """Yes or no, true or false. An explanation may follow in the answer if it takes nothing back.

    ``sentence``: the given answer with "it is" in front, if it stood there.
    """
    ours, theirs = _POLAR.fullmatch(gold), _POLAR.fullmatch(given)
    if not ours or ours[2] or ours[3]:
        return None
    if _BOTH_POLES.fullmatch(given):
        return False
    if not theirs:
        said = _said(question, sentence)
        return None if said is None else said == bool(ours[1])
    rest = theirs[2] or theirs[3] or ""
    if _DOUBT.search(rest) or (_DENIAL if theirs[1] else _AFFIRMATION).search(rest):
        return None
    return bool(ours[1]) == bool(theirs[1])


def _said(question: str, sentence: str) -> bool | None:
    """Yes or no by a sentence that repeats the end of the question: "It is not open." to "Is the old door open?"."""
    asked = _IN_PICTURE.sub("", question.casefold().partition("?")[0])
    if not _POLAR_QUESTION.match(asked) or _DENIAL.search(asked) or _DOUBT.search(asked) or _DOUBT.search(sentence):
        return None
    words = re.findall(r"[\w']+", re.sub(r"'s\b", " is", sentence))
    content = [word for word in words if word not in _FUNCTION_WORDS]
    denials = len(_DENIAL.findall(sentence))
    if not content or denials > 1 or _VERBS.isdisjoint(words):
        return None
    asked_words = re.findall(r"[\w']+", asked)
    places = [place for place, word in enumerate(asked_words) if word not in _FUNCTION_WORDS]
    if words[0] in _PRONOUNS and "and" not in asked_words and len(content) < len(places):  # "it" is what comes before
        places = places[-len(content) :]
        before = asked_words[places[0] - 1]
        if before in _NO_END or before.endswith("ing"):  # "It is a cat" to "Is it chasing the cat?"
            return None
    return denials == 0 if content == [asked_words[place] for place in places] else None
