"""``vt-trl judge-agreement --rows FILE --judges A B ...``"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from vt_trl.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vt-trl judge-agreement", description="Compare judges on labelled rows.")
    parser.add_argument("--rows", required=True, help="JSON lines: question, answer, prediction, optionally label")
    parser.add_argument(
        "--judges", nargs="+", required=True, help="rule, local=MODEL, openai=MODEL, cascade, module:Class, label"
    )
    parser.add_argument("--judge-args", default="{}", help='settings as JSON: \'{"local": {"device": "cpu"}}\'')
    parser.add_argument("--json", default=None, help="write the report to this file, all differing rows included")
    parser.add_argument("--show", type=int, default=40, help="differing rows to print per pair")
    return parser


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    try:
        settings = json.loads(options.judge_args)
    except ValueError as error:
        raise ConfigError(f"--judge-args is no JSON: {error}.") from error
    if not isinstance(settings, dict) or not all(isinstance(value, dict) for value in settings.values()):
        raise ConfigError('--judge-args must map judges to settings, e.g. \'{"local": {"device": "cpu"}}\'.')
    from vt_trl.judges.agreement import judge_agreement

    judge_agreement(options.rows, options.judges, settings, options.json, options.show)
