"""Numbers of an evaluation: summaries with confidence intervals, and paired differences with significance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from vt_trl.evaluation.rows import RowResult
from vt_trl.metrics import mean

RESAMPLES, SEED = 2000, 0
_BLOCK = 2_000_000  # numbers drawn at a time: memory stays small however many rows there are


def bootstrap_means(values: Sequence[float], resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """(resamples,) means of rows drawn with replacement; the same for the same values and seed."""
    array, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    rows = max(1, _BLOCK // len(array))
    blocks = [min(rows, resamples - done) for done in range(0, resamples, rows)]
    return np.concatenate([array[rng.integers(0, len(array), (count, len(array)))].mean(1) for count in blocks])


def interval(values: Sequence[float]) -> list[float] | None:
    """The percentile bootstrap's 95 % confidence interval of a mean; None of nothing."""
    return [float(edge) for edge in np.percentile(bootstrap_means(values), [2.5, 97.5])] if len(values) else None


def summarise(results: Sequence[RowResult], full: Sequence[RowResult] | None = None) -> dict[str, Any]:
    """The numbers of one cell as JSON values; None stands for what could not be had.

    ``full``: the results of always-full on the same rows, for the share of visual tokens. Accuracy is over the rows
    with a verdict; what is missing is counted (``unreadable``, ``judge_failed``). ``accuracy_at_least``: if every row
    whose judge failed were wrong.
    """
    shown = [one for one in results if one.readable]
    right = [float(one.correct) for one in shown if one.correct is not None]
    return {
        "rows": len(results),
        "judged": len(right),
        "right": int(sum(right)),
        "unreadable": len(results) - len(shown),
        "judge_failed": len(shown) - len(right),
        "accuracy": _known(mean(right)),
        "accuracy_interval": interval(right),
        "accuracy_at_least": sum(right) / len(shown) if shown else None,
        "request_rate": _known(mean(float(one.asked) for one in shown)),
        "format_rate": _known(mean(float(one.well_formed) for one in shown)),
        "visual_tokens": _known(mean(one.visual_tokens for one in shown)),
        "visual_tokens_share": _share(shown, full),
        "prompt_tokens": _known(mean(one.prompt_tokens for one in shown)),
        "generated_tokens": _known(mean(one.generated_tokens for one in shown)),
        "status": dict(sorted(Counter(one.status for one in results).items())),
        "sources": {source: _source(shown, source) for source in sorted({one.source for one in shown} - {""})},
    }


def _source(results: Sequence[RowResult], source: str) -> dict[str, Any]:
    own = [one for one in results if one.source == source]
    right = [float(one.correct) for one in own if one.correct is not None]
    rate = mean(float(one.asked) for one in own)
    return {"rows": len(own), "judged": len(right), "accuracy": _known(mean(right)), "request_rate": rate}


def _share(shown: Sequence[RowResult], full: Sequence[RowResult] | None) -> float | None:
    """Visual tokens as a share of those of always-full, over the rows that both could show."""
    other = {one.id: one.visual_tokens for one in full or () if one.readable}
    pairs = [(one.visual_tokens, other[one.id]) for one in shown if one.id in other]
    total = sum(tokens for _, tokens in pairs)
    return sum(tokens for tokens, _ in pairs) / total if total else None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def paired(first: Sequence[RowResult], second: Sequence[RowResult]) -> dict[str, Any]:
    """Second minus first, over the same rows in the same order; unreadable and unjudged rows are left out and counted.

    The accuracy's p-value is that of McNemar's exact test, or of a paired bootstrap where SciPy is missing;
    ``accuracy_test`` says which.
    """
    shown = [(a, b) for a, b in zip(first, second, strict=True) if a.readable and b.readable]
    judged = [(a.correct, b.correct) for a, b in shown if a.correct is not None and b.correct is not None]
    lost, won = (sum(a is x and b is not x for a, b in judged) for x in (True, False))
    test, p_value = significance(lost, won, judged)
    numbers: dict[str, Any] = {
        "rows": len(first),
        "unreadable": len(first) - len(shown),
        "unjudged": len(shown) - len(judged),
        "accuracy": _difference([float(b) - float(a) for a, b in judged]),
        "only_first_right": lost,
        "only_second_right": won,
        "accuracy_test": test,
        "accuracy_p": p_value,
    }
    for name in ("asked", "visual_tokens", "prompt_tokens", "generated_tokens"):
        numbers[name] = _difference([float(getattr(b, name)) - float(getattr(a, name)) for a, b in shown])
    return numbers


def _difference(values: Sequence[float]) -> dict[str, Any]:
    return {"difference": _known(mean(values)), "interval": interval(values)}


def significance(lost: int, won: int, judged: Sequence[tuple[bool, bool]]) -> tuple[str, float | None]:
    """The name of the test and its two-sided p-value; None without rows to test."""
    if not judged:
        return "none", None
    try:
        from scipy.stats import binomtest
    except ImportError:
        return "paired bootstrap (SciPy is not installed)", _bootstrap_p(judged)
    return "McNemar, exact", 1.0 if lost + won == 0 else float(binomtest(won, lost + won).pvalue)


def _bootstrap_p(judged: Sequence[tuple[bool, bool]]) -> float:
    """How often resampled differences, moved to a mean of 0, are as far off as the one seen."""
    values = np.array([float(b) - float(a) for a, b in judged])
    seen = abs(values.mean())
    means = bootstrap_means(values - values.mean())
    return float((1 + (np.abs(means) >= seen - 1e-12).sum()) / (1 + len(means)))
