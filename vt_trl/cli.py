"""The ``vt-trl`` command. Each command imports what it needs when it runs, so that help and errors come at once."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from vt_trl import __version__
from vt_trl.errors import CheckpointError, ConfigError, DataError, JudgeOutage, SamplingShortfall


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vt-trl", description="Train VLMs to look only as closely as needed.")
    parser.add_argument("--version", action="version", version=f"vt-trl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a recipe; `--key value` overrides a line of it")
    train.add_argument("recipe", help="a YAML file, see recipes/README.md")
    play = commands.add_parser("play", help="answer as the policy, and see status and reward")
    play.add_argument("recipe")
    play.add_argument("--row", type=int, default=0, help="number of the row to play, from 0")
    play.add_argument("--pictures", default=None, help="folder for the pictures shown (default: a temporary one)")
    commands.add_parser("preflight", help="will it fit? memory, tokens and seconds of a recipe, without a GPU")
    agreement = commands.add_parser("judge-agreement", help="compare judges on labelled rows")
    agreement.add_argument("--rows", required=True, help="JSON lines: question, answer, prediction, optionally label")
    agreement.add_argument(
        "--judges", nargs="+", required=True, help="rule, local=MODEL, openai=MODEL, cascade, module:Class, label"
    )
    agreement.add_argument("--judge-args", default="{}", help='settings as JSON: \'{"local": {"device": "cpu"}}\'')
    agreement.add_argument("--json", default=None, help="write the report to this file, all differing rows included")
    agreement.add_argument("--show", type=int, default=40, help="differing rows to print per pair")
    return parser


def _judge_agreement(options: argparse.Namespace) -> None:
    from vt_trl.judges.agreement import judge_agreement

    try:
        settings = json.loads(options.judge_args)
    except ValueError as error:
        raise ConfigError(f"--judge-args is no JSON: {error}.") from error
    if not isinstance(settings, dict) or not all(isinstance(value, dict) for value in settings.values()):
        raise ConfigError('--judge-args must map judges to settings, e.g. \'{"local": {"device": "cpu"}}\'.')
    judge_agreement(options.rows, options.judges, settings, options.json, options.show)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; ``vt-trl RECIPE.yaml`` is short for ``vt-trl train RECIPE.yaml``. Returns the exit status.

    0: done; 1: the run had to stop; 2: settings or data that cannot work; 143: ended in order by SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv.insert(0, "train")
    if argv[:1] == ["preflight"]:  # its options are kept with what they mean, behind slow imports
        from vt_trl.preflight.__main__ import main as preflight

        return preflight(argv[1:])
    parser = _parser()
    options, overrides = parser.parse_known_args(argv)
    try:
        if options.command == "train":
            from vt_trl.resume import TERMINATED
            from vt_trl.run import train

            return TERMINATED if train(options.recipe, overrides).end_in_order.asked else 0
        elif options.command == "play":
            from vt_trl.play import play

            play(options.recipe, overrides, row=options.row, folder=options.pictures)
        elif overrides:
            parser.error(f"unrecognized arguments: {' '.join(overrides)}")
        elif options.command == "judge-agreement":
            _judge_agreement(options)
    except (ConfigError, DataError) as error:  # the user's to mend before anything can start
        print(f"vt-trl: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, JudgeOutage, SamplingShortfall) as error:  # the run's, which can be resumed
        print(f"vt-trl: {error}", file=sys.stderr)
        return 1
    return 0
