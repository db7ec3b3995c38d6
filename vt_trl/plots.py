"""Plots: the curves of a run for its report, and the request rates of an ablation. Needs ``vt-trl[report]``.

Figures are built without pyplot, so nothing depends on a screen or on the state of another figure.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vt_trl.metrics import mean

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(f"{error}. Plots need more packages: pip install 'vt-trl[report]'.") from error

_COLOURS = {"easy": "#0072b2", "hard": "#d55e00"}  # these and the rest: Okabe and Ito, safe for the colour-blind
_OTHERS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_ALL = "#4a4a4a"
_SMOOTH_FROM = 30  # points; fewer are drawn as they are

Points = list[tuple[float, float]]  # (step, value), NaN-free and in the order logged


@dataclass(frozen=True)
class Drawn:
    """A plot and a sentence that says what it shows."""

    svg: bytes
    summary: str


def plot_history(history: Sequence[Mapping[str, Any]], title: str, key: str) -> Drawn | None:
    """Curves of ``key`` and of every ``key/<data_source>`` in TRL's log history; None when there are none.

    From 30 points on a curve is a running mean, with the values logged faint behind it.
    """
    names = sorted({name for row in history for name in row if name == key or name.startswith(f"{key}/")})
    curves = {name: points for name in names if (points := _points(history, name))}
    if not curves:
        return None
    figure = Figure(figsize=(5.6, 3.1), layout="constrained")
    ax = figure.subplots()
    _dress(ax, title, shares=all(0 <= value <= 1 for points in curves.values() for _, value in points))
    said = []
    for number, (name, points) in enumerate(curves.items()):
        label = "all" if name == key else name.removeprefix(f"{key}/")
        colour = _ALL if name == key else _COLOURS.get(label, _OTHERS[number % len(_OTHERS)])
        steps, values = zip(*points, strict=True)
        window = max(len(values) // 15, 1) if len(values) >= _SMOOTH_FROM else 1
        smooth = [mean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]
        if window > 1:
            ax.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        ax.plot(steps, smooth, color=colour, linewidth=1.8, label=label, marker="o" if len(values) == 1 else None)
        said.append(f"{label} from {smooth[0]:.2f} to {smooth[-1]:.2f}")
    ax.legend(frameon=False, fontsize=8)
    file = io.BytesIO()
    _save(figure, file, "svg")
    return Drawn(file.getvalue(), "; ".join(said))


def _points(history: Sequence[Mapping[str, Any]], name: str) -> Points:
    found = ((row.get("step", index), row.get(name)) for index, row in enumerate(history))
    return [(step, float(value)) for step, value in found if value is not None and not math.isnan(value)]


def plot_request_rates(results: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], path: str | Path) -> Path:
    """The request rates of an ablation: a panel per penalty rule, easy and hard, seeds thin and their mean thick.

    Args:
        results: penalty rule -> one mapping per seed with ``steps``, ``request_rate_easy``, ``request_rate_hard`` and,
            for the panel's title, ``accuracy``: lists of one length, NaN or None where nothing was measured.
        path: a ``.png`` or ``.svg`` file to write.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"path is {str(path)!r}; its suffix must be .png or .svg")
    if not results:
        raise ValueError("results are empty; give at least one penalty rule")
    figure = Figure(figsize=(0.6 + 2.9 * len(results), 3.2), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for ax, (rule, seeds) in zip(panels, results.items(), strict=True):
        last = [points[-1][1] for seed in seeds if (points := _seed_points(seed, "accuracy"))]
        _dress(ax, f"{rule} (accuracy {mean(last):.2f})" if last else rule, shares=True)
        for source in ("easy", "hard"):
            _seed_lines(ax, [_seed_points(seed, f"request_rate_{source}") for seed in seeds], source)
    panels[0].set_ylabel("request rate")
    panels[0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, path, kind)
    return path


def _seed_points(seed: Mapping[str, Sequence[float]], name: str) -> Points:
    pairs = zip(seed["steps"], seed.get(name) or [None] * len(seed["steps"]), strict=True)
    return [(step, float(value)) for step, value in pairs if value is not None and not math.isnan(value)]


def _seed_lines(ax: Axes, seeds: Sequence[Points], source: str) -> None:
    """A thin line per seed; the thick mean is drawn at the steps that every seed has."""
    values = [dict(points) for points in seeds if points]
    if not values:
        return
    for seed in values:
        ax.plot(list(seed), list(seed.values()), color=_COLOURS[source], linewidth=0.8, alpha=0.45)
    steps = sorted(set.intersection(*(set(seed) for seed in values)))
    means = [mean(seed[step] for seed in values) for step in steps]
    ax.plot(steps, means, color=_COLOURS[source], linewidth=2.4, label=source)


def plot_counts(histogram: Sequence[Sequence[int]], ways: tuple[str, str], margin: int) -> Drawn:
    """Rows by right answers in two ways, the first across and the second up; ``histogram[first][second]``, square.

    ``ways``: in words, such as "at full resolution". Cells in which the second is ahead by ``margin`` lie above the
    line.
    """
    title = f"Right answers {ways[0]} and {ways[1]}"
    side = len(histogram)
    figure = Figure(figsize=(4.4, 4.0), layout="constrained")
    ax = figure.subplots()
    _dress(ax, title)
    ax.set_xlabel(f"right {ways[0]}")
    ax.set_ylabel(f"right {ways[1]}")
    ax.grid(visible=False)
    most = max(max(row) for row in histogram) or 1
    shown = [[math.sqrt(histogram[low][full] / most) for low in range(side)] for full in range(side)]
    ax.imshow(shown, origin="lower", cmap="Blues", vmin=0, vmax=1)  # roots, so that rare cells can be seen too
    for low, row in enumerate(histogram):
        for full, rows in enumerate(row):
            dark = rows > most / 3
            ax.text(low, full, str(rows or ""), ha="center", va="center", fontsize=7, color="w" if dark else "k")
    steps = range(side - margin)
    edges = [low - 0.5 for low in range(len(steps) + 1)]
    ax.stairs([low + margin - 0.5 for low in steps], edges, baseline=None, color=_COLOURS["hard"], linewidth=1.5)
    rows = [(low, full, count) for low, row in enumerate(histogram) for full, count in enumerate(row)]
    ahead = sum(count for low, full, count in rows if full - low >= margin)
    file = io.BytesIO()
    _save(figure, file, "svg")
    said = f"{histogram[-1][-1]} rows all right both ways, {ahead} ahead {ways[1]} by {margin} or more"
    return Drawn(file.getvalue(), f"{title}: {said}, of {sum(count for *_, count in rows)}")


def plot_shares(groups: Mapping[str, Mapping[str, int]], title: str) -> Drawn:
    """One bar per group, cut into the shares of its parts, in the order of the first group's parts."""
    parts = list(next(iter(groups.values()), {}))
    colours = (_COLOURS["easy"], _COLOURS["hard"], "#b0b0b0", *_OTHERS)
    figure = Figure(figsize=(5.6, 1.4 + 0.35 * len(groups)), layout="constrained")
    ax = figure.subplots()
    _dress(ax, title)
    ax.set_xlabel("share")
    left = [0.0] * len(groups)
    for part, colour in zip(parts, colours, strict=False):
        widths = [group[part] / max(sum(group.values()), 1) for group in groups.values()]
        ax.barh(range(len(groups)), widths, left=left, color=colour, label=part.replace("_", " "))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    ax.set_yticks(range(len(groups)))
    ax.set_yticklabels([name[:40] for name in groups], parse_math=False)
    ax.legend(frameon=False, fontsize=7, ncols=len(parts), loc="lower center", bbox_to_anchor=(0.5, 1.12))
    file = io.BytesIO()
    _save(figure, file, "svg")
    said = "; ".join(f"{name} {sum(group.values())}" for name, group in groups.items())
    return Drawn(file.getvalue(), f"{title} by source: {said}")


def plot_rounds(seeds: Sequence[Mapping[str, Any]], controls: Mapping[str, str], title: str) -> Drawn:
    """Accuracy after each round of a loop, seeds thin and their mean thick, beside controls as level lines.

    ``seeds``: one mapping each with ``base``, ``rounds`` (a list) and the names of ``controls``, shares from 0 to 1.
    ``controls``: at most three, what each is called on the page.
    """
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    ax = figure.subplots()
    _dress(ax, title, shares=True)
    ax.set_xlabel("round (0: base model)")
    curves = [[seed["base"], *seed["rounds"]] for seed in seeds]
    average = [mean(column) for column in zip(*curves, strict=True)]
    for curve in curves:
        ax.plot(range(len(curve)), curve, color=_COLOURS["easy"], linewidth=0.8, alpha=0.45)
    ax.plot(range(len(average)), average, color=_COLOURS["easy"], linewidth=2.4, marker="o", label="loop")
    ax.set_xticks(range(len(average)))
    said = [f"loop from {average[0]:.2f} to {average[-1]:.2f}"]
    for (name, label), colour in zip(controls.items(), (_COLOURS["hard"], *_OTHERS), strict=False):
        for seed in seeds:
            ax.axhline(seed[name], color=colour, linewidth=0.8, alpha=0.35)
        level = mean(seed[name] for seed in seeds)
        ax.axhline(level, color=colour, linewidth=1.8, linestyle="--", label=label)
        said.append(f"{label} {level:.2f}")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    file = io.BytesIO()
    _save(figure, file, "svg")
    return Drawn(file.getvalue(), "; ".join(said))


def plot_tradeoff(points: Sequence[tuple[str, float, float, Sequence[float] | None]], axis: str) -> Drawn:
    """Accuracy against tokens: a point per policy, with its confidence interval.

    ``points``: name, tokens, accuracy from 0 to 1, and the interval's edges; ``axis`` says what the tokens are.
    """
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    ax = figure.subplots()
    _dress(ax, "Accuracy against visual tokens", shares=True)
    ax.set_xlabel(axis)
    for number, (name, tokens, accuracy, edges) in enumerate(points):
        colour = (*_OTHERS, *_COLOURS.values())[number % (len(_OTHERS) + len(_COLOURS))]
        low, high = edges or (accuracy, accuracy)
        style = {"color": colour, "marker": "osD^v"[number % 5], "linestyle": "none", "capsize": 3}
        ax.errorbar(tokens, accuracy, [[accuracy - low], [high - accuracy]], label=name, **style)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    ax.margins(x=0.15)
    file = io.BytesIO()
    _save(figure, file, "svg")
    said = "; ".join(f"{name} {100 * right:.1f} % at {at:.1f}" for name, at, right, _ in points)
    return Drawn(file.getvalue(), said)


def _dress(ax: Axes, title: str, shares: bool = False) -> None:
    # A title may name a penalty rule or a data source with a dollar sign, which must not start a formula.
    ax.set_title(title, fontsize=10, parse_math=False)
    ax.set_xlabel("step")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if shares:
        ax.set_ylim(-0.03, 1.03)


def _save(figure: Figure, file: str | Path | io.BytesIO, kind: str) -> None:
    """Save with the same bytes for the same plot: no date, fixed ids."""
    with matplotlib.rc_context({"svg.hashsalt": "vt_trl"}):
        figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
