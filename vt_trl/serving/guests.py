"""The rollout loop with an open door: rows that arrive one by one join the next round of turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from vt_trl.chat import Encoded
from vt_trl.generation.base import Sample, SamplingSettings
from vt_trl.rollout import Episode, RolloutRunner
from vt_trl.types import Rollout, Turn


@dataclass(eq=False)
class Guest:
    """A row that joins rollouts under way, and what it is told.

    ``tell`` is called with the prompt once the row has started, with each turn, and last with the rollout or an error.
    ``sampled``: tokens it may sample in all its turns, when that is less than the runner's limits allow.
    ``given_up``: set from any thread; no further turn is sampled then.
    """

    row: dict[str, Any]
    tell: Callable[[Encoded | Turn | Rollout | Exception], Any]
    sampled: int | None = None
    given_up: bool = False


Arrivals = Callable[[], Iterable[Guest]]


class GuestRunner(RolloutRunner):
    """Episodes as in training, one per guest: same start, turns and end, and so the same tokens."""

    @classmethod
    def of(cls, runner: RolloutRunner) -> GuestRunner:
        return cls(runner.environment, runner.backend, runner.encoder, runner.stop_ids, runner.limits)

    def play(self, arrivals: Arrivals, settings: SamplingSettings) -> None:
        """Play every guest who arrives, until nobody is under way and nobody waits.

        ``arrivals`` is asked for those who wait at the start and after each turn of anybody. They join the next round
        of turns, or with a backend that interleaves the turns under way. What the backend raises ends all.
        """
        under_way: dict[int, tuple[Guest, Episode]] = {}
        numbers = itertools.count()
        self.backend.begin(settings)
        try:
            self._admit(arrivals(), under_way, numbers, settings.seed)
            for sample in self.backend.completed():
                guest, episode = under_way[sample.request_id]
                if not guest.given_up and self._goes_on(episode, sample):
                    self._submit(sample.request_id, episode, settings.seed)
                elif guest.given_up or self._play_on(sample, guest, episode, settings.seed):
                    del under_way[sample.request_id]
                    self.encoder.features.forget(episode.images)
                self._admit(arrivals(), under_way, numbers, settings.seed)
        finally:
            self.backend.end()
            self.encoder.features.clear()

    def _admit(
        self,
        guests: Iterable[Guest],
        under_way: dict[int, tuple[Guest, Episode]],
        numbers: Iterator[int],
        seed: int | None,
    ) -> None:
        for guest in guests:
            if guest.given_up:
                continue
            limits = self.limits if guest.sampled is None else replace(self.limits, sampled=guest.sampled)
            try:
                (episode,) = self._start(guest.row, 1, limits)
            except Exception as error:  # one guest's bad picture is no harm to the others
                guest.tell(error)
                continue
            number = next(numbers)
            under_way[number] = guest, episode
            guest.tell(episode.prompt)
            self._submit(number, episode, seed)

    def _play_on(self, sample: Sample, guest: Guest, episode: Episode, seed: int | None) -> bool:
        """Whether the guest's rollout has ended with this turn."""
        try:
            done = self._advance(episode, sample)
        except Exception as error:
            guest.tell(error)
            return True
        guest.tell(episode.turns[-1])
        if done is None:
            self._submit(sample.request_id, episode, seed)
            return False
        guest.tell(self._record(episode, done))
        return True
