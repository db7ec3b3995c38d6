r"""What makes a written trace fit to be taught: the answer found in it, reflection cut, and reasons to leave it out.

Pure functions on texts that a model wrote; nothing is evaluated, and every pattern is linear or sees a bounded text.
Cutting matters: MathVista after the first SFT of OpenVLThinker (arXiv 2503.17352) is 57.5 with traces as written,
58.7 with those below 500 words, 63.4 with traces that end where the model had its answer and began to doubt it.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from data_prep.wording import fold, foreign_share, mentions_description, repeated_share, seen, sentences, words
from vt_trl.errors import ConfigError, did_you_mean
from vt_trl.judges.reward import last_answer
from vt_trl.rewards.accuracy import boxed, normalise, unboxed

if TYPE_CHECKING:
    from vt_trl.types import Rollout

# A sentence that begins like this takes back or goes over what was said. Matched after words such as "But" and "So".
PHRASES = (
    "wait",
    "hmm",
    "hold on",
    "alternatively",
    "actually,",
    "on second thought",
    "let me double-check",
    "let me double check",
    "let me check again",
    "let me recheck",
    "let me re-check",
    "let me verify",
    "let me rethink",
    "let me reconsider",
    "let me re-read",
    "let me go over",
    "let's double-check",
    "let's verify",
    "to double-check",
    "just to be sure",
    "just to make sure",
    "another way",
)
_TAGS = re.compile(r"</?(?:think|answer|tool_call)>")
_ANSWER_LINE = re.compile(
    r"^[ \t>*#_]{0,8}(?:(?:so|thus|hence|therefore)[, ]{1,2})?(?:the )?(?:final |correct )?answer"
    r"(?:[ \t*_]{0,4}[:=]| is\b[ \t]{0,2}:?)[ \t*_]{0,4}(?P<answer>\S[^\n]{0,300})$",
    re.I | re.M,
)
_STOP = re.compile(r"(?:[^.]|\.(?=\d)){1,300}\.")  # a text whose only point is the one at its end
_LEAD = r"(?:(?:but|oh|and|so|ok|okay|no|well|hmm+)[,.!\s]{1,3}){0,3}"
_COUNTS = re.compile(
    r"\b(?:steps?|parts?|cases?|fig(?:ure)?s?|lines?|eq(?:uation)?s?|questions?|points?|rows?|columns?|pages?|images?"
    r"|pictures?|no|numbers?)\.?[ #(]{0,3}$",
    re.I,
)
_NEAR = 2  # sentences before a cut point that may state the answer
_KNOWN_GRAM, _KNOWN_SHARE = 3, 0.6  # words per n-gram; from which share of known ones on nothing new is said
_SEVERAL = 300  # characters of an answer that is looked for in sentences


def answer_in(text: str) -> str | None:
    r"""What a reply gives as its answer, with its ``\boxed{…}`` where it has one; None where it gives none.

    In order: the last answer tags behind the reasoning, the last closed box (braces inside it balanced, line breaks
    and units as they are), the last line that begins with "Answer:" or "The final answer is".
    """
    tagged = last_answer(text)
    if tagged is not None:
        return tagged
    said = text.rpartition("</think>")[2]
    for part in (said, text):
        content = boxed(part)
        if content is not None and content.strip():
            return f"\\boxed{{{content.strip()}}}"
    lines = list(_ANSWER_LINE.finditer(said))
    if not lines:
        return None
    answer = lines[-1]["answer"].strip(" *_")
    return (answer[:-1] if _STOP.fullmatch(answer) else answer) or None


def read_reply(text: str) -> tuple[str, str] | None:
    """Reasoning and answer of a reply in whatever layout a reasoner has; None where there is no answer.

    With think tags the reasoning is what stands between them (a template may have opened them already), else all that
    stands before the answer. Tags inside it are left out, for they would end it.
    """
    answer = answer_in(text)
    head, closed, tail = text.rpartition("</think>")
    if answer is None or (not closed and "<think>" in text):
        return None
    if closed:
        thought = head.partition("<think>")[2] if "<think>" in head else head
    else:
        thought = tail.partition("<answer>")[0]
        lines = list(_ANSWER_LINE.finditer(thought))
        thought = thought[: lines[-1].start()] if lines and "<answer>" not in tail else thought
    return _TAGS.sub("", thought).strip(), _TAGS.sub("", answer).strip()


def cut_reflection(text: str, answer: str | None = None, phrases: Sequence[str] = PHRASES) -> str:
    """The reasoning up to where it had its answer and began to doubt, without reflections that only repeat.

    A sentence that begins with one of ``phrases`` is a cut point. Where one of the two sentences before it states the
    answer, the text ends there. Of what is left, a part that follows a cut point is taken out when most of it has
    been said before, unless the answer is stated in no other. Sentences stay as they are, in their order.
    """
    parts = _parts(text, phrases)
    wanted = _needle(answer)
    for number, part in enumerate(parts[:-1]):
        if any(_states(one, wanted) for one in part[-_NEAR:]):
            parts = parts[: number + 1]
            break
    kept = [parts[0]] if parts else []
    for number, part in enumerate(parts[1:], start=1):
        last = number == len(parts) - 1 and any(_states(one, wanted) for one in part)
        if last or not _said_before(part, kept):
            kept.append(part)
    return "".join(one for part in kept for one in part).strip()


def _parts(text: str, phrases: Sequence[str]) -> list[list[str]]:
    """Sentences, with the space behind them, in parts that each begin at a cut point (the first one anywhere)."""
    point = re.compile(rf"\s*{_LEAD}(?:{'|'.join(map(re.escape, phrases))})(?!\w)", re.I) if phrases else None
    parts: list[list[str]] = []
    for sentence in sentences(text):
        if not parts or (point is not None and point.match(sentence)):
            parts.append([])
        parts[-1].append(sentence)
    return parts


def _needle(answer: str | None) -> re.Pattern[str] | None:
    """A pattern for a sentence that states the answer: whole words, any case but for a single letter's."""
    bare = normalise(unboxed(answer or ""))
    if not bare or len(bare) > _SEVERAL:
        return None
    case = 0 if len(bare) == 1 and bare.isalpha() else re.I
    text = unboxed(answer).strip(" .,;:!?\"'`$") if not case else bare
    return re.compile(rf"(?<![\w.,]){re.escape(text)}(?!\w|[.,]\d)", case)


