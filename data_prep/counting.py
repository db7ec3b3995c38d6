"""Counting right answers of rows in both ways of a selection, by the rollout loop and the judges of training."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from data_prep.kinds import Kind, Rule
from data_prep.ways import LOOKS, RESOLUTIONS, WAY, Ways, ways_of
from data_prep.work import digest
from data_prep.writers import Steered
from vt_trl.boxes import Sight
from vt_trl.data import episode_row
from vt_trl.envs import DirectEnv, Environment, make_environment
from vt_trl.envs.base import system, user
from vt_trl.errors import ConfigError, DataError
from vt_trl.generation.base import SamplingSettings
from vt_trl.judges import JudgeReward
from vt_trl.judges.base import Judgement, Verdict
from vt_trl.metrics import mean
from vt_trl.prompts import DIRECT_PROMPTS
from vt_trl.rollout import RolloutRunner
from vt_trl.transcripts.looks import looks_of
from vt_trl.types import Done, Observation, Rollout

_SHOWN = 3  # reasons of failed verdicts kept per row


@dataclass(frozen=True)
class RowCount:
    """What became of one row. ``number`` from 0 in the data set; lists are in the order of the rollouts.

    By way, the one that sees less first: ``answers`` (what stood in the answer tags, None for nothing), ``verdicts``
    (right, wrong, failed), ``statuses`` (how many rollouts ended how), ``tokens`` (mean of visual tokens, rounded),
    ``looked`` (how many rollouts were shown more than the opening), and ``sampled`` (a digest of all sampled tokens,
    equal where a row was sampled alike). ``parts``: where rollouts looked in the pictures of the opening, as
    ``[picture, rollout, left, top, right, bottom]`` in shares of the picture's sides, all but the last counted from 0.
    ``error`` says why the row could not be used, ``failures`` why verdicts could not be had (the first few).
    """

    number: int
    id: str
    source: str
    error: str = ""
    answers: dict[str, list[str | None]] = field(default_factory=dict)
    verdicts: dict[str, list[str]] = field(default_factory=dict)
    statuses: dict[str, dict[str, int]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    looked: dict[str, int] = field(default_factory=dict)
    sampled: dict[str, str] = field(default_factory=dict)
    parts: list[list[float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def right(self, way: str) -> int:
        return self.verdicts.get(way, []).count(Verdict.RIGHT.value)

    def kind(self, rule: Rule) -> Kind:
        if self.error:
            return Kind.BAD_ROW
        if any(Verdict.FAILED.value in verdicts for verdicts in self.verdicts.values()):
            return Kind.JUDGE_FAILED
        return rule.kind(*map(self.right, self.verdicts))

    as_dict = asdict


def both_ways(
    environment: str, settings: Mapping[str, Any], sight: Sight | None = None, steer: bool = True
) -> Callable[[], Environment]:
    """A factory of environments that play whichever way the row names. Raises ConfigError for wrong settings.

    ``steer``: ask for a look in words, as when traces are written; a base model may not know that it can.
    """
    if ways_of(environment) is RESOLUTIONS:
        if environment == "resize":  # whose texts are those of a tool
            settings = {name: value for name, value in settings.items() if name != "prompts"}
        make_environment("direct", settings)
        return partial(BothViews, **settings)
    plain = make_environment(environment, settings, sight)
    if plain().max_turns < 2:
        raise ConfigError(
            f"environment is {environment!r}, which has one turn, so nothing can be looked at again in it; leave "
            f"--environment out to compare resolutions."
        )
    return lambda: BothWays(plain(), steer)


class BothViews(Environment):
    """One turn on the view that the row names: ``direct`` at low and at full resolution in one pass."""

    any_pictures = True

    def __init__(self, **settings: Any):
        self.direct = {view: DirectEnv(view, **settings) for view in RESOLUTIONS.names}
        self.max_image_pixels = self.direct["full"].max_image_pixels

    def reset(self, row: Mapping[str, Any]) -> Observation:
        return self.direct[row[WAY]].reset(row)

    def step(self, reply: str, truncated: bool = False) -> Done:
        return self.direct["full"].step(reply, truncated)  # a single turn reads the same at either resolution


class BothWays(Environment):
    """An environment's opening pictures with the texts of ``direct`` and one turn, or the environment itself."""

    def __init__(self, plain: Environment, steer: bool):
        self.looking: Environment = Steered(plain) if steer else plain
        self.max_turns, self.max_image_pixels = plain.max_turns, plain.max_image_pixels
        self.any_pictures, self.max_pictures = plain.any_pictures, plain.max_pictures
        self.direct, self.at_once = DirectEnv(), False

    @property
    def max_images(self) -> int:
        return self.looking.max_images

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return () if self.at_once else self.looking.stop_texts

    def goes_on(self, text: str) -> bool:
        return not self.at_once and self.looking.goes_on(text)

    def reset(self, row: Mapping[str, Any]) -> Observation:
        self.at_once = row[WAY] == LOOKS.less
        opening = self.looking.reset({**row, "needs_full": True})
        if not self.at_once:
            return opening
        images = [image for message in opening.messages for image in message.images]
        gap = "\n" if images else ""
        return self.show(system(DIRECT_PROMPTS.system), user(*images, gap, DIRECT_PROMPTS.question(row["question"])))

    def step(self, reply: str, truncated: bool = False) -> Observation | Done:
        return (self.direct if self.at_once else self.looking).step(reply, truncated)

    def fork(self) -> Environment:
        twin = copy.copy(self)
        twin.looking = self.looking.fork()
        return twin


