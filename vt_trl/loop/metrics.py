"""The figures of a finished stage, read from what its command leaves: flat, name to number."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vt_trl.loop.plan import Planned

TRAINED = ("reward", "accuracy", "format_rate", "request_rate", "kl", "entropy", "completions/mean_length", "images")
FINE_TUNED = ("loss", "mean_token_accuracy", "num_tokens", "epoch")
TAB = "\t"
CELL = ("accuracy", "request_rate", "visual_tokens", "generated_tokens")


def metrics_of(one: Planned) -> dict[str, float]:
    """What is known of a stage's output; empty where nothing is. A module may leave ``metrics.json``."""
    readers = {"train": _training, "sft": _training, "evaluate": _evaluation}
    reader = readers.get(one.stage.run, _prepared)
    try:
        found = reader(one.out)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the figures in {one.out} cannot be read ({type(error).__name__}: {error})") from error
    own = one.out / "metrics.json"
    if own.is_file():
        found |= _read(own)
    return {name: value for name, value in found.items() if _is_number(value)}


def progress_of(one: Planned) -> str:
    """How far a stage is, by its files: rows of a preparation, tables of an evaluation. Empty where nothing tells."""
    try:
        if (one.out / "manifest.json").is_file():
            units = _read(one.out / "manifest.json").get("units", {})
            rows = sum(unit["rows"] for unit in units.values())
            return f"{len(units)} units done, {rows} rows" if units else ""
        tables = list((one.out / "completions").glob("*.parquet"))
        return f"{len(tables)} shards done" if tables and one.stage.run == "evaluate" else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # in the moment it is replaced
        return ""


def _training(out: Path) -> dict[str, Any]:
    """Last and first of what a run logged, and its last evaluation."""
    path = out / "trainer_state.json"
    if not path.is_file():
        return {}
    state = _read(path)
    found: dict[str, Any] = {"steps": state["global_step"]}
    for name in (*TRAINED, *FINE_TUNED):
        logged = [entry[name] for entry in state["log_history"] if _is_number(entry.get(name))]
        if logged:
            found[name] = logged[-1]
            if name in ("reward", "accuracy", "loss"):
                found[f"{name}/first"] = logged[0]
    for entry in state["log_history"]:
        found |= {
            name: value for name, value in entry.items() if name in ("eval_accuracy", "eval_reward", "eval_loss")
        }
    return found


def _evaluation(out: Path) -> dict[str, Any]:
    """Every cell by name; without a name, the mean over data sets of the last model under the first policy."""
    report = _read(out / "results.json")
    plan, cells = report["plan"], report["cells"]
    model, policy = list(plan["models"])[-1], plan["policies"][0]
    found: dict[str, Any] = {}
    for name in CELL:
        ours = [cell[name] for cell in cells if (cell["model"], cell["policy"]) == (model, policy)]
        if ours and all(_is_number(value) for value in ours):
            found[name] = sum(ours) / len(ours)
    found["rows"] = sum(cell["rows"] for cell in cells if (cell["model"], cell["policy"]) == (model, policy))
    for cell in cells:
        found[f"accuracy/{cell['model']}/{cell['data']}/{cell['policy']}"] = cell["accuracy"]
    return found


def _prepared(out: Path) -> dict[str, Any]:
    """Rows, and what was counted on the way to them; ``kept_share``: of the rows that were tried."""
    found: dict[str, Any] = {}
    if (out / "manifest.json").is_file():
        total: Counter[str] = Counter()
        for unit in _read(out / "manifest.json").get("units", {}).values():
            total["rows"] += unit["rows"]
            for name, count in unit["counts"].items():  # of a kind, by source and fate: joined over the sources
                kind, _, fate = name.partition("\t")
                total[f"{kind}/{fate.rpartition(TAB)[2]}" if fate else name] += count
        found |= total
        tried = sum(count for name, count in total.items() if name.startswith("row/")) or (
            total["rows"] + total["rows_without_trace"] if "rows_without_trace" in total else 0
        )
        if tried:
            found = {"kept_share": total.get("row/kept", total["rows"]) / tried, **found}  # the first to be shown
    if (out / "report.json").is_file():
        found |= {key: value for key, value in _flat(_read(out / "report.json")).items() if key not in found}
    return found


def _flat(values: Mapping[str, Any], head: str = "", depth: int = 4) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and depth > 1:
            found |= _flat(value, f"{head}{name}/", depth - 1)
        else:
            found[f"{head}{name}"] = value
    return found


def best_round(metric: str, lower: bool, by_round: Mapping[int, Mapping[str, float]]) -> tuple[int, float] | None:
    """The round with the best value of a metric (the first of equals) and that value; None where none has it."""
    values = {number: found[metric] for number, found in by_round.items() if _is_number(found.get(metric))}
    if not values:
        return None
    number = (min if lower else max)(sorted(values), key=values.__getitem__)
    return number, values[number]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
