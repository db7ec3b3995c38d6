"""What a model card has to know of a run, kept as ``vt_trl_run.json`` in the output folder and in every checkpoint.

A card written later, from the folder alone, then says as much as one written at the end of the run. The file holds
neither keys nor absolute paths: what is noted is cleaned first.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from huggingface_hub import ModelCard, get_token, hf_hub_download
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vt_trl.envs import DirectEnv, LookEnv, ResizeEnv, SingleEnv, ZoomEnv
from vt_trl.errors import ConfigError
from vt_trl.metrics import RolloutRecord
from vt_trl.redact import environment_secrets, names_secret, without_keys
from vt_trl.types import ImagePart, Rollout
from vt_trl.versions import versions

FILE = "vt_trl_run.json"
METRICS = ("reward", "accuracy", "request_rate", "format_rate", "visual_tokens")  # and the same with eval_ in front
LOCAL = "<local>"  # stands for the folders of a path that means nothing elsewhere

_PATH = re.compile(r"(?<![\w.:/~-])(?!(?<=<)/[\w-]+>)(?:~|[A-Za-z]:\\|/)(?:[^\s'\",;:]*[/\\])?([^\s'\",;:/\\]+)/?")


@dataclass
class RunNotes:
    """Facts of a run. ``step`` is that of the weights that lie next to the file; ``seconds`` is time in training."""

    recipe: dict[str, Any] | None = None
    base_model: str = ""
    base_revision: str | None = None
    licence: dict[str, str] = field(default_factory=dict)  # the licence fields of the base model's card
    data: list[dict[str, Any]] = field(default_factory=list)  # name, split, use, rows
    hardware: dict[str, int] = field(default_factory=dict)  # device -> processes on such a one
    versions: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    adapter: bool = False
    started: str = ""
    seconds: float = 0.0
    step: int = 0
    best: dict[str, Any] | None = None  # metric, value, step
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    example: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: str | Path) -> RunNotes:
        """The notes in a folder, empty ones when it has none. Raises ConfigError for a file that cannot be read."""
        path = Path(folder) / FILE
        if not path.is_file():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{one.name: values[one.name] for one in fields(cls) if one.name in values})
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}); restore it, or remove it and lose the card's facts."
            ) from error

    def write(self, folder: str | Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2, default=str)
        (Path(folder) / FILE).write_text(text + "\n", encoding="utf-8")


def secrets_of(trainer: Any = None) -> list[str]:
    """Texts that must not be published: tokens of this process, and what its environment calls a key."""
    found = {getattr(trainer, "_hub_token", None), get_token(), *environment_secrets()}
    return sorted((text for text in found if text and len(text) >= 6), key=len, reverse=True)


def cleaned(value: Any, secrets: Sequence[str] = (), name: str = "") -> Any:
    """A setting as it may be published: plain types, no keys, and no path from the root of a disk."""
    if isinstance(value, Mapping):
        return {str(key): cleaned(item, secrets, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(item, secrets, name) for item in value]
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool | int | float):
        return value
    if names_secret(name):
        return "***"
    return _PATH.sub(rf"{LOCAL}/\1", without_keys(str(value), secrets))


def place(name: str) -> str:
    """A model or a data set as it may be published: a Hub name as it is, a folder without where it lies."""
    path = Path(name).expanduser()
    return f"{LOCAL}/{path.resolve().name}" if path.is_absolute() or path.exists() else cleaned(name)


def licence_of(model: str, revision: str | None = None) -> dict[str, str]:
    """The licence fields of a model's card; empty when there is no card to be had."""
    try:
        local = Path(model) / "README.md"
        path = local if Path(model).is_dir() else hf_hub_download(model, "README.md", revision=revision)
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no card, no network, no access: the card then says that the licence is not known
        return {}
    return {key: str(data[key]) for key in ("license", "license_name", "license_link") if data.get(key)}


def environment_facts(environment: Any, args: Any) -> dict[str, Any]:
    """What it takes to lead a dialogue as in training; ``kind`` is "own" for an environment of the user's."""
    facts = {"name": type(environment).__name__, "max_turn_tokens": args.max_turn_tokens}
    names = {ResizeEnv: "resize", DirectEnv: "direct", SingleEnv: "single", ZoomEnv: "zoom", LookEnv: "look"}
    kind = names.get(type(environment), "own")
    if kind in ("zoom", "look"):
        rule = dataclasses.asdict(environment.rule)  # for controls that are to see as much
        return facts | {"kind": kind, "settings": environment.settings, "rule": rule}
    if kind != "own":
        facts |= {"prompts": dataclasses.asdict(environment.prompts), "rule": dataclasses.asdict(environment.rule)}
    return facts | {"kind": kind, "resolution": getattr(environment, "resolution", "low")}


