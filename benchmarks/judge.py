"""What judging early and asking once saves: ``python -m benchmarks.judge [--json FILE]``.

Replays a recorded training step (:mod:`benchmarks.record_step`) in real time against a real HTTP server on loopback
with a given latency, through :class:`~vt_trl.judges.openai.OpenAIJudge`, with the same concurrency either way:

- ours: each rollout goes to ``start`` of the judge's reward at the second at which it ended, as in the trainer; after
  the log-probability passes the reward is called. The wait is how much later than these phases the scores are there.
- naive: one call per completion that has an answer, all after generation. Nothing happens during generation and
  update, so they are not slept through. The wait is the time until all calls are answered.

The share of a step is wait / (generation + passes + update + wait), with the recorded seconds of the phases. How much
of the wait hides behind them depends on how long they are, so ours is replayed for a faster step as well. Verdicts are
kept in fresh memory only. The replay sleeps where a trainer computes: processor time that judging takes from the
training process is not in the wait, and is measured on its own (``cpu_seconds``, the server's part included).
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from benchmarks.judge_server import JudgeServer
from benchmarks.reporting import write
from vt_trl.judges.base import Case
from vt_trl.judges.openai import OpenAIJudge
from vt_trl.judges.prompt import Limits
from vt_trl.judges.reward import AsyncJudgeReward
from vt_trl.types import Rollout, RolloutStatus, Turn

WORKLOAD = Path(__file__).parent / "workloads" / "reading_step.jsonl.gz"
_FAST = 4  # how many times as fast
_FIGURES = (  # label, key of ours, key of naive, how it is written
    ("calls made", "calls_made", "calls_naive", "{}"),
    ("calls needed", "calls_needed", "calls_needed", "{}"),
    ("share of the step spent waiting", "wait_share", "wait_share_naive", "{:.1%}"),
    ("seconds waited", "wait_seconds", "wait_seconds_naive", "{:.1f}"),
    (f"share, were the step {_FAST} times as fast", "wait_share_fast", "wait_share_fast_naive", "{:.1%}"),
    (f"seconds, were the step {_FAST} times as fast", "wait_seconds_fast", "wait_seconds_naive", "{:.1f}"),
    ("most requests in flight", "in_flight_max", "in_flight_max_naive", "{}"),
    ("processor seconds, server included", "cpu_seconds", "cpu_seconds_naive", "{:.1f}"),
)


@dataclass(frozen=True)
class Completion:
    """One rollout of a recorded step; ``prediction`` is what a judge is asked about, None without an answer."""

    prompt: int
    question: str
    answer: list[str]
    prediction: str | None
    status: str
    ended: float  # seconds since generation began

    @property
    def case(self) -> Case | None:
        return None if self.prediction is None else Case.of(self.question, self.answer, self.prediction)

    def rollout(self) -> Rollout:
        """As much of the rollout as a judge looks at."""
        return Rollout(
            row={"question": self.question, "answer": self.answer},
            prompt_ids=[],
            completion_ids=[],
            loss_mask=[],
            logprobs=[],
            images=[],
            messages=[],
            prompt_messages=0,
            turns=[Turn("", (), (), True)],
            status=RolloutStatus(self.status),
            answer=self.prediction,
        )


@dataclass(frozen=True)
class Replay:
    """What a replay came to. ``calls`` and ``in_flight_max`` were counted by the server."""

    scores: list[float | None]
    wait_seconds: float
    cpu_seconds: float
    calls: int
    in_flight_max: int

    def wait_share(self, phases: dict[str, float]) -> float:
        return self.wait_seconds / (sum(phases.values()) + self.wait_seconds)


def read_workload(path: Path, count: int | None = None) -> tuple[dict[str, Any], list[Completion]]:
    """Header and completions of a recorded step, or its first ``count``, which must be whole groups."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        header = json.loads(next(lines))
        completions = [Completion(**json.loads(line)) for line in lines]
    group, total = header["settings"]["num_generations"], len(completions)
    count = total if count is None else count
    if not 0 < count <= total or count % group:
        raise SystemExit(f"{path.name} holds {total} completions in groups of {group}: {count} cannot be taken.")
    return header, completions[:count]


def calls_needed(completions: Sequence[Completion]) -> int:
    """Distinct cases that only a judge can decide."""
    cases = [one.case for one in completions]
    return len({case.key for case in cases if case is not None and Limits().check(case) is None})


def replay_ours(completions: Sequence[Completion], phases: dict[str, float], speed: float, **server: Any) -> Replay:
    """The step as the trainer runs it; ``phases`` and ``ended`` are divided by ``speed``."""
    rollouts = [one.rollout() for one in completions]
    order = sorted(range(len(completions)), key=lambda index: completions[index].ended)
    columns = {
        "completions": [[]] * len(rollouts),
        "answer": [one.answer for one in completions],
        "question": [one.question for one in completions],
        "rollout": rollouts,
    }

    async def ask(reward: AsyncJudgeReward) -> list[float | None]:
        return await reward(**columns)

    with _Asked(**server) as asked, closing(AsyncJudgeReward(asked.judge)) as reward:
        reward.open()
        cpu, began = time.process_time(), time.perf_counter()
        for index in order:
            _sleep_until(began + completions[index].ended / speed)
            reward.start(rollouts[index])
        due = began + (phases["generation"] + phases["passes"]) / speed
        _sleep_until(due)
        scores = asyncio.run(ask(reward))
        wait, cpu = time.perf_counter() - due, time.process_time() - cpu
    return Replay(scores, wait, cpu, asked.calls, asked.in_flight_max)


