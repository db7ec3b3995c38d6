"""``vt-trl``: finds the command (:mod:`vt_trl.commands`), runs it, and says in one line what went wrong."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from vt_trl import __version__
from vt_trl.commands import COMMANDS
from vt_trl.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineOutage,
    JudgeOutage,
    SamplingShortfall,
    StageFailed,
)

_RESUMABLE = (CheckpointError, EngineOutage, JudgeOutage, SamplingShortfall, StageFailed)  # the run's, not the user's


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vt-trl", description="Train VLMs to look only as closely as needed.")
    parser.add_argument("--version", action="version", version=f"vt-trl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    return parser


def parse(argv: Sequence[str]) -> tuple[ModuleType, argparse.Namespace, list[str]]:
    """The module of a command line, its options, and the lines of the recipe it overrides; exits as argparse does."""
    _parser().parse_args(argv[:1])  # help, version, and names that do not exist
    module = importlib.import_module(COMMANDS[argv[0]].module)
    parser = module.parser()
    options, overrides = parser.parse_known_args(argv[1:])
    if overrides and not hasattr(options, "recipe"):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    return module, options, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; ``vt-trl RECIPE.yaml`` is short for ``vt-trl train RECIPE.yaml``. Returns the exit status.

    0: done; 1: the run had to stop; 2: settings or data that cannot work; 143: ended in order by SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv.insert(0, "train")
    return explained(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int | None:
    module, options, overrides = parse(argv)
    return module.run(options, overrides)


def explained(run: Callable[[], int | None]) -> int:
    """The exit status of ``run``; its errors become one line each."""
    try:
        return run() or 0
    except (ConfigError, DataError) as error:  # the user's to mend before anything can start
        print(f"vt-trl: {error}", file=sys.stderr)
        return 2
    except _RESUMABLE as error:
        print(f"vt-trl: {error}", file=sys.stderr)
        return 1