def summary(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Last and highest value of the main metrics in TRL's ``log_history``, each with its step."""
    found: dict[str, dict[str, Any]] = {}
    for name in (*METRICS, *(f"eval_{name}" for name in METRICS)):
        logged = [(log[name], log.get("step", 0)) for log in history if _finite(log.get(name))]
        if logged:
            highest = max(logged, key=lambda pair: pair[0])  # the first of equals
            found[name] = {"last": logged[-1][0], "last_step": logged[-1][1]}
            found[name] |= {"highest": highest[0], "highest_step": highest[1]}
    return found


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def example_of(rollout: Rollout, record: RolloutRecord, step: int, secrets: Sequence[str] = ()) -> dict[str, Any]:
    """A whole dialogue in words: texts as they were, pictures by their size."""

    def part_of(part: Any) -> dict[str, Any]:
        if isinstance(part, ImagePart):
            return {"picture": list(part.image.size)}
        return {"text": without_keys(part.text, secrets)}

    return {
        "step": step,
        "messages": [{"role": one.role, "parts": [part_of(part) for part in one.parts]} for one in rollout.messages],
        "status": record.status,
        "asked": record.asked,
        "correct": record.correct,
        "reward": record.reward if math.isfinite(record.reward) else None,
        "rank": _rank(record),
    }


def _rank(record: RolloutRecord) -> list[float]:
    """How much a rollout shows: with the tool, right, well-formed."""
    reward = record.reward if math.isfinite(record.reward) else -1e9
    return [float(record.asked), float(record.correct is True), float(record.well_formed), reward]


class NoteKeeper(TrainerCallback):
    """Keeps a trainer's notes up to date: time, and the newest of the most telling dialogues."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.notes = RunNotes(
            adapter=hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config"),
            base_model=place(str(getattr(trainer.model.config, "_name_or_path", "") or "")),
            hardware=dict(Counter(gather_object([_device(trainer.accelerator.device)]))),
            versions=versions(),
        )
        sets = {"training": trainer.train_dataset, "evaluation": trainer.eval_dataset}
        self.notes.data = [{"name": "", "use": use, "rows": len(rows)} for use, rows in sets.items() if rows]
        self._since: float | None = None
        self._before = 0.0
        self.best_loaded = False  # the weights in memory are the best ones, not the newest

    def describe(self, recipe: Mapping[str, Any], run: Any) -> None:
        """Add what only a recipe knows: itself, and where model and rows came from."""
        secrets = secrets_of(self.trainer)
        self.notes.recipe = cleaned(recipe, secrets)
        for name in ("model", "dataset", "eval_dataset"):
            if isinstance(self.notes.recipe.get(name), str):
                self.notes.recipe[name] = place(recipe[name])
        self.notes.base_model, self.notes.base_revision = place(run.model), run.model_revision
        self.notes.licence = cleaned(licence_of(run.model, run.model_revision), secrets)
        named = {
            "training": (run.dataset, run.dataset_split),
            "evaluation": (run.eval_dataset or run.dataset, run.eval_split),
        }
        for entry in self.notes.data:
            name, split = named[entry["use"]]
            entry |= {"name": place(name), "split": split}

    def restore(self, checkpoint: str | Path) -> None:
        """Go on with the clock and the example of a checkpoint."""
        kept = RunNotes.read(checkpoint)
        self._before, self.notes.example, self.notes.started = kept.seconds, kept.example, kept.started

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._since, self.best_loaded = time.monotonic(), False
        self.notes.started = self.notes.started or datetime.now(UTC).isoformat(timespec="seconds")
        if args.should_save:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            self.current().write(args.output_dir)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        pairs = zip(self.trainer.last_rollouts, self.trainer.recorder.last_records, strict=True)
        best = max(pairs, key=lambda pair: _rank(pair[1]), default=None)
        if best and (self.notes.example is None or _rank(best[1])[:3] >= self.notes.example["rank"][:3]):
            self.notes.example = example_of(*best, step=state.global_step, secrets=secrets_of(self.trainer))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._before, self._since = self._seconds(), None

    def _seconds(self) -> float:
        return self._before + (0.0 if self._since is None else time.monotonic() - self._since)

    def current(self) -> RunNotes:
        """The notes as of now, for the weights as of now."""
        state, notes = self.trainer.state, self.notes
        notes.environment = environment_facts(self.trainer.runner.environment(), self.trainer.args)
        notes.seconds, notes.metrics = round(self._seconds(), 1), summary(state.log_history)
        if state.best_global_step:
            metric = self.trainer.args.metric_for_best_model
            metric = metric if metric.startswith("eval_") else f"eval_{metric}"
            notes.best = {"metric": metric, "value": state.best_metric, "step": state.best_global_step}
        notes.step = state.best_global_step if self.best_loaded else state.global_step
        return notes


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU" if device.type == "cpu" else device.type
