"""The record of one episode: plain texts, numbers and encoded pictures, free of tokens, tensors and the trainer."""

from __future__ import annotations

import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from PIL import Image

from vt_trl.envs.inline import boxes_in
from vt_trl.envs.reply import parse_reply
from vt_trl.metrics import RolloutRecord
from vt_trl.transcripts.looks import Part, looks_of
from vt_trl.types import ImagePart, Message, Rollout, Turn

LOSSLESS_PIXELS = 65_536  # smaller pictures are kept as PNG, to the bit; larger ones as JPEG
_JPEG_QUALITY = 90
UNDER_WAY = "under way"
_VERDICTS = {True: "right", False: "wrong", None: "not judged"}


@dataclass(frozen=True)
class Picture:
    """A picture of a turn: ``index`` into the transcript's images, standing before character ``at`` of the text.

    ``width`` and ``height`` are the pixels the model saw; the image kept may be smaller (:class:`PictureEncoder`).
    ``tokens``: its visual tokens, None where that is not known. ``look``: the number of the look that it shows, from
    1; ``parts``: what later looks showed of it, to be drawn on it.
    """

    index: int
    at: int
    width: int
    height: int
    tokens: int | None = None
    look: int | None = None
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class TranscriptTurn:
    """One message of the dialogue.

    ``role``: system, user, assistant or what an environment calls itself. ``status``: ``prompt``; ``sampled`` or
    ``cut`` (at the token limit) for a reply of the policy; ``told`` for what the environment answered. ``tokens``:
    sampled tokens of a reply. ``call``: the tool call of a reply as JSON; ``faults``: what was wrong with it.
    """

    role: str
    text: str
    status: str = "prompt"
    pictures: tuple[Picture, ...] = ()
    tokens: int | None = None
    call: str | None = None
    faults: tuple[str, ...] = ()

    @property
    def parts(self) -> list[str | Picture]:
        """Texts and pictures in their order; texts may be empty."""
        parts, start = [], 0
        for picture in self.pictures:
            parts += [self.text[start : picture.at], picture]
            start = picture.at
        return [*parts, self.text[start:]]


@dataclass(frozen=True)
class Transcript:
    """One episode. Every number that was not measured is None; ``images`` are encoded PNG or JPEG files.

    ``status`` is a value of :class:`vt_trl.types.RolloutStatus`, or ``under way``. ``asked``: a tool call was granted;
    ``attempted``: one was tried. ``correct`` None: nobody could tell. ``verdict`` and ``verdict_reason``: the judge's.
    ``rewards``: the parts before they are weighted, ``reward`` their weighted sum less ``penalty``. ``group`` is
    unique within a step; ``member`` counts from 0 in it. ``extra``: further named texts, such as a reward function's
    ``log_extra``.
    """

    turns: tuple[TranscriptTurn, ...]
    images: tuple[bytes, ...] = ()
    question: str = ""
    gold: tuple[str, ...] = ()
    answer: str | None = None
    status: str = ""
    asked: bool = False
    attempted: bool = False
    correct: bool | None = None
    verdict: str | None = None
    verdict_reason: str | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    penalty: float | None = None
    reward: float | None = None
    advantage: float | None = None
    visual_tokens: int = 0
    completion_tokens: int = 0
    id: str = ""
    source: str = ""
    mode: str = ""
    step: int | None = None
    group: str = ""
    member: int = 0
    detail: str = ""
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def judged(self) -> str:
        """``right``, ``wrong`` or ``not judged``."""
        return _VERDICTS[self.correct]

    @property
    def looks(self) -> int:
        """How many parts of pictures it was shown."""
        return sum(one.look is not None for turn in self.turns for one in turn.pictures)

    @property
    def finished(self) -> bool:
        return self.status != UNDER_WAY

    def _repr_html_(self) -> str:
        """How notebooks show it."""
        from vt_trl.transcripts.show import embed_transcript

        return embed_transcript(self)

    @classmethod
    def of(
        cls,
        rollout: Rollout,
        record: RolloutRecord | None = None,
        encoder: PictureEncoder | None = None,
        extra: Mapping[str, Any] | None = None,
        **where: Any,
    ) -> Transcript:
        """The transcript of a rollout; ``record``: its scores; ``where``: step, mode, member.

        ``verdict`` and ``verdict_reason`` are taken out of ``extra``.
        """
        encoder = encoder or PictureEncoder()
        extra = {name: None if value is None else plain(value) for name, value in (extra or {}).items()}
        gold = rollout.row.get("answer", ())
        return cls(
            turns=_turns(rollout),
            images=tuple(encoder(image) for image in rollout.images),
            question=plain(rollout.row.get("question", "")),
            gold=tuple(plain(one) for one in ([gold] if isinstance(gold, str) else gold)),
            answer=None if rollout.answer is None else plain(rollout.answer),
            status=UNDER_WAY if rollout.status is None else rollout.status.value,
            asked=rollout.asked,
            attempted=rollout.attempted,
            verdict=extra.pop("verdict", None),
            verdict_reason=extra.pop("verdict_reason", None),
            visual_tokens=rollout.visual_tokens,
            completion_tokens=len(rollout.completion_ids),
            id=plain("" if rollout.row.get("id") is None else rollout.row["id"]),
            source=plain(rollout.row.get("data_source") or ""),
            detail=plain(rollout.detail),
            extra={name: value for name, value in extra.items() if value is not None},
            **(_scores(record) if record is not None else {}),
            **where,
        )


