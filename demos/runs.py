"""What the training runs of the demos have in common: one thread each, kept results, overrides of a recipe, a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vt_trl.whole import write_whole


def single_thread() -> None:
    """One thread for this process: two runs side by side use two cores better than one with two threads. No bars."""
    import datasets
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` returned once, read from ``path`` from then on: a run that was killed goes on."""
    if not path.exists():
        write_whole(path, json.dumps(make(), indent=1) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def overrides(**settings: Any) -> list[str]:
    """``--name value`` for a recipe's command line; what is None stays as the recipe says."""
    given = {name: value for name, value in settings.items() if value is not None}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def write_page(path: Path, title: str, facts: dict[str, Any], trainer: Any) -> Path:
    """The HTML report: table, curves, and whole episodes of the last generation batch."""
    from vt_trl.report import Episode, choose_episodes, write_report

    pairs = [Episode(*pair) for pair in zip(trainer.last_rollouts, trainer.recorder.last_records, strict=True)]
    history = trainer.state.log_history
    return write_report(path, title=title, facts=facts, history=history, episodes=choose_episodes(pairs))
