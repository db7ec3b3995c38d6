"""Rows played and judged: one result per row, also for a row that could not be played or judged."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vt_trl.data import episode_row
from vt_trl.errors import DataError
from vt_trl.generation.base import SamplingSettings
from vt_trl.judges import Judgement, JudgeReward, Verdict
from vt_trl.metrics import mean
from vt_trl.rewards.accuracy import accuracy_reward
from vt_trl.rollout import RolloutRunner
from vt_trl.types import Rollout

UNREADABLE = "unreadable"  # status of a row that could not be shown: its picture, its question, or its length


@dataclass(frozen=True)
class RowResult:
    """What became of a row. ``correct`` None: the judge failed, or the row is unreadable; ``reason`` says why.

    ``status`` is a :class:`~vt_trl.types.RolloutStatus`, or ``unreadable``. ``prompt_tokens`` hold the visual ones
    of the first picture; ``generated_tokens`` are the sampled ones of all turns. ``digest`` is that of question,
    accepted answers and source.
    """

    id: str
    source: str
    status: str
    digest: str
    correct: bool | None = None
    verdict: str | None = None
    reason: str = ""
    asked: bool = False
    well_formed: bool = False
    visual_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    @property
    def readable(self) -> bool:
        return self.status != UNREADABLE


@dataclass(frozen=True)
class Evaluation:
    """Results in the order of the rows, their rollouts (None for an unreadable row), and seconds spent on playing."""

    results: list[RowResult]
    rollouts: list[Rollout | None]
    seconds: float

    def rate(self, name: str, source: str | None = None) -> float:
        """Mean of a result's field (``correct``, ``asked``, ``visual_tokens``), over one ``data_source`` or all.

        Unreadable rows, and for ``correct`` those without a verdict, are left out.
        """
        chosen = [one for one in self.results if one.readable and source in (None, one.source)]
        values = [getattr(one, name) for one in chosen]
        return mean(float(value) for value in values if value is not None)


@torch.no_grad()
def play_rows(
    runner: RolloutRunner,
    rows: Sequence[Mapping[str, Any]],
    settings: SamplingSettings | None = None,
    reward: JudgeReward | None = None,
    batch_size: int = 128,
    progress: Callable[[int], Any] = lambda count: None,
) -> Evaluation:
    """One rollout per row, greedy unless ``settings`` say otherwise, every row to the last one.

    Args:
        rows: as stored or decoded (:func:`vt_trl.data.episode_row`).
        reward: asks a judge (``make_judge_reward``); None: the rule of the reward ``accuracy``, which always decides.
        batch_size: rows that are in the air together.
        progress: called with the number of rows just finished.
    """
    settings = settings or SamplingSettings(temperature=0.0)
    example = runner.environment()
    most = sys.maxsize if example.any_pictures else example.max_pictures  # the environment's own limit is its word
    results: list[RowResult] = []
    rollouts: list[Rollout | None] = []
    seconds = 0.0
    for start in range(0, len(rows), batch_size):
        part = [rows[number] for number in range(start, min(start + batch_size, len(rows)))]
        outcomes, spent = play([_decoded(row, most) for row in part], runner, settings)
        results += _judge(part, outcomes, reward)
        rollouts += [one if isinstance(one, Rollout) else None for one in outcomes]
        seconds += spent
        progress(len(part))
    return Evaluation(results, rollouts, seconds)


@torch.no_grad()
def play(
    rows: Sequence[dict[str, Any] | DataError], runner: RolloutRunner, settings: SamplingSettings
) -> tuple[list[Rollout | DataError], float]:
    """A rollout per row that an environment can read, or why there is none; and the seconds of playing.

    A row that is an error already stays one.
    """
    outcomes: list[Any] = list(rows)
    ready = [number for number, one in enumerate(outcomes) if not isinstance(one, DataError)]
    refused: dict[int, DataError] = {}
    runner.encoder.features.clear()
    began = time.perf_counter()
    played = iter(
        runner.run(
            [outcomes[number] for number in ready],
            1,
            settings,
            on_refused=lambda row, error: refused.__setitem__(id(row), error),
        )
    )
    seconds = time.perf_counter() - began
    for number in ready:
        row = outcomes[number]
        outcomes[number] = refused[id(row)] if id(row) in refused else next(played)
    return outcomes, seconds


def _decoded(row: Mapping[str, Any], most_pictures: int) -> dict[str, Any] | DataError:
    try:
        return episode_row(row, most_pictures)
    except DataError as error:
        return error


def _judge(
    rows: Sequence[Mapping[str, Any]], outcomes: Sequence[Rollout | DataError], reward: JudgeReward | None
) -> list[RowResult]:
    played = [one for one in outcomes if isinstance(one, Rollout)]
    judgements = iter(_judgements(played, reward))
    results = []
    for row, outcome in zip(rows, outcomes, strict=True):
        known = {"id": str(row.get("id", "")), "source": str(row.get("data_source") or ""), "digest": digest(row)}
        if isinstance(outcome, DataError):
            results.append(RowResult(status=UNREADABLE, reason=outcome.reason, **known))
            continue
        judgement = next(judgements)
        results.append(
            RowResult(
                status=outcome.status.value,
                correct=None if judgement.verdict is Verdict.FAILED else judgement.verdict is Verdict.RIGHT,
                verdict=judgement.verdict.value,
                reason=judgement.detail,
                asked=outcome.asked,
                well_formed=outcome.well_formed,
                visual_tokens=outcome.visual_tokens,
                prompt_tokens=len(outcome.prompt_ids),
                generated_tokens=sum(outcome.loss_mask),
                **known,
            )
        )
    return results


def _judgements(rollouts: list[Rollout], reward: JudgeReward | None) -> list[Judgement]:
    if reward is not None:
        return reward.judged(rollouts) if rollouts else []
    scores = accuracy_reward([[] for _ in rollouts], [one.row["answer"] for one in rollouts], rollout=rollouts)
    return [Judgement.of(score > 0.5) for score in scores]


def digest(row: Mapping[str, Any]) -> str:
    """A hash of a row's question, accepted answers and source, the same on every machine."""
    return _hash(_texts(row))


def content_digest(row: Mapping[str, Any]) -> str:
    """The same with its pictures: their bytes, or for a file its path, size and time of change."""
    several = [_picture_digest(row, one) for one in row.get("images") or ()]
    return _hash(several) if several else _picture_digest(row, row.get("image"))


def _picture_digest(row: Mapping[str, Any], image: Any) -> str:
    image = image if isinstance(image, Mapping) else {"bytes": None, "path": image}
    data, path = image.get("bytes"), image.get("path")
    if data is not None:
        return _hash(_texts(row), bytes(data))
    if isinstance(path, str | Path) and Path(path).is_file():
        stat = Path(path).stat()
        return _hash([*_texts(row), str(path), stat.st_size, stat.st_mtime_ns])
    if hasattr(path, "tobytes"):
        return _hash(_texts(row), path.tobytes())
    return _hash([*_texts(row), str(path)])


def _texts(row: Mapping[str, Any]) -> list[Any]:
    return [row.get("question"), row.get("answer"), row.get("data_source")]


def _hash(values: Any, data: bytes = b"") -> str:
    text = json.dumps(values, default=str).encode()
    return hashlib.blake2b(text + b"\0" + data, digest_size=12).hexdigest()