def count_rows(
    runner: RolloutRunner,
    rows: Sequence[tuple[int, Mapping[str, Any]]],
    rollouts: int,
    settings: SamplingSettings,
    judge: JudgeReward,
    ways: Ways,
) -> list[RowCount]:
    """Counts of rows as stored, ``(number, row)``, in their order; ``runner`` plays both ``ways``.

    All rollouts of all rows in both ways are under way at once, and a remote judge begins with the first that
    ends. Rows that cannot be used come back with ``error``. Raises JudgeOutage when too many verdicts fail.
    """
    runner.encoder.features.clear()
    most = runner.environment().max_pictures
    errors: dict[int, str] = {}
    episodes: list[dict[str, Any]] = []
    for place, (_, row) in enumerate(rows):
        try:
            decoded = episode_row(row, most)
        except DataError as error:
            errors[place] = error.reason
        else:
            episodes += [{**decoded, "place": place, WAY: way} for way in ways.names]
    finished = runner.run(
        episodes,
        rollouts,
        settings,
        on_finished=judge.start,
        on_refused=lambda row, error: errors.setdefault(row["place"], error.reason),
    )
    judgements = judge.judged(finished)
    groups: dict[tuple[int, str], list[tuple[Rollout, Judgement]]] = {}
    for rollout, judgement in zip(finished, judgements, strict=True):
        groups.setdefault((rollout.row["place"], rollout.row[WAY]), []).append((rollout, judgement))
    return [
        _row_count(number, row, errors.get(place, ""), {way: groups.get((place, way), []) for way in ways.names})
        for place, (number, row) in enumerate(rows)
    ]


def _row_count(
    number: int, row: Mapping[str, Any], error: str, members: dict[str, list[tuple[Rollout, Judgement]]]
) -> RowCount:
    count = RowCount(number, str(row.get("id", "")), str(row.get("data_source") or ""), error)
    if error:
        return count
    for way, pairs in members.items():
        count.answers[way] = [rollout.answer for rollout, _ in pairs]
        count.verdicts[way] = [judgement.verdict.value for _, judgement in pairs]
        count.statuses[way] = dict(sorted(Counter(rollout.status.value for rollout, _ in pairs).items()))
        count.tokens[way] = round(mean(rollout.visual_tokens for rollout, _ in pairs))
        count.looked[way] = sum(rollout.asked for rollout, _ in pairs)
        count.sampled[way] = digest(*(turn.token_ids for rollout, _ in pairs for turn in rollout.turns))
        count.failures.extend(j.detail for _, j in pairs if j.verdict is Verdict.FAILED)
        for member, (rollout, _) in enumerate(pairs):
            count.parts.extend(_parts(rollout, member))
    del count.failures[_SHOWN:]
    return count


def _parts(rollout: Rollout, member: int) -> list[list[float]]:
    """Where it looked in the pictures of its opening."""
    opening = sum(len(one.images) for one in rollout.messages[: rollout.prompt_messages])
    return [
        [picture, member, part.left, part.top, part.right, part.bottom]
        for picture, parts in looks_of(rollout)[1].items()
        for part in parts
        if picture < opening
    ]