def _states(sentence: str, wanted: re.Pattern[str] | None) -> bool:
    """Whether a sentence states the answer; "Step 1", "Figure 1" and a bare "1." of a list do not."""
    if wanted is None:
        return False
    return any(
        not _COUNTS.search(text[: found.start()]) and text.strip(" \n*#()[].:") != found[0]
        for text in (sentence, fold(sentence))
        for found in wanted.finditer(text)
    )


def _said_before(part: Sequence[str], kept: Iterable[Sequence[str]]) -> bool:
    said = _grams(words(" ".join(one for other in kept for one in other)))
    new = _grams(words(" ".join(part)))
    return not new or sum(one in said for one in new) / len(new) >= _KNOWN_SHARE


def _grams(tokens: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(tokens[at : at + _KNOWN_GRAM]) for at in range(len(tokens) - _KNOWN_GRAM + 1)}


@dataclass(frozen=True)
class Cleaned:
    """A trace's reasoning after hygiene: one text per reply; ``reason`` says why it is no trace, None where it is.

    ``words``: of the reasoning after the cut; ``removed``: by it.
    """

    texts: list[str]
    reason: str | None
    words: int
    removed: int


@dataclass(frozen=True)
class Hygiene:
    """Rules for traces.

    Args:
        cut: cut reflection (:func:`cut_reflection`).
        phrases: what a cut point begins with.
        as_seen: "the description says" becomes "the picture shows", for reasoning from a caption.
        min_words, max_words: of the reasoning of all replies, after the cut.
        max_foreign: largest share of letters in another script than question and answer.
        max_repeats: largest share of 6-word sequences that occur again.
        max_same_line: how often one line or sentence of three or more words may stand there.
        dedupe: leave out a trace whose question and replies have been kept already.
    """

    cut: bool = True
    phrases: tuple[str, ...] = field(default=PHRASES)
    as_seen: bool = False
    min_words: int = 1
    max_words: int | None = 500
    max_foreign: float = 0.1
    max_repeats: float = 0.2
    max_same_line: int = 3
    dedupe: bool = True

    as_dict = asdict

    @classmethod
    def of(cls, settings: Mapping[str, Any], option: str = "--hygiene", **usual: Any) -> Hygiene:
        """Rules from JSON settings over ``usual`` ones. Raises ConfigError for an unknown name or a wrong value."""
        known = {one.name: one.default for one in fields(cls)}
        for name, value in settings.items():
            if name not in known:
                raise ConfigError(f"{option} has {name!r}, which is unknown.{did_you_mean(name, known)}")
            default = known[name]
            if isinstance(default, tuple):
                good = isinstance(value, list) and all(isinstance(one, str) and one.strip() for one in value)
            elif isinstance(default, bool):
                good = isinstance(value, bool)
            elif isinstance(default, float):
                good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
            else:
                good = type(value) is int and value >= 0 or (value is None and name == "max_words")
            if not good:
                raise ConfigError(f"{option}: {name} is {value!r}; the default is {default!r}, write something alike.")
        rules = cls(**{**usual, **settings})
        rules = replace(rules, phrases=tuple(rules.phrases))
        if rules.max_words is not None and rules.max_words < rules.min_words:
            raise ConfigError(
                f"{option}: max_words {rules.max_words} is below min_words {rules.min_words}; swap them."
            )
        return rules

    def clean(self, texts: Sequence[str], question: str, answers: Sequence[str], answer: str | None) -> Cleaned:
        """Reasoning of each reply, cut, and whether it is fit to be taught.

        ``answers``: accepted ones; ``answer``: the one that the trace gives.
        """
        before = sum(len(words(text)) for text in texts)
        cleaned = list(texts)
        if self.cut:
            given = [None] * (len(texts) - 1) + [answer]
            cleaned = [cut_reflection(text, one, self.phrases) for text, one in zip(texts, given, strict=True)]
        count = sum(len(words(text)) for text in cleaned)
        if self.as_seen and not mentions_description(question):
            cleaned = [seen(text) for text in cleaned]
        reason = self._reason("\n".join(cleaned), count, question, answers)
        return Cleaned(cleaned, reason, count, before - count)

    def _reason(self, whole: str, count: int, question: str, answers: Sequence[str]) -> str | None:
        if count < self.min_words:
            return "too_short"
        if repeated_share(whole) > self.max_repeats:
            return "repeats"
        lines = Counter(" ".join(words(one)) for one in sentences(whole))
        if any(times > self.max_same_line and line.count(" ") >= 2 for line, times in lines.items()):
            return "loops"
        if self.max_words is not None and count > self.max_words:
            return "too_long"
        if foreign_share(whole, " ".join([question, *answers])) > self.max_foreign:
            return "foreign_language"
        return None


