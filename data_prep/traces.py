"""Cold-start traces: a strong model plays the environment of training, and what is right and well-formed is kept.

A trace is a row with ``replies``: one (an answer at once) or two (a call for the full picture, then an answer). Wrong
and malformed tries are rejected, counted by reason, and kept in ``rejected.jsonl``. `vt-trl sft` trains on the rest.

    vt-trl prepare traces --dataset ROWS --model gpt-4o --out FOLDER
    vt-trl prepare traces --dataset ROWS --writer local --model Qwen/Qwen2.5-VL-72B-Instruct --out FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep import main
from data_prep.work import model_print, picture_bytes, rows_print
from vt_trl.commands.options import json_option
from vt_trl.errors import ConfigError, DataError, JudgeOutage

if TYPE_CHECKING:
    from datasets import Dataset

    from data_prep.rationales import RationaleFilters
    from data_prep.shards import UnitWriter
    from data_prep.writers import Writer
    from vt_trl.boxes import Sight
    from vt_trl.judges import JudgeReward
    from vt_trl.judges.base import Judgement
    from vt_trl.types import Rollout

_ENOUGH = 4  # fewer tries say nothing about a share of failures


class WriterOutage(JudgeOutage):
    """Too many traces could not be had from the endpoint. Nothing of the unit was written; run it again."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vt-trl prepare traces", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dataset", required=True, help="rows: a folder, a file, or a Hub name")
    parser.add_argument("--split", default=None, help="split of the data set, where there are several")
    parser.add_argument("--max-rows", type=int, default=None, help="write about the first rows only")
    parser.add_argument("--out", required=True, type=Path, help="folder for the traces")
    parser.add_argument("--writer", choices=("openai", "local"), default="openai", help="an endpoint, or a checkpoint")
    parser.add_argument("--model", required=True, help="name at the endpoint, or id or folder of a checkpoint")
    parser.add_argument(
        "--endpoint-args", default="{}", help="JSON: api, base_url, concurrency, requests_per_minute, ...; never a key"
    )
    parser.add_argument("--backend", default="auto", help="of a local writer: auto, vllm or transformers")
    parser.add_argument("--dtype", default="auto", help="of a local writer: auto, bfloat16, float16 or float32")
    parser.add_argument("--max-batch", type=int, default=64, help="of a local writer: sequences at a time")
    parser.add_argument("--environment", default="resize", help="resize, or module:Class, as in a recipe")
    parser.add_argument("--environment-args", default="{}", help="its settings as JSON, as in a recipe")
    parser.add_argument("--attempts", type=int, default=2, help="tries per row at most")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-turn-tokens", type=int, default=2048, help="tokens of one reply at most")
    parser.add_argument("--seed", type=int, default=0, help="of a local writer")
    parser.add_argument(
        "--no-steer", action="store_true", help="do not tell the writer which route rows with needs_full want"
    )
    parser.add_argument(
        "--filter-model", default=None, help="also ask this model whether looks show something and texts are logical"
    )
    parser.add_argument("--filter-args", default="{}", help="JSON: settings of its endpoint; never a key")
    parser.add_argument("--judge", default="rule", help="rule, openai, local, cascade, or module:Class")
    parser.add_argument("--judge-args", default="{}", help="settings of the judge as JSON; never a key")
    parser.add_argument("--max-failed", type=float, default=0.1, help="share of failed requests that stops the run")
    parser.add_argument("--unit-rows", type=int, default=64, help="rows per shard; a kill loses one shard at most")
    return parser