def replay_naive(completions: Sequence[Completion], **server: Any) -> Replay:
    """One call per answer, all of them when generation is over."""
    cases = [one.case for one in completions]

    async def ask(judge: OpenAIJudge) -> list[float | None]:
        judgements = await judge.judge([case for case in cases if case is not None])
        await judge.close()
        return [one.score for one in judgements]

    with _Asked(**server) as asked:
        cpu, began = time.process_time(), time.perf_counter()
        said = iter(asyncio.run(ask(asked.judge)))
        wait, cpu = time.perf_counter() - began, time.process_time() - cpu
    scores = [0.0 if case is None else next(said) for case in cases]
    return Replay(scores, wait, cpu, asked.calls, asked.in_flight_max)


class _Asked:
    """A fresh server, a judge that asks it, and afterwards what the server counted."""

    def __init__(self, latency: float, concurrency: int):
        self._server, self._concurrency = JudgeServer(latency=latency), concurrency

    def __enter__(self) -> _Asked:
        self._server.__enter__()
        self.judge = OpenAIJudge(base_url=self._server.base_url, concurrency=self._concurrency)
        with patch.dict(os.environ, OPENAI_API_KEY="none"):  # the client wants one, and a real one is not needed
            self.judge.open()
        return self

    def __exit__(self, *error: Any) -> None:
        self.calls, self.in_flight_max = len(self._server.requests), self._server.in_flight_max
        self._server.__exit__(*error)


def _sleep_until(moment: float) -> None:
    left = moment - time.perf_counter()
    if left > 0:
        time.sleep(left)


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """The replays and everything that is reported about them."""
    from demos.reading.stages import provenance

    header, completions = read_workload(options.workload, options.completions)
    server = {"latency": options.latency, "concurrency": options.concurrency}
    ours = replay_ours(completions, header["phases"], options.speed, **server)
    fast = replay_ours(completions, header["phases"], options.speed * _FAST, **server)
    naive = replay_naive(completions, **server)
    if not ours.scores == fast.scores == naive.scores or None in ours.scores:
        raise RuntimeError("The ways to judge gave different scores, or a call failed: nothing was measured.")
    phases = {name: seconds / options.speed for name, seconds in header["phases"].items()}
    shorter = {name: seconds / _FAST for name, seconds in phases.items()}
    facts = provenance()
    facts["versions"] |= {"openai": version("openai")}
    origin = ("settings", "command", "machine", "versions", "date")
    return {
        "calls_made": ours.calls,
        "calls_needed": calls_needed(completions),
        "calls_naive": naive.calls,
        "wait_share": round(ours.wait_share(phases), 4),
        "wait_share_naive": round(naive.wait_share(phases), 4),
        "wait_seconds": round(ours.wait_seconds, 2),
        "wait_seconds_naive": round(naive.wait_seconds, 2),
        "wait_share_fast": round(fast.wait_share(shorter), 4),
        "wait_share_fast_naive": round(naive.wait_share(shorter), 4),
        "wait_seconds_fast": round(fast.wait_seconds, 2),
        "in_flight_max": ours.in_flight_max,
        "in_flight_max_naive": naive.in_flight_max,
        "cpu_seconds": round(ours.cpu_seconds, 2),
        "cpu_seconds_naive": round(naive.cpu_seconds, 2),
        "mean_score": round(sum(ours.scores) / len(ours.scores), 4),
        "completions": len(completions),
        "answered": sum(one.prediction is not None for one in completions),
        "latency": options.latency,
        "concurrency": options.concurrency,
        "speed": options.speed,
        "phases": phases,
        "workload": {"file": options.workload.name, **{name: header[name] for name in origin}},
        "command": command,
        **facts,
    }


def figures(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What is shown of a report, on the screen and in benchmarks/README.md: label, ours, naive."""
    return [(label, text.format(report[ours]), text.format(report[naive])) for label, ours, naive, text in _FIGURES]


def print_report(report: dict[str, Any]) -> None:
    title = f"{report['completions']} completions, {report['latency']} s latency, {report['concurrency']} at a time"
    table = Table("", "vt_trl", "one call per completion", title=title)
    for row in figures(report):
        table.add_row(*row)
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report["phases"].items())
    Console().print(table, f"The step without judging: {phases}.", highlight=False)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judge", description=__doc__.splitlines()[0])
    parser.add_argument("--workload", type=Path, default=WORKLOAD)
    parser.add_argument("--latency", type=float, default=1.0, help="mean seconds of the server")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument(
        "--completions", type=int, default=None, help="only the first so many, as a test; phases stay the whole step's"
    )
    parser.add_argument("--speed", type=float, default=1.0, help="divides the recorded seconds, not the latency")
    parser.add_argument("--json", type=Path, default=None, help="write the report there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns the report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse_args(argv)
    report = run(options, shlex.join(["python", "-m", "benchmarks.judge", *argv]))
    print_report(report)
    write(report, options.json)
    return report


if __name__ == "__main__":
    main()
