"""A recipe is one YAML file: what to train, on what, how. The command line overrides any line of it."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from trl import TrlParser

from vt_trl.config import VTGRPOConfig
from vt_trl.errors import ConfigError, did_you_mean
from vt_trl.loop.recipe import is_loop
from vt_trl.yaml_file import read_yaml

Settings = TypeVar("Settings")
_RESERVED = {"env"}  # a mapping of environment variables, handled by TrlParser
_ALSO_VALID = [
    ("resume_from_checkpoint", True),  # from the last checkpoint in output_dir
    ("dynamic_sampling", False),  # YAML's reading of off
]


@dataclass
class RunArguments:
    """Model and data of a run."""

    model: str = field(default="", metadata={"help": "Model id or folder of a supported family."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dtype: str = field(
        default="bfloat16",
        metadata={"help": "Weights are loaded in this type.", "choices": ["bfloat16", "float16", "float32"]},
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, flash_attention_2, eager, ..."})
    dataset: str = field(default="", metadata={"help": "Training rows: a folder, a file, or a Hub name (see data)."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split to train on, where there are several."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Rows to evaluate on; none by default."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    max_rows: int | None = field(default=None, metadata={"help": "Use the first rows only."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Evaluate on the first rows only."})
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "Rows that cannot be used stop the run, or are left out and counted.",
            "choices": ["error", "skip"],
        },
    )
    lora: str = field(
        default="none",
        metadata={
            "help": "Train an adapter on the language model, on all linear layers, or train the weights themselves.",
            "choices": ["none", "language", "all"],
        },
    )
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=128, metadata={"help": "Scale of the adapter; effective is alpha / r."})
    quantize: str = field(
        default="none",
        metadata={
            "help": "Hold the frozen weights under an adapter in 4 bits (QLoRA): the language model's linear layers.",
            "choices": ["none", "nf4"],
        },
    )
    train_vision: bool = field(
        default=True, metadata={"help": "Without an adapter: train the vision tower too, or keep it frozen."}
    )

    def __post_init__(self) -> None:
        for setting in fields(self):  # argparse looks at the command line's choices only, not at the YAML's
            choices, value = setting.metadata.get("choices"), getattr(self, setting.name)
            if choices and value not in choices:
                raise ConfigError(
                    f"{setting.name} is {value!r}.{did_you_mean(value, choices)} Use {' or '.join(choices)}."
                )
        if not self.model:
            raise ConfigError("model is not set; write it into the recipe or add `--model NAME_OR_FOLDER`.")
        if not self.dataset:
            raise ConfigError("dataset is not set; write it into the recipe or add `--dataset NAME_OR_FOLDER`.")
        if self.lora != "none" and not self.train_vision:
            raise ConfigError(
                f"train_vision is false and lora is {self.lora!r}: with an adapter the weights are frozen anyway, and "
                f"`lora: language` leaves the vision tower without one. Remove train_vision."
            )
        if self.quantize != "none" and self.lora == "none":
            raise ConfigError(
                f"quantize is {self.quantize} and lora is none: weights in 4 bits cannot be trained. Set lora: "
                f"language, or quantize: none."
            )
        if self.lora_r < 1:
            raise ConfigError(f"lora_r is {self.lora_r}; a rank is 1 or more.")


def parse_recipe(
    path: str | Path, overrides: Sequence[str] = (), kind: type[Settings] = VTGRPOConfig
) -> tuple[RunArguments, Settings]:
    """Read a recipe and apply ``--key value`` overrides; ``kind``: the settings of the trainer that it is for.

    Raises ConfigError for a file that is no recipe, for an unknown key (with the nearest valid one), for a value of
    the wrong kind, and for settings that contradict each other.
    """
    path = Path(path)
    settings = read_yaml(path)
    check_keys(settings, str(path), kind)
    check_kinds(settings, str(path), kind)
    parser = TrlParser((RunArguments, kind))
    parser.allow_abbrev = False  # a typing error must not become another setting

    def refuse(message: str) -> NoReturn:  # argparse would print the usage of all settings and leave
        shown = re.sub(r"(--hub_token[ =])\S+", r"\1***", " ".join(overrides))
        raise ConfigError(f"{path} with {shown or 'no overrides'}: {message}.")

    parser.error = refuse
    try:
        *parsed, rest = parser.parse_args_and_config(
            ["--config", str(path), *overrides], return_remaining_strings=True, fail_with_unknown_args=False
        )
    except ConfigError:
        raise
    except ValueError as error:  # the checks of TRL and transformers, in their own words
        raise ConfigError(f"{path}: {error}") from error
    unknown = [text for text in rest if text.startswith("--")]
    if rest:
        check_keys({text[2:].partition("=")[0]: None for text in unknown}, "the command line", kind)
        raise ConfigError(f"The command line has left over: {' '.join(rest)}. Write overrides as `--key value`.")
    return tuple(parsed)


def effective_settings(path: str | Path, overrides: Sequence[str], run: RunArguments, args: VTGRPOConfig) -> dict:
    """The lines of a recipe with what the command line put in their place."""
    given = [text[2:].partition("=")[0] for text in overrides if text.startswith("--")]
    return read_yaml(Path(path)) | {key: getattr(run if hasattr(run, key) else args, key) for key in given}


def check_keys(settings: Mapping[str, Any], where: str, kind: type = VTGRPOConfig) -> None:
    """Raise ConfigError for keys that no setting has, each with the nearest valid name or the command it is for."""
    known = {f.name for one in (RunArguments, kind) for f in fields(one) if f.init} | _RESERVED
    unknown = [key for key in settings if key not in known]
    if not unknown:
        return
    if is_loop(settings):
        raise ConfigError(f"{where} is the recipe of a loop: run `vt-trl loop {where}`.")
    command, others = _other_command(kind)
    theirs = [key for key in unknown if key in others]
    problems = []
    for key in unknown:
        near = [] if key in theirs else difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        problems.append(f"{key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    hint = f" A recipe with {', '.join(theirs)} is for `{command}`, so run that." if theirs else ""
    raise ConfigError(f"Unknown setting in {where}: {', '.join(problems)}.{hint}")


def _other_command(kind: type) -> tuple[str, set[str]]:
    """The command for recipes that are not for ``kind``, and the settings of its trainer."""
    from vt_trl.sft import VTSFTConfig  # which needs this module

    other, command = (VTGRPOConfig, "vt-trl train") if kind is VTSFTConfig else (VTSFTConfig, "vt-trl sft")
    return command, {f.name for f in fields(other) if f.init}


def check_kinds(settings: Mapping[str, Any], where: str, kind: type = VTGRPOConfig) -> None:
    """Raise ConfigError for values that cannot be what a setting holds.

    argparse converts and checks texts only: a number or a list that YAML has read already would pass unseen.
    """
    kinds = get_type_hints(RunArguments) | get_type_hints(kind)
    for key, value in settings.items():
        if key in kinds and not _fits(value, kinds[key]) and (key, value) not in _ALSO_VALID:
            note = " YAML reads no, off, yes and on as truth values: quote them." if isinstance(value, bool) else ""
            raise ConfigError(f"{where}: {key} is {value!r}, but it takes {_words(kinds[key])}.{note}")


def _fits(value: Any, kind: Any, text: bool = True) -> bool:
    """Whether ``value`` is of ``kind``; with ``text``, a text stands for a number or a truth value, too."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option, text) for option in get_args(kind))
    if origin is Literal:
        return value in get_args(kind)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0], text=False) for item in value)
    if isinstance(value, str):
        return kind is str or (text and kind in (bool, int, float))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else origin or kind)


def _words(kind: Any) -> str:
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    names = [str(o) if get_args(o) else o.__name__ for o in options if o is not type(None)]
    return " or ".join(names)
