"""What a stage can be, and its command line: a ``vt-trl`` command that leaves something, or a module of one's own.

``train`` and ``sft`` read a recipe, which is written for them; the others take options. Options are checked against
the parser of the very command, so that a typing error is found before the first stage runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import yaml

from vt_trl.commands import COMMANDS
from vt_trl.errors import ConfigError, did_you_mean
from vt_trl.redact import names_secret, without_keys

TRAINERS = ("train", "sft")
_OUTPUTS = ("out", "output_dir")
_EMPTIED = ("export",)  # commands that want a new folder, so a killed one starts over


@dataclass(frozen=True)
class Kind:
    """``train``, ``sft``, ``evaluate``, ``prepare traces``, ``module demos.loop.start``, ..."""

    run: str

    @property
    def trains(self) -> bool:
        return self.run in TRAINERS

    @property
    def module(self) -> str | None:
        head, _, name = self.run.partition(" ")
        return name if head == "module" else None

    @property
    def output(self) -> str:
        """The setting that names the output folder."""
        return "output_dir" if self.trains else "out"

    @property
    def goes_on(self) -> bool:
        """Whether a killed run goes on with what it left in its folder; a module says so itself (``resumes``)."""
        return self.run not in _EMPTIED and self.module is None

    @property
    def launches(self) -> bool:
        """Whether several processes can share its work."""
        return self.trains or self.run == "prepare select" or self.module is not None

    def parser(self) -> argparse.ArgumentParser:
        """The parser of the command's options; not for what trains."""
        return _parser(self.run)

    def command(self) -> list[str]:
        """The words after ``python -m`` or ``accelerate launch -m``."""
        if self.run == "prepare select":
            return ["data_prep.select"]  # which may be launched on several processes
        return [self.module] if self.module else ["vt_trl", *self.run.split()]


def kind_of(run: str, where: str) -> Kind:
    """The kind called ``run``. Raises ConfigError, with the nearest, for one that there is not."""
    from data_prep import STEPS

    head, _, rest = run.partition(" ")
    steps = [f"prepare {step}" for step in STEPS]
    if run in TRAINERS or run in steps or (head == "module" and rest and " " not in rest):
        return Kind(run)
    if run in COMMANDS and run != "loop" and not rest and _has_output(_parser(run)):
        return Kind(run)
    if run in COMMANDS and run != "prepare":
        raise ConfigError(f"{where}: run is {run!r}, which leaves nothing that another stage could use.")
    usable = [*TRAINERS, "evaluate", "export", *steps]
    raise ConfigError(
        f"{where}: run is {run!r}, which is unknown.{did_you_mean(run, usable)} Use {', '.join(usable)}, or "
        f"`module NAME` of your own."
    )


@cache
def _parser(run: str) -> argparse.ArgumentParser:
    from data_prep import STEPS

    head, _, rest = run.partition(" ")
    name = STEPS[rest].module if head == "prepare" else rest if head == "module" else COMMANDS[run].module
    try:
        return importlib.import_module(name).parser()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"run is {run!r}, but {error}. A module of your own has `parser()` with an --out option, and can be "
            f"imported from where you start the loop."
        ) from error


def _has_output(parser: argparse.ArgumentParser) -> bool:
    return any("--out" in action.option_strings for action in parser._actions)


def seed_name(kind: Kind) -> bool:
    """Whether the command has a seed."""
    return kind.trains or "seed" in option_names(kind.parser())


