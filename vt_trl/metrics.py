"""What is counted about rollouts, and how it is averaged: one pure function for training, evaluation and reports."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vt_trl.types import Fault, Rollout, RolloutStatus

ZERO_STD = 1e-4  # as in VisionThink's group filter


@dataclass
class RolloutRecord:
    """The numbers of one scored rollout. ``correct`` is None when the correctness reward could not decide."""

    id: str
    group: str
    source: str
    status: str
    faults: list[str]
    asked: bool
    attempted: bool
    correct: bool | None
    well_formed: bool
    reward: float
    penalty: float
    advantage: float
    parts: dict[str, float]  # reward name -> score (NaN: none)
    visual_tokens: int
    images: int
    completion_tokens: int
    sampled_tokens: int

    @classmethod
    def of(cls, rollout: Rollout, group: str, correct: bool | None = None, **numbers: Any) -> RolloutRecord:
        return cls(
            id="" if rollout.row.get("id") is None else str(rollout.row["id"]),
            group=group,
            source=str(rollout.row.get("data_source") or ""),
            status=rollout.status.value,
            faults=[fault.value for fault in rollout.faults],
            asked=rollout.asked,
            attempted=rollout.attempted,
            correct=correct,
            well_formed=rollout.well_formed,
            visual_tokens=rollout.visual_tokens,
            images=len(rollout.images),
            completion_tokens=len(rollout.completion_ids),
            sampled_tokens=sum(rollout.loss_mask),
            **{"reward": 0.0, "penalty": 0.0, "advantage": 0.0, "parts": {}} | numbers,
        )


def mean(values: Iterable[float]) -> float:
    """Mean without NaN; NaN of nothing."""
    known = [float(value) for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _accuracy(records: Iterable[RolloutRecord]) -> float:
    return mean(float(record.correct) for record in records if record.correct is not None)


def _std(values: Sequence[float]) -> float:
    centre = mean(values)
    return math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def summarise(records: Sequence[RolloutRecord]) -> dict[str, float]:
    """Named means over rollouts; names without a value (no sample asked, say) are left out."""
    asked = [record for record in records if record.asked]
    direct = [record for record in records if not record.asked]
    statuses = Counter(record.status for record in records)
    faults = Counter(fault for record in records for fault in set(record.faults))
    numbers = {
        "reward": mean(record.reward for record in records),
        "reward_std": _std([record.reward for record in records if not math.isnan(record.reward)]),
        "accuracy": _accuracy(records),
        "accuracy_with_tool": _accuracy(asked),
        "accuracy_without_tool": _accuracy(direct),
        "request_rate": mean(float(record.asked) for record in records),
        "requests_succeeded": mean(float(record.asked) for record in records if record.attempted),
        "format_rate": mean(float(record.well_formed) for record in records),
        "penalty_mean": mean(record.penalty for record in records),
        "visual_tokens": mean(record.visual_tokens for record in records),
        "images": mean(record.images for record in records),
        "completions/mean_length": mean(record.completion_tokens for record in records),
        "completions/max_length": max((record.completion_tokens for record in records), default=math.nan),
        "completions/mean_sampled": mean(record.sampled_tokens for record in records),
        "completions/clipped_ratio": statuses[RolloutStatus.TRUNCATED] / max(len(records), 1),
        "unjudged": mean(float(record.correct is None) for record in records),
    }
    for status in RolloutStatus:
        numbers[f"status/{status.value}"] = statuses[status.value] / max(len(records), 1)
    for fault in Fault:
        if faults[fault.value]:
            numbers[f"fault/{fault.value}"] = faults[fault.value] / len(records)
    for name in sorted({name for record in records for name in record.parts}):
        numbers[f"rewards/{name}/mean"] = mean(record.parts.get(name, math.nan) for record in records)
    for source in sorted({record.source for record in records} - {""}):
        own = [record for record in records if record.source == source]
        numbers[f"request_rate/{source}"] = mean(float(record.asked) for record in own)
        numbers[f"accuracy/{source}"] = _accuracy(own)
    return {name: value for name, value in (numbers | _group_shares(records)).items() if not math.isnan(value)}


def _group_shares(records: Sequence[RolloutRecord]) -> dict[str, float]:
    """Shares of groups that are all right, all wrong, without variance, or where only one route was right."""
    members: dict[str, list[RolloutRecord]] = defaultdict(list)
    for record in records:
        members[record.group].append(record)
    groups = [group for group in members.values() if len(group) > 1]
    if not groups:
        return {}
    # A group with an undecided member is neither all right nor all wrong.
    right = [[record.correct for record in group] for group in groups if all(r.correct is not None for r in group)]
    tool = [any(r.correct and r.asked for r in group) for group in groups]
    plain = [any(r.correct and not r.asked for r in group) for group in groups]
    return {
        "groups/all_right": mean(float(all(group)) for group in right),
        "groups/all_wrong": mean(float(not any(group)) for group in right),
        "groups/all_well_formed": mean(float(all(r.well_formed for r in group)) for group in groups),
        "groups/any_request": mean(float(any(r.asked for r in group)) for group in groups),
        "groups/only_tool_right": mean(float(t and not p) for t, p in zip(tool, plain, strict=True)),
        "groups/only_direct_right": mean(float(p and not t) for t, p in zip(tool, plain, strict=True)),
        "groups/both_right": mean(float(t and p) for t, p in zip(tool, plain, strict=True)),
        "groups/dropped_unjudged": mean(float(any(math.isnan(r.reward) for r in group)) for group in groups),
        "frac_reward_zero_std": mean(float(_std([r.reward for r in group]) < ZERO_STD) for group in groups),
    }


@dataclass
class MetricBook:
    """Records and timings between two logs of one mode (train or eval)."""

    records: list[RolloutRecord] = field(default_factory=list)
    timings: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def clear(self) -> None:
        self.records.clear()
        self.timings.clear()


def unique_by_id(records: Iterable[RolloutRecord]) -> list[RolloutRecord]:
    """One record per row: a distributed sampler repeats rows to fill the last batch, and they must not count twice.

    Records without an id cannot be told apart and are all kept.
    """
    return list({record.id or index: record for index, record in enumerate(records)}.values())