def trace_print(question: str, replies: Sequence[str]) -> str:
    """What tells traces apart: a hash of question and replies, word by word (16 hex digits)."""
    text = "\n".join(" ".join(words(one)) for one in (question, *replies))
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


_THOUGHT = re.compile(r"<think>(.*?)</think>", re.S)


def clean_replies(rollout: Rollout, rules: Hygiene) -> tuple[list[str], Cleaned]:
    """The replies of a finished episode with their reasoning cleaned, and what was found.

    Only what stands in a pair of think tags is rewritten; in a dialogue with boxes inside its reasoning nothing is,
    and the rules look at all of it.
    """
    replies = [turn.text for turn in rollout.turns]
    thoughts = [_THOUGHT.search(text) for text in replies]
    row = rollout.row
    if not all(thoughts):
        looked = replace(rules, cut=False, as_seen=False)
        said = [_TAGS.sub(" ", text) for text in replies]
        return replies, looked.clean(said, row["question"], row["answer"], rollout.answer)
    cleaned = rules.clean([one[1] for one in thoughts], row["question"], row["answer"], rollout.answer)
    texts = [
        reply[: one.start(1)] + text + reply[one.end(1) :] if text != one[1] else reply
        for reply, one, text in zip(replies, thoughts, cleaned.texts, strict=True)
    ]
    return texts, cleaned
