"""``vt-trl evaluate``: every model on every data set under every policy, shard by shard, and the results of it all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from vt_trl.data import load_rows
from vt_trl.errors import ConfigError, DataError
from vt_trl.evaluation.rows import content_digest, play_rows
from vt_trl.evaluation.shards import Cell, Shard, read_shard, shard_path, write_shard
from vt_trl.evaluation.stats import RESAMPLES, SEED, summarise
from vt_trl.inference import PolicyModel
from vt_trl.judges import JudgeReward, make_judge, make_judge_reward
from vt_trl.policies import Policy, parse_policy
from vt_trl.rollout import RolloutRunner
from vt_trl.versions import versions

RESULTS = "results.json"
Progress = Callable[[str, int, int], Any]


@dataclass(frozen=True)
class Plan:
    """What is evaluated: named models, named data sets, and policies; see :func:`evaluate`.

    ``environment_args``: settings of every policy's environment; under a policy's name those of that policy alone.
    """

    models: Mapping[str, str]
    data: Mapping[str, str]
    policies: Sequence[str] = ("two-turn", "always-full", "always-low")
    split: str | None = None
    limit: int | None = None
    judge: str = "rule"
    judge_args: Mapping[str, Any] = field(default_factory=dict)
    judge_max_failed: float | None = None
    environment_args: Mapping[str, Any] = field(default_factory=dict)
    model_settings: Mapping[str, Any] = field(default_factory=dict)
    shard_rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shard_rows < 1:
            raise ConfigError(f"shard_rows is {self.shard_rows}; it counts rows, so set 1 or more.")
        cells = [Cell(*names) for names in product(self.models, self.data, self.policies)]
        if len({cell.slug for cell in cells}) < len(cells):
            raise ConfigError(
                "two models, data sets or policies have the same name; give them names of their own, as in "
                "--model base=FOLDER trained=OTHER_FOLDER."
            )


def named(texts: Sequence[str]) -> dict[str, str]:
    """``NAME=PLACE`` or a place, whose last part is then its name. Raises ConfigError for a name given twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, separator, place = text.partition("=")
        if not separator or Path(text).exists():
            name, place = Path(text.rstrip("/")).name or text, text
        if name in found:
            raise ConfigError(f"{name!r} is given twice; give them names of their own, as in NAME={place}.")
        found[name] = place
    return found


def evaluate(plan: Plan, out: str | Path, progress: Progress = lambda label, done, rows: None) -> dict:
    """Evaluate what ``out`` does not hold yet, and return what is written to ``out/results.json``.

    ``progress`` is called with a cell's name, how many of its rows are done, and how many it has. Killed at any moment
    and started again, it goes on with the first shard that is not there. Raises ConfigError, DataError, JudgeOutage.
    """
    out = Path(out)
    policies = [parse_policy(text, plan.seed) for text in plan.policies]
    judge = make_judge(plan.judge, plan.judge_args)
    share = plan.judge_max_failed if plan.judge_max_failed is not None else 0.1 if judge.remote else 1.0
    session = _Session(plan, out, make_judge_reward(judge, max_failed=share), judge.fingerprint(), progress)
    data = {name: _rows_of(place, plan) for name, place in plan.data.items()}
    done: dict[Cell, list[Shard]] = {}
    try:
        for model_name, place in plan.models.items():
            with closing(PolicyModel(place, **plan.model_settings)) as model:
                for (data_name, rows), policy in product(data.items(), policies):
                    cell = Cell(model_name, data_name, policy.name)
                    done[cell] = session.run(cell, model, policy, rows)
            del model  # its weights, before the next one's are loaded
    finally:
        session.reward.close()
    report = {"plan": asdict(plan) | {"policies": [policy.name for policy in policies]}}
    report |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
    report |= {"bootstrap": {"resamples": RESAMPLES, "seed": SEED, "level": 0.95}}
    report["cells"] = [_summary(cell, shards, done) for cell, shards in done.items()]
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _rows_of(place: str, plan: Plan) -> Dataset:
    rows = load_rows(place, plan.split, plan.limit)
    ids = rows["id"]
    if len(set(ids)) < len(rows):
        seen: set[str] = set()
        twice = next(one for one in ids if one in seen or seen.add(one))
        raise DataError(f"{place}: the id {twice!r} occurs twice, and results are told apart by it; make ids unique.")
    return rows


def most_pictures(rows: Dataset) -> int:
    """The most pictures that one of the rows has."""
    if "images" not in rows.column_names:
        return 1
    return pc.max(pc.list_value_length(rows.data.column("images"))).as_py() or 1


def _summary(cell: Cell, shards: Sequence[Shard], done: Mapping[Cell, Sequence[Shard]]) -> dict[str, Any]:
    full = done.get(Cell(cell.model, cell.data, "always-full"))
    results = [one for shard in shards for one in shard.results]
    numbers = summarise(results, full and [one for shard in full for one in shard.results])
    if not parse_policy(cell.policy).has_tool:
        numbers["request_rate"] = None  # there was nothing to ask for
        for one in numbers["sources"].values():
            one["request_rate"] = None
    seconds = sum(shard.seconds for shard in shards)
    return asdict(cell) | numbers | {"seconds": seconds, "sessions": len({shard.session for shard in shards})}


class _Session:
    """One process's work on a plan."""

    def __init__(self, plan: Plan, out: Path, reward: JudgeReward, judge: dict[str, Any], progress: Progress):
        self.plan, self.out, self.reward, self.judge, self.progress = plan, out, reward, judge, progress
        self.name = datetime.now(UTC).isoformat()

    def run(self, cell: Cell, model: PolicyModel, policy: Policy, rows: Dataset) -> list[Shard]:
        """The shards of a cell, read or made; weights are loaded when the first one has to be made."""
        args = model.settings_for(policy, self._arguments(policy))
        environment = policy.environment(args, model.sight)
        settings = self._settings(model, policy, args)
        runner: RolloutRunner | None = None
        shards = []
        for number in range(math.ceil(len(rows) / self.plan.shard_rows)):
            start = number * self.plan.shard_rows
            part = [rows[index] for index in range(start, min(start + self.plan.shard_rows, len(rows)))]
            digests = [f"{row['id']} {content_digest(row)}" for row in part]
            path = shard_path(self.out, cell, number)
            shard = read_shard(path, settings, digests)
            if shard is None:
                runner = runner or model.runner(environment, most_pictures(rows))
                done = play_rows(runner, part, model.sampling, self.reward, batch_size=len(part))
                shard = write_shard(path, cell, settings, digests, done, self.name)
            shards.append(shard)
            self.progress(str(cell), start + len(part), len(rows))
        return shards

    def _arguments(self, policy: Policy) -> dict[str, Any]:
        """The settings given for a policy's environment: those of all, and its own over them."""
        given = self.plan.environment_args
        names = {parse_policy(text, self.plan.seed).name for text in self.plan.policies}
        shared = {name: value for name, value in given.items() if name not in names}
        return shared | dict(given.get(policy.name, {}))

    def _settings(self, model: PolicyModel, policy: Policy, args: Mapping[str, Any]) -> dict[str, Any]:
        """All that a result depends on, but the rows."""
        return {
            "weights": model.identity(),
            "policy": policy.name,
            "seed": self.plan.seed if policy.name.startswith("share=") else None,
            "environment": args,
            "limits": asdict(model.limits),
            "sampling": asdict(model.sampling),
            "backend": "vllm" if model.uses_vllm else "transformers",
            "dtype": model.checkpoint.torch_dtype,
            "batch": [self.plan.shard_rows, model.checkpoint.max_batch],
            "judge": self.judge,
        }