def option_names(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Its options and positional arguments by the name they have in a recipe: ``max_turn_tokens``."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        name = max(action.option_strings, key=len).lstrip("-") if action.option_strings else action.dest
        found[name.replace("-", "_")] = action
    return found


def arguments(parser: argparse.ArgumentParser, options: Mapping[str, Any], where: str) -> list[str]:
    """The command line of options: mappings as JSON, lists as several words, true as a flag, null left out.

    Raises ConfigError for an option that does not exist, with the nearest, and for what the parser refuses.
    """
    known, words, places = option_names(parser), [], {}
    for name, value in options.items():
        action = known.get(name.replace("-", "_"))
        if action is None:
            raise ConfigError(f"{where}: {name!r} is no option of it.{did_you_mean(name, known)}")
        if value is None or (value is False and action.nargs == 0):
            continue
        texts = [_text(one) for one in (value if isinstance(value, list) else [value])]
        if not action.option_strings:
            places[action.dest] = texts
        elif action.nargs == 0:
            if value is not True:
                raise ConfigError(f"{where}: {name} is {value!r}; it is a switch, so write true or false.")
            words.append(max(action.option_strings, key=len))
        elif action.nargs in ("+", "*") or isinstance(action.nargs, int):
            words += [max(action.option_strings, key=len), *texts]
        else:
            words += [f"{max(action.option_strings, key=len)}={text}" for text in texts]
    ordered = [text for action in known.values() for text in places.get(action.dest, []) if not action.option_strings]
    _try(parser, [*ordered, *words], where)
    return [*ordered, *words]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, Mapping | bool) else str(value)


def _try(parser: argparse.ArgumentParser, words: list[str], where: str) -> None:
    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{where}: {message}.")

    own, parser.error = parser.error, refuse
    try:
        parser.parse_args(words)
    finally:
        parser.error = own


def launcher(launch: Mapping[str, Any], where: str) -> list[str]:
    """``accelerate launch`` with options, or nothing for a plain process. Raises ConfigError for unknown ones."""
    if not launch:
        return [sys.executable]
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    known = option_names(parser)
    for name in launch:
        if name.replace("-", "_") not in known or not known[name.replace("-", "_")].option_strings:
            raise ConfigError(
                f"{where}: launch has {name!r}, which `accelerate launch` does not.{did_you_mean(name, known)}"
            )
    file = launch.get("config_file")
    if file is not None and not Path(str(file)).is_file():
        raise ConfigError(f"{where}: launch.config_file is {file!r}, and there is no such file.")
    words = arguments(parser, {**launch, "training_script": "vt_trl"}, f"{where}: launch")[1:]
    return [sys.executable, "-m", "accelerate.commands.launch", *words]


def processes(launch: Mapping[str, Any]) -> int:
    """How many processes a launch starts."""
    from vt_trl.preflight.launch import launch_from_file

    if "num_processes" in launch:
        return int(launch["num_processes"])
    return launch_from_file(launch["config_file"]).processes if launch.get("config_file") else 1


def check_training(kind: Kind, settings: Mapping[str, Any], count: int, where: str) -> Any:
    """The settings of a trainer, parsed as the command would parse them on ``count`` processes, but on a CPU.

    Raises ConfigError as the command would. The environment of this process stays as it is.
    """
    from vt_trl.config import VTGRPOConfig
    from vt_trl.preflight.planned import world_of
    from vt_trl.recipe import parse_recipe
    from vt_trl.sft import VTSFTConfig

    with tempfile.TemporaryDirectory() as folder, _own_environment(), world_of(count):
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")
        try:
            words = [] if settings.get("use_cpu") else ["--use_cpu", "true"]  # this process takes no GPU
            return parse_recipe(path, words, VTSFTConfig if kind.run == "sft" else VTGRPOConfig)
        except ConfigError as error:
            text = str(error).replace(" with --use_cpu true", "")
            text = text.replace(str(path), where) if str(path) in text else f"{where}: {text}"
            raise ConfigError(text) from error


@contextmanager
def _own_environment() -> Iterator[None]:
    """Whatever a recipe puts into the environment is for its own process."""
    before = os.environ.copy()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _is_key(text: str) -> bool:
    """Whether a setting looks like a key; a Hub name that begins like one (hf-internal-testing/...) does not."""
    return without_keys(text) != text and ("/" not in text or "://" in text)


def refuse_keys(settings: Any, where: str, name: str = "") -> None:
    """Raise ConfigError for a key or a token in a recipe: they belong into the environment, and never into a file."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            refuse_keys(value, where, str(key))
    elif isinstance(settings, list):
        for value in settings:
            refuse_keys(value, where, name)
    elif isinstance(settings, str) and settings and (names_secret(name) or _is_key(settings)):
        raise ConfigError(
            f"{where}: {name or 'a setting'} looks like a key or a token. Keys are read from the environment and have "
            f"no place in a recipe; remove it there."
        )
