"""Which rows need more than the first sight? Sorted by what a base model can read (VisionThink, Section 3.5).

Each row is answered several times at temperature 1, at low and at full resolution, by the environment ``direct`` and
its resolution rule, and every answer is judged. All right at both: low is enough. Full ahead by the margin: full is
needed. With ``--environment zoom``, ``look`` or your own the two ways are an answer at once and one after looking. The
rest is counted and left out. Work is kept shard by shard; a run that was killed goes on where it was.

    vt-trl prepare select --dataset ROWS --model MODEL --out FOLDER
    accelerate launch --num_processes 8 -m data_prep.select --dataset ROWS --model MODEL --out FOLDER
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep import main
from data_prep.kinds import Rule, shards_of
from data_prep.ways import RESOLUTIONS, Ways, ways_of
from data_prep.work import Work, model_print, rows_print
from vt_trl.commands.options import json_option
from vt_trl.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

    from data_prep.counting import RowCount
    from vt_trl.envs import Environment
    from vt_trl.judges import JudgeReward
    from vt_trl.rollout import RolloutRunner

logger = logging.getLogger(__name__)
_POLL = 2.0  # seconds between looks at what other processes have finished


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vt-trl prepare select", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dataset", required=True, help="rows: a folder, a file, or a Hub name")
    parser.add_argument("--split", default=None, help="split of the data set, where there are several")
    parser.add_argument("--max-rows", type=int, default=None, help="look at the first rows only")
    parser.add_argument("--model", required=True, help="base model that answers: an id or a folder")
    parser.add_argument("--revision", default=None, help="branch, tag or commit of the model")
    parser.add_argument("--out", required=True, type=Path, help="folder for work, rows and report")
    parser.add_argument("--rollouts", type=int, default=8, help="answers per row, each way")
    parser.add_argument("--margin", type=int, default=6, help="more is needed when it is ahead by this many answers")
    parser.add_argument("--size", type=int, default=None, help="rows to choose (default: as many as the share allows)")
    parser.add_argument("--share-full", type=float, default=0.5, help="share of the chosen rows that need more")
    parser.add_argument("--seed", type=int, default=0, help="of the answers and of the choice")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-turn-tokens", type=int, default=2048, help="tokens of one answer at most")
    parser.add_argument(
        "--max-completion-length", type=int, default=32_768, help="tokens of all turns and tool replies, when looking"
    )
    parser.add_argument(
        "--environment",
        default="direct",
        help="direct (low or full), or zoom, look, module:Class (at once or looking)",
    )
    parser.add_argument("--environment-args", default="{}", help="its settings as JSON, as in a recipe")
    parser.add_argument("--no-steer", action="store_true", help="when looking, do not ask the model in words to look")
    parser.add_argument("--judge", default="rule", help="rule, openai, local, cascade, or module:Class")
    parser.add_argument("--judge-args", default="{}", help="settings of the judge as JSON; never a key")
    parser.add_argument(
        "--max-failed", type=float, default=None, help="share of failed verdicts that stops the run (rule: never)"
    )
    parser.add_argument("--backend", default="auto", help="auto, vllm or transformers")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    parser.add_argument("--max-batch", type=int, default=256, help="sequences generated at a time")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="vLLM's share of the GPU")
    parser.add_argument(
        "--shard-rows", type=int, default=512, help="rows in work at a time; a kill loses one shard at most"
    )
    parser.add_argument("--examples", type=int, default=4, help="examples of each kind in the report")
    return parser


def run(options: argparse.Namespace) -> None:
    """Count, choose and report; every process counts its share, the first one does the rest.

    Raises ConfigError for settings that cannot work or differ from those of work done before, DataError for a data
    set that cannot be read, and JudgeOutage.
    """
    job = Job.of(options)
    try:
        for shard in job.missing(shards_of(job.process, job.processes, job.shards)):
            job.count(shard)
    finally:
        job.judge.close()
    if job.process == 0:
        job.wait()
        from data_prep.select_report import finish

        finish(job)


@dataclass
class Job:
    """One selection: its settings, its rows, and the work in ``out/work``."""

    options: argparse.Namespace
    rule: Rule
    ways: Ways
    dataset: Dataset
    work: Work
    judge: JudgeReward
    environment: dict[str, Any]
    process: int
    processes: int

    @classmethod
    def of(cls, options: argparse.Namespace) -> Job:
        from data_prep.counting import both_ways
        from vt_trl.data import load_rows
        from vt_trl.judges import make_judge, make_judge_reward
        from vt_trl.judges.cache import default_folder

        rule = Rule(options.rollouts, options.margin)
        environment = json_option(options.environment_args, "--environment-args")
        ways = ways_of(options.environment)
        if "resolution" in environment and ways is RESOLUTIONS:
            raise ConfigError("--environment-args names a resolution, but a selection looks at both; take it out.")
        both_ways(options.environment, environment)  # wrong settings fail here
        judge = make_judge(options.judge, json_option(options.judge_args, "--judge-args"))
        rules_only = options.judge == "rule"  # that it leaves answers open is no outage
        most = options.max_failed if options.max_failed is not None else (1.0 if rules_only else 0.1)
        reward = make_judge_reward(judge, cache_dir=default_folder(), max_failed=most)
        reward.open()
        dataset = load_rows(options.dataset, options.split, options.max_rows)
        if options.shard_rows < 1:
            raise ConfigError(f"shard_rows is {options.shard_rows}; a shard holds at least one row.")
        settings = fingerprint(options, dataset, environment, judge.fingerprint())
        process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        work = Work(options.out / "work", settings)
        job = cls(options, rule, ways, dataset, work, reward, environment, process, processes)
        if process == 0 and job.shards < processes:
            logger.warning(
                "%d shards of %d rows for %d processes: some have nothing to do. Lower --shard-rows.",
                job.shards, options.shard_rows, processes,
            )  # fmt: skip
        return job

    @property
    def shards(self) -> int:
        return -(-len(self.dataset) // self.options.shard_rows)

    def missing(self, shards: Sequence[int]) -> Any:
        """The shards of ``shards`` that nobody has finished, one by one, on a progress bar of all of them."""
        todo = [shard for shard in shards if not self.work.is_done(shard)]
        if self.process > 0:
            yield from todo
            return
        with progress_bar() as bar:
            task = bar.add_task("rows counted", total=len(self.dataset), completed=self.rows_done())
            for shard in todo:
                yield shard
                bar.update(task, completed=self.rows_done())

    def rows_done(self) -> int:
        done = sum(self.work.is_done(shard) for shard in range(self.shards)) * self.options.shard_rows
        return min(done, len(self.dataset))

    def numbers(self, shard: int) -> range:
        size = self.options.shard_rows
        return range(shard * size, min((shard + 1) * size, len(self.dataset)))

    def count(self, shard: int) -> None:
        """Count one shard and keep the result."""
        from data_prep.counting import count_rows
        from vt_trl.generation.base import SamplingSettings

        settings = SamplingSettings(temperature=self.options.temperature, seed=self.options.seed)
        rows = [(number, self.dataset[number]) for number in self.numbers(shard)]
        counts = count_rows(self.runner, rows, self.rule.rollouts, settings, self.judge, self.ways)
        self.work.write(shard, [count.as_dict() for count in counts])

    @cached_property
    def runner(self) -> RolloutRunner:
        """The rollout loop; the model is loaded when the first shard needs it."""
        from vt_trl.generation.standalone import Checkpoint, open_runner
        from vt_trl.rollout import Limits

        options = self.options
        checkpoint = Checkpoint(
            options.model,
            options.revision,
            options.backend,
            options.dtype,
            options.max_batch,
            options.gpu_memory_utilization,
        )
        turns = self.make_both().max_turns
        completion = options.max_turn_tokens if turns == 1 else options.max_completion_length
        return open_runner(checkpoint, self.make_both, Limits(options.max_turn_tokens, completion))

    @cached_property
    def make_both(self) -> Callable[[], Environment]:
        """A factory of environments that play whichever way a row names, as the model sees pictures."""
        from data_prep.counting import both_ways
        from vt_trl.generation.standalone import Checkpoint, open_parts

        options = self.options
        sight = None
        if self.ways is not RESOLUTIONS:
            sight = open_parts(Checkpoint(options.model, options.revision)).sight
        return both_ways(options.environment, self.environment, sight, not options.no_steer)

    def wait(self) -> None:
        """Until the other processes have finished their shards; a process that fails ends the whole launch."""
        if self.rows_done() == len(self.dataset):
            return
        with progress_bar() as bar:
            task = bar.add_task("rows counted by others", total=len(self.dataset))
            while self.rows_done() < len(self.dataset):
                bar.update(task, completed=self.rows_done())
                time.sleep(_POLL)

    def counts(self) -> list[RowCount]:
        """What became of every row, in order."""
        from data_prep.counting import RowCount

        return [RowCount(**record) for shard in range(self.shards) for record in self.work.read(shard)]


def fingerprint(
    options: argparse.Namespace, dataset: Dataset, environment: dict[str, Any], judge: dict[str, Any]
) -> dict[str, Any]:
    """Everything a count depends on; how rows are chosen afterwards, and by how many processes, is not part of it."""
    from vt_trl.generation.standalone import Checkpoint

    checkpoint = Checkpoint(options.model, backend=options.backend, dtype=options.dtype)
    return {
        "rows": rows_print(dataset),
        "model": model_print(options.model),
        "revision": options.revision,
        "backend": "vllm" if checkpoint.uses_vllm else "transformers",
        "dtype": checkpoint.torch_dtype,
        "rollouts": options.rollouts,
        "temperature": options.temperature,
        "max_turn_tokens": options.max_turn_tokens,
        "max_completion_length": options.max_completion_length,
        "environment": options.environment,
        "environment_args": environment,
        "steer": not options.no_steer,
        "judge": judge,
        "seed": options.seed,
        "shard_rows": options.shard_rows,
    }


def progress_bar() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    # Shards take long: an estimate over the last seconds only would have nothing to go by.
    return Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), speed_estimate_period=3600
    )


def settings_of(job: Job) -> dict[str, Any]:
    """What a report says of how it was made."""
    choice = {name: getattr(job.options, name) for name in ("size", "share_full")}
    return {**job.work.settings, "dataset": job.options.dataset, **asdict(job.rule), **choice}


if __name__ == "__main__":
    main(parser(), run)
