"""What a benchmark suite asks and what it gets back: chat messages to rows, rollouts to plain answers, and a tally.

Knows no suite's package, so that every adapter shares it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vt_trl.errors import DataError
from vt_trl.images import load_image
from vt_trl.metrics import mean
from vt_trl.rewards.accuracy import unboxed
from vt_trl.types import Rollout, RolloutStatus

LIMITS = ("max_new_tokens", "max_tokens", "max_gen_toks", "until", "stop")  # would cut the reasoning off
SAMPLING = ("temperature", "top_p", "top_k", "num_beams", "do_sample")


def question_row(messages: Sequence[Mapping[str, Any]], id: str, max_pictures: int) -> dict[str, Any]:
    """The row of a question in chat messages, whose content is a text or a list of ``text`` and ``image`` parts.

    Pictures come first, in their order. Where texts stand between them, ``<image 1>`` and so on say in the text where
    each was. A system message joins the question: the system text of an episode is the environment's own.

    Raises:
        DataError: for a part that is neither text nor picture, a picture that cannot be read or more than
            ``max_pictures`` of them, an earlier turn of the assistant, or no text at all.
    """
    texts: list[str] = []
    images: list[Image.Image] = []
    marks: list[int] = []  # where in ``texts`` a picture stood
    try:
        for part in _parts(messages):
            if isinstance(part, str):
                texts.append(part)
            else:
                images.append(load_image(part["url"] if "url" in part else part.get("image")))
                marks.append(len(texts))
        if len(images) > max_pictures:
            raise DataError(f"the question has {len(images)} pictures, above max_pictures={max_pictures}; raise it")
        question = _question(texts, marks)
    except DataError as error:
        raise error.at(id=id) from error
    return {
        "id": id,
        "image": images[0] if images else None,
        "images": images,
        "question": question,
        "answer": [],
        "data_source": id.partition("/")[0],
    }


def _parts(messages: Sequence[Mapping[str, Any]]) -> list[str | Mapping[str, Any]]:
    """Texts, and the mappings of pictures."""
    found: list[str | Mapping[str, Any]] = []
    for message in messages:
        if message["role"] not in ("system", "user"):
            raise DataError(f"it has a turn of the {message['role']}; only single questions can be asked")
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                found.append(part["text"])
            elif part["type"] == "image":
                found.append(part)
            else:
                raise DataError(f"it has a part of type {part['type']!r}; only texts and pictures can be shown")
    return found


def _question(texts: Sequence[str], marks: Sequence[int]) -> str:
    spoken = [number for number, text in enumerate(texts) if text.strip()]
    if not spoken:
        raise DataError("the question is empty or no text")
    if len(set(marks)) > 1:  # texts stand between pictures
        pieces = []
        for number in range(len(texts) + 1):
            pieces += [f"<image {index}>" for index, mark in enumerate(marks, start=1) if mark == number]
            pieces += texts[number : number + 1]
        return "\n".join(piece.strip() for piece in pieces if piece.strip())
    return "\n".join(texts[number].strip() for number in spoken)


def lifted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a task's generation settings those that are not used: limits that cut reasoning, and how to sample."""
    return {name: settings[name] for name in (*LIMITS, *SAMPLING) if settings.get(name) not in (None, [], "")}


def plain_answer(rollout: Rollout, unbox: bool = True) -> str:
    r"""What a benchmark scores: the text in the answer tags, of ``\boxed{}`` its content if ``unbox``.

    A reply without tags (a model that was not trained for them) counts as it is, without its reasoning; a turn that
    was cut, a call that led nowhere and reasoning without an end are no answer: "".
    """
    text = rollout.answer
    if text is None:
        text = _untagged(rollout.turns[-1].text) if rollout.status is RolloutStatus.NO_ANSWER else ""
    return unboxed(text).strip() if unbox else text.strip()


def _untagged(text: str) -> str:
    before, end, after = text.rpartition("</think>")
    text = after if end else before or text
    return "" if "<think>" in text else text.replace("<answer>", "").replace("</answer>", "").strip()


@dataclass
class Tally:
    """What became of the questions of a run; :meth:`summary` says it in one line."""

    asked: int = 0
    visual_tokens: list[int] = field(default_factory=list)
    generated_tokens: int = 0
    seconds: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    refused: list[DataError] = field(default_factory=list)

    def add(self, outcome: Rollout | DataError) -> None:
        if isinstance(outcome, DataError):
            self.refused.append(outcome)
            return
        self.asked += outcome.asked
        self.visual_tokens.append(outcome.visual_tokens)
        self.generated_tokens += sum(outcome.loss_mask)
        self.statuses[outcome.status.value] += 1

    def summary(self) -> str:
        played = len(self.visual_tokens)
        ends = ", ".join(f"{count} {name}" for name, count in sorted(self.statuses.items())) or "none"
        share = f"{self.asked / played:.1%}" if played else "-"
        visual = f"{mean(self.visual_tokens):.1f}" if played else "-"
        return (
            f"{played} questions played ({ends}); looked again in {share}; {visual} visual tokens each; "
            f"{self.generated_tokens} tokens generated in {self.seconds:.1f} s; {len(self.refused)} not shown"
        )

    def refusals(self, shown: int = 5) -> str:
        """The questions that could not be shown and are answered with "", the first ones by name."""
        rest = len(self.refused) - shown
        more = f"\n  and {rest} more" if rest > 0 else ""
        listed = "\n".join(f"  {error}" for error in self.refused[:shown])
        what = f"{len(self.refused)} questions could not be shown; their answer is empty and scores as wrong"
        return f"{what}:\n{listed}{more}"
