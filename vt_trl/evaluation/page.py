"""The report of an evaluation: one HTML file that opens anywhere, without scripts. Needs ``vt-trl[report]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vt_trl.evaluation.run import RESULTS
from vt_trl.evaluation.shards import Cell, shard_path
from vt_trl.images import data_uri
from vt_trl.plots import plot_tradeoff
from vt_trl.report import choose_varied
from vt_trl.transcripts.record import Transcript
from vt_trl.transcripts.show import environment, render_transcript
from vt_trl.transcripts.table import read_transcripts

PAGE = "report.html"
EPISODES = 4  # of each cell


def write_evaluation_page(out: str | Path, report: Mapping[str, Any], episodes: int = EPISODES) -> Path:
    """Write ``OUT/report.html`` from the results, with some episodes of the first shard of each cell; returns it."""
    out = Path(out)
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in report["cells"]:
        groups.setdefault((cell["model"], cell["data"]), []).append(cell)
    text = (
        environment()
        .get_template("evaluation.html.j2")
        .render(
            report=report,
            results=RESULTS,
            groups=[
                {"model": model, "data": data, "cells": cells, "plot": _plot(cells), "sources": _sources(cells)}
                for (model, data), cells in groups.items()
            ],
            episodes=[
                render_transcript(one, label=f"{cell['model']}, {cell['data']}, {cell['policy']}")
                for cell in report["cells"]
                for one in _episodes(out, cell, episodes)
            ],
        )
    )
    path = out / PAGE
    path.write_bytes(text.encode("utf-8", "backslashreplace"))
    return path


def _plot(cells: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    """Accuracy against visual tokens, in % of always-full where that was run, else per row."""
    relative = all(cell["visual_tokens_share"] is not None for cell in cells)
    points = [
        (
            cell["policy"],
            100 * cell["visual_tokens_share"] if relative else cell["visual_tokens"],
            cell["accuracy"],
            cell["accuracy_interval"],
        )
        for cell in cells
        if cell["accuracy"] is not None
    ]
    if not points:
        return None
    drawn = plot_tradeoff(points, "visual tokens in % of always-full" if relative else "visual tokens per row")
    return {"src": data_uri("svg+xml", drawn.svg), "summary": drawn.summary}


def _sources(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per source and policy, for data sets that name their sources."""
    return [
        {"source": source, "policy": cell["policy"], **numbers}
        for source in sorted({source for cell in cells for source in cell["sources"]})
        for cell in cells
        if (numbers := cell["sources"].get(source))
    ]


def _episodes(out: Path, cell: Mapping[str, Any], count: int) -> list[Transcript]:
    path = shard_path(out, Cell(cell["model"], cell["data"], cell["policy"]), 0)
    return choose_varied(read_transcripts(path), count) if count and path.is_file() else []
