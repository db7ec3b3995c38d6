"""What a trainer writes down between two logs, for training and evaluation apart, and how processes add it up."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from vt_trl.metrics import MetricBook, RolloutRecord, mean, summarise, unique_by_id
from vt_trl.types import Rollout


class Recorder:
    """Records of rollouts and named numbers (seconds, counts of a judge) since the last log."""

    def __init__(self, accelerator: Accelerator, reward_names: Sequence[str]):
        self.accelerator = accelerator
        self.reward_names = list(reward_names)
        self.last_records: list[RolloutRecord] = []
        self._books: dict[str, MetricBook] = defaultdict(MetricBook)
        self._groups_seen = 0

    def add_rollouts(
        self, mode: str, rollouts: Sequence[Rollout], scored: Mapping[str, torch.Tensor], group_size: int
    ) -> list[RolloutRecord]:
        """Records of this process's rollouts, (N,) in group order; ``scored`` as ``VTGRPOTrainer._score`` gives it."""
        rank, records = self.accelerator.process_index, []
        for index, rollout in enumerate(rollouts):
            correct = scored["correct"][index].item()
            records.append(
                RolloutRecord.of(
                    rollout,
                    group=f"{rank}/{self._groups_seen + index // group_size}",
                    correct=None if math.isnan(correct) else correct > 0.5,
                    reward=scored["reward"][index].item(),
                    penalty=scored["penalty"][index].item(),
                    advantage=scored["advantage"][index].item(),
                    parts=dict(zip(self.reward_names, scored["parts"][index].tolist(), strict=True)),
                )
            )
        self._groups_seen += len(rollouts) // group_size
        self._books[mode].records += records
        self.last_records = records
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
