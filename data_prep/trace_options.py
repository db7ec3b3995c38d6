"""What the steps that write traces have in common on the command line, and how such a step runs from end to end."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from data_prep.work import rows_print
from vt_trl.commands.options import json_option
from vt_trl.errors import ConfigError, DataError
from vt_trl.whole import write_whole

if TYPE_CHECKING:
    from data_prep.hygiene import Hygiene
    from data_prep.rationales import RationaleFilters
    from data_prep.writers import Writer
    from vt_trl.envs import Environment


def add_trace_options(
    parser: argparse.ArgumentParser, *, environment: str, attempts: int, samples: int, hygiene: str | None
) -> None:
    """Options of a step that writes traces, with what is usual for it."""
    parser.add_argument("--dataset", required=True, help="rows: a folder, a file, or a Hub name")
    parser.add_argument("--split", default=None, help="split of the data set, where there are several")
    parser.add_argument("--max-rows", type=int, default=None, help="write about the first rows only")
    parser.add_argument("--environment", default=environment, help="a name, or module:Class, as in a recipe")
    parser.add_argument("--environment-args", default="{}", help="its settings as JSON, as in a recipe")
    parser.add_argument("--attempts", type=int, default=attempts, help="rounds of tries per row at most")
    parser.add_argument("--samples", type=int, default=samples, help="tries per row and round, each drawn for itself")
    parser.add_argument("--keep", choices=("shortest", "all"), default="shortest", help="of a row's good tries")
    parser.add_argument("--hygiene", default=hygiene, help="rules for traces as JSON; '{}': the usual ones")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--judge", default="rule", help="rule, openai, local, cascade, or module:Class")
    parser.add_argument("--judge-args", default="{}", help="settings of the judge as JSON; never a key")
    parser.add_argument("--max-failed", type=float, default=0.1, help="share of failed requests that stops the run")
    parser.add_argument("--unit-rows", type=int, default=64, help="rows per shard; a kill loses one shard at most")


def run_traces(
    options: argparse.Namespace,
    make_writer: Callable[[], Writer],
    environment: Callable[[], Environment],
    *,
    step: str,
    written_by: str,
    steered: bool = False,
    filters: RationaleFilters | None = None,
    spent: Callable[[Mapping[str, int]], dict[str, Any]],
    usual: Mapping[str, Any] | None = None,
) -> None:
    """Write traces with a writer, and report; a run that was stopped goes on when it is started again.

    ``spent``: from a run's counts to what each model has cost; ``usual``: rules of hygiene that are usual here.
    Raises ConfigError, DataError, JudgeOutage.
    """
    from data_prep.tracing import REJECTED, Tracing
    from data_prep.units import run_units, totals
    from vt_trl.data import load_rows
    from vt_trl.judges import make_judge, make_judge_reward
    from vt_trl.judges.cache import default_folder

    rules = rules_of(options, usual or {})
    judge = make_judge(options.judge, json_option(options.judge_args, "--judge-args"))
    dataset = load_rows(options.dataset, options.split, options.max_rows)
    made_of = {"step": step, "rows": rows_print(dataset), "judge": judge.fingerprint(), "steer": steered}
    made_of |= {"hygiene": rules and rules.as_dict(), **(filters.fingerprint() if filters else {})}
    made_of |= {name: getattr(options, name) for name in ("environment", "seed", "attempts", "samples", "keep")}
    made_of |= {"environment_args": json_option(options.environment_args, "--environment-args")}
    made_of |= {"unit_rows": options.unit_rows}
    most = 1.0 if options.judge == "rule" else options.max_failed
    units = [range(at, min(at + options.unit_rows, len(dataset))) for at in range(0, len(dataset), options.unit_rows)]
    writer = make_writer()
    reward = make_judge_reward(judge, cache_dir=default_folder(), max_failed=most)
    try:
        reward.open()
        work = Tracing(dataset, writer, reward, environment, written_by)
        work.attempts, work.samples, work.keep = options.attempts, options.samples, options.keep
        work.max_failed, work.steered, work.filters, work.hygiene = options.max_failed, steered, filters, rules

        def plan(folder: Any) -> list[range]:
            if hasattr(writer, "before"):
                writer.before(playable(dataset, unit) for unit in units)
            return units

        manifest = run_units(
            options.out,
            plan,
            work,
            made_of=made_of | writer.fingerprint(),
            features=trace_features(environment()),
            title="rows tried",
            keep=(REJECTED,),
        )
    finally:
        reward.close()
        writer.close()
    counts = totals(manifest)
    report(options, counts, spent(counts))


def rules_of(options: argparse.Namespace, usual: Mapping[str, Any]) -> Hygiene | None:
    """The rules for traces, None without; and every count is looked at. Raises ConfigError."""
    from data_prep.hygiene import Hygiene

    for name in ("attempts", "samples", "unit_rows"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it counts from 1.")
    return None if options.hygiene is None else Hygiene.of(json_option(options.hygiene, "--hygiene"), **usual)


def playable(dataset: Any, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of these numbers that can be decoded; the others are counted when their unit is run."""
    from vt_trl.data import episode_row

    rows = []
    for number in numbers:
        with suppress(DataError):
            rows.append(episode_row(dataset[number]))
    return rows


def trace_features(environment: Environment) -> Any:
    """Columns of a trace: those of a row, ``replies``, ``route``, ``written_by``, and the frame-free ones of looks."""
    from datasets import Features, List, Value

    from vt_trl.rows import FEATURES

    features = Features({**FEATURES, "replies": List(Value("string")), "route": Value("string")})
    features["written_by"] = Value("string")
    if hasattr(environment, "trace"):
        features |= {"segments": List(Value("string")), "crops": List(Value("float64"))}
    return features


def report(options: argparse.Namespace, counts: Counter[str], spent: Mapping[str, Any]) -> None:
    """Write ``report.json`` and show its tables: what became of rows and tries by source, and what it cost."""
    from rich.console import Console

    from data_prep.fates import report_of, shares_kept, show_fates
    from data_prep.tracing import hygiene_report

    rows, samples = report_of(counts, "row"), report_of(counts, "sample")
    shares = {"rows": shares_kept(rows), "samples": shares_kept(samples)}
    found = {
        "rows": rows,
        "samples": samples,
        "share_kept": shares,
        "hygiene": hygiene_report(counts, counts["rows"]),
        "spent": spent,
    }
    write_whole(options.out / "report.json", json.dumps(found, indent=2) + "\n")
    show_fates(rows, "rows", stderr=True)
    show_fates(samples, "tries", stderr=True)
    console = Console(stderr=True)
    for role, one in spent.items():
        cost = f", {one['cost']:.2f} by the prices given" if "cost" in one else ""
        console.print(
            f"{role}: {one['replies']} replies, {one['prompt_tokens']} tokens read, {one['tokens']} written{cost}",
            markup=False,
        )