def _scores(record: RolloutRecord) -> dict[str, Any]:
    return {
        "correct": record.correct,
        "rewards": {name: number(score) for name, score in record.parts.items()},
        "penalty": number(record.penalty),
        "reward": number(record.reward),
        "advantage": number(record.advantage),
        "group": record.group,
    }


def number(value: float | None) -> float | None:
    """None for NaN: a table, unlike a tensor, has a word for what could not be had."""
    return None if value is None or math.isnan(value) else float(value)


def plain(value: Any) -> str:
    """Text that every encoder takes: JSON can smuggle in lone surrogates, which become question marks."""
    return str(value).encode("utf-8", "replace").decode()


def _turns(rollout: Rollout) -> tuple[TranscriptTurn, ...]:
    tokens, replies, index = iter(tokens_per_image(rollout)), iter(rollout.turns), 0
    numbers, parts = looks_of(rollout)
    turns = []
    for position, message in enumerate(rollout.messages):
        prompt = position < rollout.prompt_messages
        reply = None if prompt or message.role != "assistant" else next(replies, None)
        text, pictures = _laid_out(message, index, tokens)
        pictures = tuple(replace(one, look=numbers.get(one.index), parts=parts.get(one.index, ())) for one in pictures)
        index += len(pictures)
        status = "prompt" if prompt else "told" if reply is None else "sampled" if reply.finished else "cut"
        own = {} if reply is None else _reply(reply)
        turns.append(TranscriptTurn(message.role, text, status, pictures, **own))
    return tuple(turns)


def _reply(turn: Turn) -> dict[str, Any]:
    call = parse_reply(turn.text).call
    said = None if call is None else plain(json.dumps({"name": call.name, "arguments": call.arguments}))
    if said is None:
        said = next(map(plain, boxes_in(turn.text)), None)  # a box inside the reasoning is a call, too
    return {"tokens": len(turn.token_ids), "call": said, "faults": tuple(fault.value for fault in turn.faults)}


def _laid_out(message: Message, index: int, tokens: Iterable[int]) -> tuple[str, tuple[Picture, ...]]:
    """A message's text without markers, and its pictures with their places in it."""
    text, pictures, tokens = "", [], iter(tokens)
    for part in message.parts:
        if isinstance(part, ImagePart):
            width, height = part.image.size
            pictures.append(Picture(index + len(pictures), len(text), width, height, next(tokens, None)))
        else:
            text += plain(part.text)
    return text, tuple(pictures)


def tokens_per_image(rollout: Rollout) -> list[int]:
    """Visual tokens of each picture of a rollout, read off the runs of the placeholder in its ids.

    The placeholder is the id that occurs ``visual_tokens`` times in as many runs as there are pictures. Where that is
    ambiguous, the tokens are shared out by area.
    """
    runs: dict[int, list[int]] = defaultdict(list)
    for token, run in groupby([*rollout.prompt_ids, *rollout.completion_ids]):
        runs[token].append(len(list(run)))
    wanted = len(rollout.images), rollout.visual_tokens
    found = {tuple(lengths) for lengths in runs.values() if (len(lengths), sum(lengths)) == wanted}
    if len(found) == 1:
        return list(found.pop())
    areas = [image.width * image.height for image in rollout.images]
    return [round(rollout.visual_tokens * area / sum(areas)) for area in areas]


class PictureEncoder:
    """Pictures as files: PNG up to 65,536 pixels, else JPEG; larger ones than ``max_pixels`` are shrunk and counted.

    Each picture object is encoded once, so that the members of a group share their bytes.
    """

    def __init__(self, max_pixels: int | None = None):
        self.max_pixels = max_pixels
        self.shrunk = 0
        self._done: dict[int, tuple[Image.Image, bytes]] = {}  # with the picture, so that no other one takes its id

    def __call__(self, image: Image.Image) -> bytes:
        if id(image) not in self._done:
            self._done[id(image)] = image, self._encode(image)
        return self._done[id(image)][1]

    def _encode(self, image: Image.Image) -> bytes:
        pixels = image.width * image.height
        if self.max_pixels is not None and pixels > self.max_pixels:
            self.shrunk += 1
            factor = math.sqrt(self.max_pixels / pixels)
            image = image.resize([max(1, math.floor(side * factor)) for side in image.size], Image.Resampling.LANCZOS)
        file = io.BytesIO()
        if image.width * image.height <= LOSSLESS_PIXELS:
            image.save(file, "PNG")
        else:
            image.convert("RGB").save(file, "JPEG", quality=_JPEG_QUALITY)
        return file.getvalue()
