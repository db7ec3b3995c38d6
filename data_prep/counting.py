"""Counting right answers of rows at low and at full resolution, by the rollout loop and the judges of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from data_prep.kinds import Kind, Rule
from data_prep.work import digest
from vt_trl.data import episode_row
from vt_trl.envs import DirectEnv, Environment
from vt_trl.errors import DataError
from vt_trl.generation.base import SamplingSettings
from vt_trl.judges import JudgeReward
from vt_trl.judges.base import Judgement, Verdict
from vt_trl.rollout import RolloutRunner
from vt_trl.types import Done, Observation, Rollout

VIEWS = ("low", "full")
_VIEW = "view_shown"  # the key of an episode's row that says which
_SHOWN = 3  # reasons of failed verdicts kept per row


@dataclass(frozen=True)
class RowCount:
    """What became of one row. ``number`` from 0 in the data set; lists are in the order of the rollouts.

    By view: ``answers`` (what stood in the answer tags, None for nothing), ``verdicts`` (right, wrong, failed),
    ``statuses`` (how many rollouts ended how), ``tokens`` (visual tokens of the picture) and ``sampled`` (a digest of
    all sampled tokens, equal where a row was sampled alike). ``error`` says why the row could not be used,
    ``failures`` why verdicts could not be had (the first few).
    """

    number: int
    id: str
    source: str
    error: str = ""
    answers: dict[str, list[str | None]] = field(default_factory=dict)
    verdicts: dict[str, list[str]] = field(default_factory=dict)
    statuses: dict[str, dict[str, int]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    sampled: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def right(self, view: str) -> int:
        return self.verdicts.get(view, []).count(Verdict.RIGHT.value)

    def kind(self, rule: Rule) -> Kind:
        if self.error:
            return Kind.BAD_ROW
        if any(Verdict.FAILED.value in verdicts for verdicts in self.verdicts.values()):
            return Kind.JUDGE_FAILED
        return rule.kind(self.right("low"), self.right("full"))

    as_dict = asdict


class BothViews(Environment):
    """One turn on the view that the row names: ``direct`` at low and at full resolution in one pass."""

    def __init__(self, **settings: Any):
        self.direct = {view: DirectEnv(view, **settings) for view in VIEWS}
        self.rule = self.direct["full"].rule
        self.max_image_pixels = self.rule.max_pixels

    def reset(self, row: Mapping[str, Any]) -> Observation:
        return self.direct[row[_VIEW]].reset(row)

    def step(self, reply: str, truncated: bool = False) -> Done:
        return self.direct["full"].step(reply, truncated)  # a single turn reads the same at either resolution


def count_rows(
    runner: RolloutRunner,
    rows: Sequence[tuple[int, Mapping[str, Any]]],
    rollouts: int,
    settings: SamplingSettings,
    judge: JudgeReward,
) -> list[RowCount]:
    """Counts of rows as stored, ``(number, row)``, in their order; ``runner`` plays :class:`BothViews`.

    All rollouts of all rows at both resolutions are under way at once, and a remote judge begins with the first that
    ends. Rows that cannot be used come back with ``error``. Raises JudgeOutage when too many verdicts fail.
    """
    runner.encoder.features.clear()
    errors: dict[int, str] = {}
    episodes: list[dict[str, Any]] = []
    for place, (_, row) in enumerate(rows):
        try:
            decoded = episode_row(row)
        except DataError as error:
            errors[place] = error.reason
        else:
            episodes += [{**decoded, "place": place, _VIEW: view} for view in VIEWS]
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
        groups.setdefault((rollout.row["place"], rollout.row[_VIEW]), []).append((rollout, judgement))
    return [
        _row_count(number, row, errors.get(place, ""), {view: groups.get((place, view), []) for view in VIEWS})
        for place, (number, row) in enumerate(rows)
    ]


def _row_count(
    number: int, row: Mapping[str, Any], error: str, members: dict[str, list[tuple[Rollout, Judgement]]]
) -> RowCount:
    count = RowCount(number, str(row.get("id", "")), str(row.get("data_source") or ""), error)
    if error:
        return count
    for view, pairs in members.items():
        count.answers[view] = [rollout.answer for rollout, _ in pairs]
        count.verdicts[view] = [judgement.verdict.value for _, judgement in pairs]
        count.statuses[view] = dict(sorted(Counter(rollout.status.value for rollout, _ in pairs).items()))
        count.tokens[view] = pairs[0][0].visual_tokens
        count.sampled[view] = digest(*(turn.token_ids for rollout, _ in pairs for turn in rollout.turns))
        count.failures.extend(j.detail for _, j in pairs if j.verdict is Verdict.FAILED)
    del count.failures[_SHOWN:]
    return count
