"""A run as one HTML file that opens anywhere: the result, the curves, and whole episodes with their pictures.

Pictures and plots are ``data:`` URIs and nothing is loaded from elsewhere. What a policy or a data set wrote is
untrusted: the template escapes all of it, and the page forbids scripts. Needs ``vt-trl[report]``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vt_trl.images import data_uri
from vt_trl.metrics import RolloutRecord
from vt_trl.plots import plot_history, plot_request_rates
from vt_trl.transcripts.record import Transcript
from vt_trl.transcripts.show import NOTHING, environment, is_number, number, render_transcript, share
from vt_trl.types import Rollout

__all__ = ["CURVES", "HEADLINE", "Episode", "choose_episodes", "plot_request_rates", "write_report"]

CURVES = (  # title, and the key of TRL's log history; ``key/<data_source>`` is drawn with it
    ("Reward", "reward"),
    ("Share of rollouts that asked for the full picture", "request_rate"),
    ("Accuracy", "accuracy"),
)
HEADLINE = (  # row of the table, its key in ``before`` and ``after``, and the keys of always low and always full
    ("Accuracy", "accuracy", "always_low_accuracy", "always_full_accuracy"),
    ("Accuracy on easy questions", "accuracy_easy", "", ""),
    ("Accuracy on hard questions", "accuracy_hard", "", ""),
    ("Requests on easy questions", "request_rate_easy", "", ""),
    ("Requests on hard questions", "request_rate_hard", "", ""),
    ("Visual tokens per question", "visual_tokens_mean", "", "visual_tokens_always_full"),
)
_IN_TEXT = {"before", "after", "control", "title", *(key for row in HEADLINE for key in row[2:])}


@dataclass(frozen=True)
class Episode:
    """A rollout with its numbers; ``label`` is printed with it, such as "after training"."""

    rollout: Rollout
    record: RolloutRecord
    label: str = ""


def choose_episodes(pairs: Iterable[Episode | tuple[Rollout, RolloutRecord]], count: int = 8) -> list[Episode]:
    """A varied selection, the same for the same input.

    Kinds of episode (status, asked, correct, source) are shown in turn; within that, groups that taught something
    (an advantage other than 0) go first, then statuses and sources not shown yet, then rows not shown yet.
    """
    episodes = [pair if isinstance(pair, Episode) else Episode(*pair) for pair in pairs]
    return choose_varied(episodes, count, lambda episode: episode.record)


def choose_varied(items: Iterable[Any], count: int, facts: Callable[[Any], Any] = lambda item: item) -> list[Any]:
    """The selection of :func:`choose_episodes` among any items; ``facts`` gives a record or a transcript of each."""
    left = list(items)
    live = {facts(item).group for item in left if facts(item).advantage}
    kinds: Counter[tuple] = Counter()
    traits: Counter[tuple] = Counter()
    rows: Counter[str] = Counter()

    def rank(item: Any) -> tuple:
        record, kind = facts(item), _kind(facts(item))
        new = sum(trait not in traits for trait in enumerate(kind))
        return kinds[kind], record.group not in live, -new, rows[record.id]

    chosen = []
    while left and len(chosen) < count:
        best = min(left, key=rank)  # the first of equals
        left.remove(best)
        chosen.append(best)
        kinds[_kind(facts(best))] += 1
        traits.update(enumerate(_kind(facts(best))))
        rows[facts(best).id] += 1
    return chosen


def _kind(record: RolloutRecord | Transcript) -> tuple:
    return record.status, record.asked, record.correct, record.source


def write_report(
    path: str | Path,
    *,
    title: str,
    facts: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    episodes: Sequence[Episode | tuple[Rollout, RolloutRecord]],
    curves: Sequence[tuple[str, str]] = CURVES,
) -> Path:
    """Write the report to ``path`` and return it. Numbers that are missing or NaN are printed as a dash.

    Args:
        facts: results of the run: ``before`` and ``after`` (keys of :data:`HEADLINE`, shares from 0 to 1), ``control``
            (``chance``, ``hard_low_accuracy``, ``hard_full_accuracy``), the two fixed policies; the rest is listed.
        history: TRL's ``log_history``.
        episodes: printed in this order, all of them, pictures as PNG at the size shown (:func:`choose_episodes`).
        curves: title and key of each plot; a key that the history lacks is left out.
    """
    shown = [episode if isinstance(episode, Episode) else Episode(*episode) for episode in episodes]
    text = (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            facts=facts,
            headline=[_headline_row(facts, *row) for row in HEADLINE],
            run={
                name.replace("_seconds", "_time").replace("_", " "): _words(name, facts[name])
                for name in facts
                if name not in _IN_TEXT
            },
            plots=[plot for curve in curves if (plot := _plot(history, *curve))],
            episodes=[
                render_transcript(Transcript.of(episode.rollout, episode.record), label=episode.label)
                for episode in shown
            ],
        )
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8", "backslashreplace"))  # JSON can smuggle in lone surrogates
    return path


def _words(name: str, value: Any) -> str:
    """A fact of any kind as a line of text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words('', item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_words("", item) for item in value)
    if not is_number(value) or isinstance(value, bool):
        return NOTHING if value is None or isinstance(value, float) else str(value)  # a float here is NaN or infinite
    if name.endswith("_seconds"):
        return f"{int(value) // 60} min {int(value) % 60} s" if value >= 60 else f"{value:.1f} s"
    return share(value) if name.endswith("_share") else f"{value:g}" if isinstance(value, float) else str(value)


def _headline_row(facts: Mapping[str, Any], label: str, key: str, low: str, full: str) -> list[str]:
    """The label and the cells before, after, always low, always full."""
    values = [(facts.get(when) or {}).get(key) for when in ("before", "after")] + [facts.get(low), facts.get(full)]
    return [label, *(number(value) if key == "visual_tokens_mean" else share(value) for value in values)]


def _plot(history: Sequence[Mapping[str, Any]], title: str, key: str) -> dict[str, str] | None:
    """A curve as a picture with a description of it; None when nothing was logged under ``key``."""
    drawn = plot_history(history, title, key)
    return drawn and {"title": title, "src": data_uri("svg+xml", drawn.svg), "summary": drawn.summary}
