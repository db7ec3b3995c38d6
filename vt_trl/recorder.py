"""What a trainer writes down between two logs, for training and evaluation apart, and how processes add it up."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object

from vt_trl.groups import Group
from vt_trl.metrics import MetricBook, RolloutRecord, mean, summarise, unique_by_id


class Recorder:
    """Records of rollouts and named numbers (seconds, counts of a judge) since the last log."""

    def __init__(self, accelerator: Accelerator, reward_names: Sequence[str]):
        self.accelerator = accelerator
        self.reward_names = list(reward_names)
        self.last_records: list[RolloutRecord] = []  # of the groups in the latest batch
        self._books: dict[str, MetricBook] = defaultdict(MetricBook)
        self._groups_seen = 0

    def add_groups(self, mode: str, groups: Sequence[Group]) -> list[RolloutRecord]:
        """Record this process's groups; returns one record per rollout, in order."""
        records = []
        for group in groups:
            name = f"{self.accelerator.process_index}/{self._groups_seen}"
            self._groups_seen += 1
            for index, rollout in enumerate(group.rollouts):
                correct = group.correct[index].item()
                records.append(
                    RolloutRecord.of(
                        rollout,
                        group=name,
                        correct=None if math.isnan(correct) else correct > 0.5,
                        reward=group.reward[index].item(),
                        penalty=group.penalty[index].item(),
                        advantage=group.advantage[index].item(),
                        parts=dict(zip(self.reward_names, group.parts[index].tolist(), strict=True)),
                    )
                )
        self._books[mode].records += records
        return records

    def add_numbers(self, mode: str, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._books[mode].timings[name].append(value)

    def numbers_of(self, mode: str, name: str) -> list[float]:
        """What was added under ``name`` since the last log, on this process."""
        return self._books[mode].timings[name]

    def take(self, mode: str, count_rows_once: bool) -> dict[str, float]:
        """Means over all processes since the last call, which is a collective; the book is empty afterwards.

        ``count_rows_once``: a distributed sampler repeats rows to fill the last batch, and they must not count twice.
        """
        book = self._books[mode]
        records = list(gather_object(book.records))  # alone, it is the very list that is cleared below
        timings: dict[str, list[float]] = defaultdict(list)
        for one in gather_object([dict(book.timings)]):
            for name, values in one.items():
                timings[name] += values
        book.clear()
        if not records:
            return {}
        records = unique_by_id(records) if count_rows_once else records
        return summarise(records) | {name: mean(values) for name, values in timings.items() if values}