def run(options: argparse.Namespace) -> None:
    """Write traces; a run that was killed or stopped goes on when it is started again.

    Raises ConfigError, DataError, and JudgeOutage when the writer or the judge cannot be reached.
    """
    from datasets import Features, List, Value

    from data_prep.units import run_units, totals
    from vt_trl.data import load_rows
    from vt_trl.envs import make_environment
    from vt_trl.judges import make_judge, make_judge_reward
    from vt_trl.judges.cache import default_folder
    from vt_trl.rows import FEATURES

    if options.attempts < 1 or options.unit_rows < 1:
        raise ConfigError("--attempts and --unit-rows count from 1.")
    environment_args = json_option(options.environment_args, "--environment-args")
    plain = make_environment(options.environment, environment_args, _sight(options))
    judge = make_judge(options.judge, json_option(options.judge_args, "--judge-args"))
    dataset = load_rows(options.dataset, options.split, options.max_rows)
    writer = make_writer(options, plain)
    filters = make_filters(options)
    reward = make_judge_reward(
        judge, cache_dir=default_folder(), max_failed=1.0 if options.judge == "rule" else options.max_failed
    )
    try:
        reward.open()
        features = Features({**FEATURES, "replies": List(Value("string")), "route": Value("string")})
        features["written_by"] = Value("string")
        if hasattr(plain(), "trace"):
            features |= {"segments": List(Value("string")), "crops": List(Value("float64"))}
        made_of = {
            "step": "traces",
            "rows": rows_print(dataset),
            **writer.fingerprint(),
            **(filters.fingerprint() if filters else {}),
            "environment": options.environment,
            "environment_args": environment_args,
            "judge": judge.fingerprint(),
            "attempts": options.attempts,
            "steer": not options.no_steer,
            "unit_rows": options.unit_rows,
        }
        numbers = range(len(dataset))
        units = [numbers[at : at + options.unit_rows] for at in range(0, len(dataset), options.unit_rows)]
        work = partial(write_unit, dataset, writer, reward, filters, plain, options)
        manifest = run_units(
            options.out,
            units,
            work,
            made_of=made_of,
            features=features,
            title="rows tried",
            keep=("rejected.jsonl",),
        )
    finally:
        reward.close()
        writer.close()
        if filters:
            filters.close()
    _say(totals(manifest), len(dataset))


def _sight(options: argparse.Namespace) -> Sight | None:
    """How a local writer sees pictures; of one behind an endpoint it is what ``boxes`` in its settings says."""
    from vt_trl.generation.standalone import Checkpoint, open_parts

    return None if options.writer == "openai" else open_parts(Checkpoint(options.model)).sight


def make_writer(options: argparse.Namespace, plain: Any) -> Writer:
    """The writer of the options, steered unless told otherwise."""
    from data_prep.writers import EndpointWriter, LocalWriter, Steered
    from vt_trl.generation.base import SamplingSettings
    from vt_trl.generation.standalone import Checkpoint, open_runner
    from vt_trl.rollout import Limits

    environment = plain if options.no_steer else lambda: Steered(plain())
    if options.writer == "openai":
        settings = json_option(options.endpoint_args, "--endpoint-args")
        return EndpointWriter(options.model, environment, options.temperature, options.max_turn_tokens, **settings)
    checkpoint = Checkpoint(options.model, backend=options.backend, dtype=options.dtype, max_batch=options.max_batch)
    turns = environment().max_turns
    limits = Limits(options.max_turn_tokens, options.max_turn_tokens * turns + 8192)  # and the full picture
    about = {"writer": "local", "model": model_print(options.model), "temperature": options.temperature}
    about |= {"max_turn_tokens": options.max_turn_tokens, "seed": options.seed}
    about |= {"backend": "vllm" if checkpoint.uses_vllm else "transformers", "dtype": checkpoint.torch_dtype}
    settings = SamplingSettings(temperature=options.temperature, seed=options.seed)
    return LocalWriter(open_runner(checkpoint, environment, limits), settings, about)


def make_filters(options: argparse.Namespace) -> RationaleFilters | None:
    """The filters on looks and texts, where they are wanted."""
    from data_prep.rationales import RationaleFilters

    if options.filter_model is None:
        return None
    return RationaleFilters(options.filter_model, **json_option(options.filter_args, "--filter-args"))


