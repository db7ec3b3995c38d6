"""How hard a row is, in which band it falls, and what has moved since an earlier round. Pure functions.

OpenVLThinker (arXiv 2503.17352): the mean z-score of a language model's rating and of the current model's error rate,
and k-means with three clusters.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vt_trl.errors import ConfigError

NAMES = {1: ("medium",), 2: ("easy", "hard"), 3: ("easy", "medium", "hard")}  # by how many bands there are
_RESTARTS = 10  # of k-means; with a fixed seed the result is the same on every run


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of a measure over the rows that it was taken of."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Scale:
        return cls(statistics.fmean(values), statistics.pstdev(values)) if values else cls(0.0, 0.0)

    def z(self, value: float) -> float:
        """0 for all where all are equal: the measure then says nothing."""
        return (value - self.mean) / self.deviation if self.deviation > 0 else 0.0


@dataclass(frozen=True)
class Measured:
    """What is known of a row: share of right answers (0 to 1), a rating, and why one of them is missing."""

    pass_rate: float | None = None
    rating: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Ruler:
    """How difficulty is made of measures, and where the centres of the bands are, from easy to hard."""

    scales: dict[str, Scale]  # "error" (1 - pass rate), "rating", or both
    centres: tuple[float, ...]

    def difficulty(self, row: Measured) -> float | None:
        """The mean of the row's z-scores; None unless all that is measured is known of it."""
        values = {"error": None if row.pass_rate is None else 1 - row.pass_rate, "rating": row.rating}
        if any(values[name] is None for name in self.scales):
            return None
        return statistics.fmean(scale.z(values[name]) for name, scale in self.scales.items())

    def band(self, difficulty: float | None) -> str | None:
        """The band whose centre is nearest; of two that are as near the easier one."""
        if difficulty is None or not self.centres:
            return None
        nearest = min(range(len(self.centres)), key=lambda band: abs(difficulty - self.centres[band]))
        return NAMES[len(self.centres)][nearest]

    as_dict = asdict

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Ruler:
        """A ruler from a report. Raises KeyError and TypeError for what is none."""
        return cls({name: Scale(**one) for name, one in stored["scales"].items()}, tuple(stored["centres"]))


def make_ruler(rows: Sequence[Measured], by: Sequence[str], seed: int) -> Ruler:
    """The ruler of these rows. ``by``: ``error``, ``rating``, or both; scales are of rows that have all of them.

    Fewer different difficulties than three make fewer bands. Raises ConfigError without scikit-learn.
    """
    full = [
        one
        for one in rows
        if not (("error" in by and one.pass_rate is None) or ("rating" in by and one.rating is None))
    ]
    values = {"error": [1 - one.pass_rate for one in full if one.pass_rate is not None]}
    values["rating"] = [one.rating for one in full if one.rating is not None]
    ruler = Ruler({name: Scale.of(values[name]) for name in by}, ())
    scores = [ruler.difficulty(one) for one in full]
    return Ruler(ruler.scales, centres_of(scores, seed))


def centres_of(scores: Sequence[float], seed: int) -> tuple[float, ...]:
    """Centres of at most three clusters, ascending. Raises ConfigError without scikit-learn."""
    distinct = len({round(one, 9) for one in scores})
    if distinct == 0:
        return ()
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ConfigError("bands need scikit-learn: pip install 'vt-trl[prepare]'.") from error
    clusters = KMeans(min(3, distinct), n_init=_RESTARTS, random_state=seed)
    return tuple(sorted(float(one[0]) for one in clusters.fit([[one] for one in scores]).cluster_centers_))


def drift(
    before: Mapping[str, tuple[Measured, str | None]],
    now: Mapping[str, tuple[Measured, str | None]],
    earlier: Ruler | None,
) -> dict[str, Any]:
    """What has moved between two rounds: rows by id, each with its measures and its band.

    ``transitions[band before][band now]``: rows; "none" is no band. Bands are relative to their round, so
    ``on_earlier_scale`` sorts the rows of now with the ruler of then. ``mean_shift``: of a measure, now minus before,
    over the rows that have it in both.
    """
    common = sorted(set(before) & set(now))
    found = {
        "rows": len(common),
        "only_before": len(before) - len(common),
        "only_now": len(now) - len(common),
        "transitions": _table([(before[id][1], now[id][1]) for id in common]),
        "mean_shift": {name: _shift(before, now, common, name) for name in ("pass_rate", "rating")},
    }
    if earlier is not None:
        bands = {id: earlier.band(earlier.difficulty(now[id][0])) for id in common}
        found["on_earlier_scale"] = _table([(before[id][1], bands[id]) for id in common])
    return found


def _table(pairs: Sequence[tuple[str | None, str | None]]) -> dict[str, dict[str, int]]:
    counts = Counter((one or "none", other or "none") for one, other in pairs)
    names = [name for name in (*NAMES[3], "none") if any(name in pair for pair in counts)]
    return {one: {other: counts[one, other] for other in names} for one in names}


def _shift(before: Mapping[str, Any], now: Mapping[str, Any], ids: Sequence[str], name: str) -> float | None:
    pairs = [(getattr(before[id][0], name), getattr(now[id][0], name)) for id in ids]
    shifts = [new - old for old, new in pairs if old is not None and new is not None]
    return statistics.fmean(shifts) if shifts else None
