"""What the counts of a row say about the resolution it needs (VisionThink, arXiv 2507.13348, Section 3.5), and a
balanced choice among the rows. Pure functions: no model, no file.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vt_trl.errors import ConfigError


class Kind(StrEnum):
    """What a row turned out to be. Only the first two are chosen from; the rest is counted."""

    LOW_IS_ENOUGH = "low_is_enough"  # every answer at either resolution was right
    NEEDS_FULL = "needs_full"  # clearly more right answers at full resolution
    NEITHER = "neither"
    JUDGE_FAILED = "judge_failed"  # at least one answer has no verdict, so the counts are not known
    BAD_ROW = "bad_row"  # the picture, the question or the answer cannot be used


@dataclass(frozen=True)
class Rule:
    """``rollouts`` per resolution, and by how many right answers full must beat low. The paper's: 8 and 6."""

    rollouts: int = 8
    margin: int = 6

    def __post_init__(self) -> None:
        if self.rollouts < 1:
            raise ConfigError(f"rollouts is {self.rollouts}; at least one per resolution is needed.")
        if not 1 <= self.margin <= self.rollouts:
            raise ConfigError(
                f"margin is {self.margin} with {self.rollouts} rollouts: full can beat low by 1 to {self.rollouts} "
                f"right answers. Set margin within that (the paper takes 6 of 8)."
            )

    def kind(self, low: int, full: int) -> Kind:
        """The kind of a row with that many right answers at low and at full resolution."""
        if low == full == self.rollouts:
            return Kind.LOW_IS_ENOUGH
        return Kind.NEEDS_FULL if full - low >= self.margin else Kind.NEITHER


@dataclass(frozen=True)
class Choice:
    """Row numbers chosen, in ascending order, and how many of each kind there were to choose from."""

    needs_full: tuple[int, ...]
    low_is_enough: tuple[int, ...]
    available: dict[str, int]
    wanted: int | None

    @property
    def size(self) -> int:
        return len(self.needs_full) + len(self.low_is_enough)


def choose(kinds: Iterable[tuple[int, Kind]], size: int | None, share_full: float, seed: int) -> Choice:
    """Draw ``size`` rows, ``share_full`` of them such that need the full picture; ``(row number, kind)`` in.

    The share is kept: where one kind is short, fewer of the other are drawn too. ``size=None`` takes as many as that
    allows. The same for the same rows and seed, whatever their order.

    Raises:
        ConfigError: for a size below 1 or a share outside 0 to 1.
    """
    if size is not None and size < 1:
        raise ConfigError(f"size is {size}; it counts rows. Leave it out for as many as there are.")
    if not 0 <= share_full <= 1:
        raise ConfigError(f"share_full is {share_full}; it is a share, from 0 to 1.")
    pairs = sorted(kinds)
    pools = {wanted: [number for number, kind in pairs if kind is wanted] for wanted in Kind}
    full, low = pools[Kind.NEEDS_FULL], pools[Kind.LOW_IS_ENOUGH]
    counts = _split(len(full), len(low), size, share_full)
    rng = random.Random(seed)
    chosen = [tuple(sorted(rng.sample(pool, count))) for pool, count in zip((full, low), counts, strict=True)]
    return Choice(*chosen, available={kind.value: len(pool) for kind, pool in pools.items()}, wanted=size)


def _split(full: int, low: int, size: int | None, share: float) -> tuple[int, int]:
    """The largest (full, low) of at most ``size`` rows in all that keep the share up to rounding."""
    total = min(full + low, size if size is not None else full + low)
    while total and not (round(total * share) <= full and total - round(total * share) <= low):
        total -= 1
    return round(total * share), total - round(total * share)


def shards_of(process: int, processes: int, shards: int) -> list[int]:
    """The shards that one of several processes works on: every ``processes``-th, so that all end at about one time."""
    if not 0 <= process < processes:
        raise ConfigError(f"process {process} of {processes}: processes are numbered from 0.")
    return list(range(process, shards, processes))


def shares_by_source(kinds: Sequence[tuple[str, Kind]]) -> dict[str, dict[str, int]]:
    """``{data_source: {kind: rows}}`` with every kind named, sources in alphabetical order."""
    counts = {source: Counter(kind for other, kind in kinds if other == source) for source, _ in kinds}
    return {source: {kind.value: counts[source][kind] for kind in Kind} for source in sorted(counts)}