def write_unit(
    dataset: Dataset,
    writer: Writer,
    judge: JudgeReward,
    filters: RationaleFilters | None,
    environment: Any,
    options: argparse.Namespace,
    numbers: Sequence[int],
    out: UnitWriter,
) -> None:
    """Try the rows of one unit until each has a trace or no try is left."""
    from vt_trl.data import episode_row

    rows: dict[int, dict[str, Any]] = {}
    for number in numbers:
        stored = dataset[number]
        try:
            decoded = episode_row(stored)
            environment().reset(decoded)
            rows[number] = decoded
        except DataError as error:
            _reject(out, number, stored, 0, "bad_row", error.reason)
    accepted: dict[int, Rollout] = {}
    for attempt in range(options.attempts):
        left = [number for number in rows if number not in accepted]
        tries = writer.write([rows[number] for number in left], attempt)
        _check_outage([one for one in tries if isinstance(one, str)], len(tries), options.max_failed)
        judged = iter(judge.judged([one for one in tries if not isinstance(one, str)]))
        passed: dict[int, Rollout] = {}
        for number, one in zip(left, tries, strict=True):
            if isinstance(one, str):
                _reject(out, number, rows[number], attempt, "writer_failed", one)
                continue
            reason = fault_of(one, next(judged), steered=not options.no_steer)
            if reason is None:
                passed[number] = one
            else:
                _reject(out, number, rows[number], attempt, reason, one.answer, [turn.text for turn in one.turns])
        accepted |= _filtered(passed, filters, rows, attempt, options.max_failed, out)
    for number in rows:
        if number in accepted:
            out.add(trace_row(dataset[number], accepted[number], options.model))
        else:
            out.counts["rows_without_trace"] += 1


def _filtered(
    passed: Mapping[int, Rollout],
    filters: RationaleFilters | None,
    rows: Mapping[int, Mapping[str, Any]],
    attempt: int,
    max_failed: float,
    out: UnitWriter,
) -> dict[int, Rollout]:
    """The tries that the filters let through; the others are rejected with the filter's name."""
    if filters is None:
        return dict(passed)
    reasons = filters.reasons(list(passed.values()))
    failures = [str(one) for one in reasons if isinstance(one, Exception)]
    _check_outage(failures, len(reasons), max_failed, "filters")
    kept = {}
    for (number, one), reason in zip(passed.items(), reasons, strict=True):
        if reason is None:
            kept[number] = one
            continue
        failed = isinstance(reason, Exception)
        name, detail = ("filter_failed", str(reason)) if failed else (reason, one.answer)
        _reject(out, number, rows[number], attempt, name, detail, [turn.text for turn in one.turns])
    return kept


def fault_of(rollout: Rollout, judgement: Judgement, steered: bool) -> str | None:
    """Why a try is no trace, or None. Form comes first: a right answer in a wrong form would teach the form."""
    from vt_trl.judges.base import Verdict
    from vt_trl.types import RolloutStatus

    if rollout.faults:
        return f"malformed/{rollout.faults[0]}"
    if rollout.status is not RolloutStatus.ANSWERED:
        return f"status/{rollout.status}"
    if judgement.verdict is not Verdict.RIGHT:
        return "wrong" if judgement.verdict is Verdict.WRONG else "judge_failed"
    wanted = rollout.row.get("needs_full")
    return "wrong_route" if steered and wanted is not None and wanted != rollout.asked else None


def trace_row(stored: Mapping[str, Any], rollout: Rollout, model: str) -> dict[str, Any]:
    """The stored row with what the writer said; columns that rows do not define are left behind."""
    from data_prep.rationales import frame_free
    from vt_trl.rows import FEATURES

    row = {name: value for name, value in stored.items() if name in FEATURES}
    said = {"replies": [turn.text for turn in rollout.turns], "route": "asked" if rollout.asked else "direct"}
    said |= frame_free(rollout)
    return {**row, "image": picture_bytes(stored["image"]), **said, "written_by": model}


def _reject(
    out: UnitWriter,
    number: int,
    row: Mapping[str, Any],
    attempt: int,
    reason: str,
    detail: str | None,
    replies: Sequence[str] = (),
) -> None:
    out.counts[f"rejected/{reason}"] += 1
    said = {"attempt": attempt, "reason": reason, "detail": detail, "replies": list(replies)}
    out.note("rejected.jsonl", {"number": number, "id": row.get("id"), "gold": row.get("answer"), **said})


def _check_outage(failures: Sequence[str], tries: int, most: float, who: str = "writer") -> None:
    if failures and (tries >= _ENOUGH or len(failures) == tries) and len(failures) / tries > most:
        raise WriterOutage(
            f"{len(failures)} of {tries} requests to the {who} failed, more than --max-failed ({most:.0%}) allows. "
            f"The last error: {failures[-1]}. Mend it and run the same command again: finished shards are kept."
        )


def _say(counts: Mapping[str, int], rows: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{counts.get('rows', 0)} traces of {rows} rows")
    table.add_column("")
    table.add_column("tries or rows", justify="right")
    for name in sorted(counts):
        table.add_row(name, str(counts[name]))
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main(parser(), run)
