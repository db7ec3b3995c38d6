"""``vt-trl evaluate --model MODEL ... --data ROWS ... [--policies ...] [--out FOLDER]``"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vt_trl.commands.options import add_model_options, json_option, model_settings

POLICIES = ("two-turn", "always-full", "always-low")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vt-trl evaluate", description="Evaluate models on data under policies.")
    parser.add_argument("--model", nargs="+", required=True, help="folders or Hub names, or NAME=PLACE")
    parser.add_argument("--data", nargs="+", required=True, help="rows as for training, or NAME=PLACE")
    parser.add_argument(
        "--policies",
        nargs="+",
        default=POLICIES,
        help="two-turn, zoom, look, always-full, always-low, always-ask, share=0.3, module:Class",
    )
    parser.add_argument("--out", default="runs/evaluation", help="a folder; what it holds already is not done again")
    parser.add_argument("--split", default=None, help="split of the data sets")
    parser.add_argument("--limit", type=int, default=None, help="the first rows of each data set only")
    parser.add_argument("--judge", default="rule", help="rule, openai, local, cascade or module:Class")
    parser.add_argument("--judge-args", default="{}", help="settings of the judge, as JSON; never a key")
    parser.add_argument(
        "--judge-max-failed",
        type=float,
        default=None,
        help="share of failed verdicts that stops the run (remote: 0.1)",
    )
    parser.add_argument("--shard-rows", type=int, default=64, help="rows played together and saved together")
    parser.add_argument("--seed", type=int, default=0, help="draws the rows of share=...")
    parser.add_argument("--layout", default="plain", choices=("plain", "paper"), help="what is printed at the end")
    add_model_options(parser)
    return parser


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from vt_trl.evaluation.run import Plan, named
    from vt_trl.evaluation.show import evaluate_and_show

    plan = Plan(
        models=named(options.model),
        data=named(options.data),
        policies=list(options.policies),
        split=options.split,
        limit=options.limit,
        judge=options.judge,
        judge_args=json_option(options.judge_args, "--judge-args"),
        judge_max_failed=options.judge_max_failed,
        environment_args=json_option(options.environment_args, "--environment-args"),
        model_settings=model_settings(options),
        shard_rows=options.shard_rows,
        seed=options.seed,
    )
    evaluate_and_show(plan, options.out, paper=options.layout == "paper")
