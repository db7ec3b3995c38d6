"""How hard is each row for the current model? Difficulty, three bands, and how both have moved since an earlier round.

Difficulty is the mean z-score of a language model's rating and of the current model's error rate, bands are the
clusters of k-means (OpenVLThinker, arXiv 2503.17352); one of the two measures alone will do. `vt-trl prepare filter
--band medium` then selects what a stage trains on.

    vt-trl prepare difficulty --dataset ROWS --writer local --model MODEL --rater-model gpt-4o-mini --out FOLDER
    vt-trl prepare difficulty --dataset runs/selected/rows --pass-rate right_full/8 --out FOLDER
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from data_prep import main
from data_prep.traces import add_writer_options
from data_prep.work import rows_print
from vt_trl.commands.options import json_option
from vt_trl.errors import ConfigError

REPORT = "report.json"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "vt-trl prepare difficulty", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--dataset", required=True, help="rows: a folder, a file, or a Hub name")
    parser.add_argument("--split", default=None, help="split of the data set, where there are several")
    parser.add_argument("--max-rows", type=int, default=None, help="look at the first rows only")
    parser.add_argument("--out", required=True, type=Path, help="folder for the rows and report.json")
    parser.add_argument("--before", type=Path, default=None, help="folder of an earlier round, to compare with")
    known = parser.add_argument_group("pass rate, from figures that are there")
    known.add_argument("--pass-rate", metavar="COLUMN[/N]", help="a share of right answers, or a count of N")
    known.add_argument("--evaluation", type=Path, default=None, help="folder of `vt-trl evaluate` on these rows")
    known.add_argument("--cell", default=None, help="MODEL,DATA,POLICY of an evaluation that has several")
    sampled = parser.add_argument_group("pass rate, by sampling")
    add_writer_options(sampled, required=False)
    sampled.add_argument("--samples", type=int, default=8, help="answers per row")
    sampled.add_argument("--temperature", type=float, default=1.0)
    sampled.add_argument("--environment", default="single", help="a name, or module:Class, as in a recipe")
    sampled.add_argument("--environment-args", default="{}", help="its settings as JSON, as in a recipe")
    sampled.add_argument("--judge", default="rule", help="rule, openai, local, cascade, or module:Class")
    sampled.add_argument("--judge-args", default="{}", help="settings of the judge as JSON; never a key")
    rated = parser.add_argument_group("rating")
    rated.add_argument("--rater", choices=("openai", "local"), default="openai", help="an endpoint, or a checkpoint")
    rated.add_argument("--rater-model", default=None, help="who rates: a name there, or an id or a folder")
    rated.add_argument("--rater-args", default="{}", help="JSON: its settings, as for distill; never a key")
    rated.add_argument("--rater-tokens", type=int, default=1024, help="of one reply, its thinking included")
    parser.add_argument("--seed", type=int, default=0, help="of the answers and of the clusters")
    parser.add_argument("--max-failed", type=float, default=0.1, help="share of failed requests that stops the run")
    parser.add_argument("--unit-rows", type=int, default=64, help="rows in work at a time")
    return parser


def run(options: argparse.Namespace) -> None:
    """Measure, sort into bands, write and report; a run that was killed goes on where it was.

    Raises ConfigError, DataError, and JudgeOutage when a model cannot be reached.
    """
    from data_prep.banding import earlier_round, make_report, show, write_rows
    from data_prep.bands import make_ruler
    from data_prep.measuring import measure, pass_rates
    from data_prep.shards import open_manifest
    from data_prep.speaking import make_role
    from vt_trl.data import load_rows
    from vt_trl.whole import write_whole

    by = check(options)
    before = earlier_round(options.before) if options.before else None
    dataset = load_rows(options.dataset, options.split, options.max_rows)
    rater = None
    if options.rater_model:
        settings = json_option(options.rater_args, "--rater-args")
        rater = make_role(
            "rater", options.rater, options.rater_model, settings, temperature=0.0, max_tokens=options.rater_tokens
        )
    rates = pass_rates(options, dataset)
    made_of = {
        "step": "difficulty",
        "rows": rows_print(dataset),
        "pass_rate": rates.fingerprint if rates else None,
        "rater": rater and rater.speaker.fingerprint(),
        "seed": options.seed,
        "unit_rows": options.unit_rows,
    }
    try:
        complete = open_manifest(options.out, made_of)["complete"]
        rows, counts = ([], Counter()) if complete else measure(options, dataset, rates, rater)
    finally:
        if rates:
            rates.close()
        if rater:
            rater.speaker.close()
    if complete:
        return print(f"{options.out} is complete; nothing was done.")
    ruler = make_ruler(rows, by, options.seed)
    report = make_report(options, dataset, rows, ruler, counts, before)
    write_rows(options, dataset, rows, ruler, made_of)
    write_whole(options.out / REPORT, json.dumps(report, indent=2) + "\n")
    show(report)


def check(options: argparse.Namespace) -> tuple[str, ...]:
    """Which measures there will be. Raises ConfigError for none, or for pass rates from two places."""
    named = {"--pass-rate": options.pass_rate, "--evaluation": options.evaluation, "--model": options.model}
    given = [name for name, value in named.items() if value]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are set, and a row has one pass rate; choose one of them.")
    if not given and not options.rater_model:
        raise ConfigError("there is nothing to measure; set --pass-rate, --evaluation, --model or --rater-model.")
    for name in ("samples", "unit_rows"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it counts from 1.")
    return ("error",) * bool(given) + ("rating",) * bool(options.rater_model)


if __name__ == "__main__":
    main(parser(), run)
