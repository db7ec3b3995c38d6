"""How much a plan is, before it runs: rows, episodes and optimizer steps of each stage, and hours by the preflight.

Rows that do not exist yet are counted as many as could come of what exists, so the figures are upper bounds.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from rich.console import Console

from vt_trl.errors import ConfigError, DataError
from vt_trl.loop.plan import Plan, Planned
from vt_trl.loop.stages import check_training, processes


@dataclass(frozen=True)
class Size:
    """Of one stage; None: not known. ``rows``: it takes; ``made``: it leaves at most. ``hours``: on paper."""

    rows: int | None = None
    made: int | None = None
    episodes: int | None = None
    steps: int | None = None
    hours: float | None = None
    note: str = ""


def sizes(plan: Plan, gpu_gib: float | None = None) -> dict[str, Size]:
    """The size of every stage, by its id. With ``gpu_gib`` training is also looked at by :mod:`vt_trl.preflight`."""
    found: dict[str, Size] = {}
    on_paper: dict[str, tuple[float | None, str]] = {}
    for one in plan.stages:
        settings = one.settings(plan.recipe.rounds)
        source = settings.get("dataset") or settings.get("source") or settings.get("data")
        rows = _rows(source, plan, found)
        limits = [settings.get(name) for name in ("max_rows", "limit")]
        for limit in (limit for limit in limits if isinstance(limit, int)):
            rows = limit if rows is None else min(rows, limit)
        if one.kind.trains:
            size = _training(one, settings, rows)
            if one.stage.run == "train" and gpu_gib:
                size = _with_hours(size, one, plan, settings, gpu_gib, on_paper)
        else:
            size = _other(one, settings, rows)
        found[one.id] = size
    return found


def _rows(source: Any, plan: Plan, found: Mapping[str, Size]) -> int | None:
    if isinstance(source, list):
        counts = [_rows(one, plan, found) for one in source]
        return None if any(count is None for count in counts) else sum(counts)
    if not isinstance(source, str):
        return None
    path = Path(source.partition("=")[2] if "=" in source and not Path(source).exists() else source).expanduser()
    known = count_rows(path)
    if known is not None:
        return known
    stages = plan.folder / "stages"
    name = path.relative_to(stages).parts[0] if path.is_relative_to(stages) and path != stages else ""
    return found[name].made if name in found else None


def count_rows(place: Path) -> int | None:
    """Rows of a folder or a file of rows, without reading them; None where that cannot be told."""
    from vt_trl.sources import MANIFEST, shard_files, table_file

    try:
        table = table_file(place, None)
        if table is not None and table.suffix == ".jsonl":
            with table.open("rb") as stream:
                return sum(1 for line in stream if line.strip())
        if (place / MANIFEST).is_file():
            return sum(pq.read_metadata(file).num_rows for file in shard_files(place))
        files = [place] if place.suffix == ".parquet" else sorted(place.rglob("*.parquet")) if place.is_dir() else []
        return sum(pq.read_metadata(file).num_rows for file in files) if files else None
    except (OSError, ValueError, DataError):
        return None


def _training(one: Planned, settings: Mapping[str, Any], rows: int | None) -> Size:
    count = processes(one.launched())
    _, args = check_training(one.kind, settings, count, one.id)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * count
    if one.stage.run == "sft":
        steps = None if rows is None else -(-rows // batch) * args.num_train_epochs
        return Size(rows, None, None, _steps(args, steps))
    prompts = args.generation_batch_size // args.num_generations
    updates = args.generation_batch_size / batch * args.num_iterations
    steps = None if rows is None else rows // prompts * args.num_train_epochs * updates
    steps = _steps(args, steps)
    episodes = None if steps is None else round(steps / updates * args.generation_batch_size)
    return Size(rows, None, episodes, steps)


def _steps(args: Any, steps: float | None) -> int | None:
    return args.max_steps if args.max_steps > 0 else None if steps is None else round(steps)


def _other(one: Planned, settings: Mapping[str, Any], rows: int | None) -> Size:
    """A preparation leaves as many rows as it takes, or the number it is asked for; an evaluation plays its cells."""
    wanted = settings.get("size")
    made = wanted if isinstance(wanted, int) else rows
    if rows is None:
        return Size(None, made)
    usual = one.kind.parser().get_default
    if one.stage.run == "evaluate":
        models = settings.get("model")
        cells = len(settings.get("policies") or usual("policies")) * (len(models) if isinstance(models, list) else 1)
        return Size(rows, None, rows * cells)
    if one.stage.run == "prepare difficulty" and not settings.get("model"):
        return Size(rows, made)  # its pass rates are there, or not wanted
    tries = [settings.get(name) or usual(name) for name in ("attempts", "samples", "rollouts")]
    tries = [number for number in tries if isinstance(number, int)]
    return Size(rows, made, rows * math.prod(tries) if tries else None)


def _with_hours(
    size: Size, one: Planned, plan: Plan, settings: Mapping[str, Any], gpu_gib: float, seen: dict[str, tuple]
) -> Size:
    key = json.dumps({**settings, "model": None, "dataset": None, "output_dir": None, "seed": None}, sort_keys=True)
    if key not in seen:
        seen[key] = _preflight(one, plan, settings, gpu_gib)
    seconds, note = seen[key]
    hours = None if seconds is None or size.steps is None else seconds * size.steps / 3600
    return Size(size.rows, size.made, size.episodes, size.steps, hours, note)


def _preflight(one: Planned, plan: Plan, settings: Mapping[str, Any], gpu_gib: float) -> tuple[float | None, str]:
    """Seconds per step on paper, and whether it fits."""
    import tempfile

    from vt_trl.preflight import preflight

    launch = one.launched()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{one.id}.yaml"
        path.write_text(yaml.safe_dump({**settings, "model": architecture(one, plan)}), encoding="utf-8")
        try:
            result = preflight(
                path,
                gpu_gib=gpu_gib,
                processes=processes(launch),
                config_file=launch.get("config_file"),
                console=Console(file=io.StringIO()),
            )
        except ConfigError as error:
            return None, f"no preflight: {str(error).splitlines()[0][:80]}"
    estimate = result.estimate
    fits = {True: "fits", False: "does not fit", None: ""}[estimate.fits_typically]
    return estimate.seconds.total, fits if estimate.fits or not estimate.fits_typically else "fits typically"


def architecture(one: Planned, plan: Plan) -> str:
    """The model that a chain of stages began with: what is trained is as large as that."""
    seen = set()
    while True:
        model = str(one.settings(plan.recipe.rounds).get("model", ""))
        stages = plan.folder / "stages"
        name = Path(model).relative_to(stages).parts[0] if Path(model).is_relative_to(stages) else ""
        if name not in plan.by_id or name in seen:
            return model
        seen.add(name)
        one = plan.by_id[name]
        if "model" not in one.raw and "run" in one.raw:  # an export, of a run
            model = str(one.settings(plan.recipe.rounds)["run"])
            one = plan.by_id.get(Path(model).name, one)
