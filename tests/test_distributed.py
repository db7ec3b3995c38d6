"""Two CPU processes against one: the same rewards and advantages, whole groups, every row evaluated once."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from helpers import environment_of_its_own
from two_processes import JOBS, make_trainer, score

from vt_trl.transcripts import read_transcripts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def two(checkpoint, tmp_path_factory) -> dict[str, list[dict]]:
    """Job of ``two_processes.py`` -> what each of two ranks saw."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    config = str(ROOT / "recipes" / "accelerate" / "cpu.yaml")
    launch = ["accelerate.commands.launch", "--config_file", config, "--main_process_port", port]
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(ROOT / "tests" / "two_processes.py"), str(checkpoint), str(out)],
        env=environment_of_its_own(PYTHONPATH=paths, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    seen = {job: [json.loads((out / f"{job}-{rank}.json").read_text()) for rank in range(2)] for job in JOBS}
    return seen | {"completions": [read_transcripts(path) for path in sorted((out / "completions").iterdir())]}


@pytest.fixture(scope="module")
def scored(checkpoint, tmp_path_factory, two) -> dict[int, list[dict]]:
    """Number of processes -> what each rank saw of one generation of 8 rows x 4 members."""
    alone = make_trainer("score", str(checkpoint), tmp_path_factory.mktemp("one"), 32)
    return {1: [score(alone)], 2: two["score"]}


def by_row(ranks: list[dict]) -> dict[str, list[dict]]:
    """Members of each row in their order; fails when a row is on two ranks."""
    members, homes = defaultdict(list), defaultdict(set)
    for rank, seen in enumerate(ranks):
        for record in seen["records"]:
            members[record["row"]].append(record)
            homes[record["row"]].add((rank, record["group"]))
    assert all(len(home) == 1 for home in homes.values()), homes
    return members


def test_groups_are_whole_on_one_process(scored):
    for count, ranks in scored.items():
        groups = by_row(ranks)
        assert {row: len(members) for row, members in groups.items()} == {f"row-{index}": 4 for index in range(8)}
        assert [len(seen["records"]) for seen in ranks] == [32 // count] * count


def test_rewards_and_advantages_do_not_depend_on_the_number_of_processes(scored):
    one, two = by_row(scored[1]), by_row(scored[2])
    for row, members in one.items():
        for alone, shared in zip(members, two[row], strict=True):
            assert {name: alone[name] for name in ("reward", "penalty", "asked", "correct")} == {
                name: shared[name] for name in ("reward", "penalty", "asked", "correct")
            }
            assert alone["advantage"] == pytest.approx(shared["advantage"], abs=1e-6)


def test_rewards_are_the_ones_worked_out_by_hand(scored):
    """Right 1, well-formed 0.5, penalty 0.1 after Equation 5; rows repeat the four plans of two_processes.py."""
    expected = [
        [1.5, 1.5, 1.4, 0.4],  # r = 2/3: both who asked pay
        [1.5, 1.5, 0.4, 0.4],  # r = 0: both who did not ask pay
        [1.5, 0.5, 0.5, 0.5],  # r = 1: nobody asked
        [0.5, 0.5, 0.5, 0.4],  # nothing right: the one who did not ask pays
    ]
    for index in range(8):
        rewards = expected[index % 4]
        members = by_row(scored[2])[f"row-{index}"]
        assert [member["reward"] for member in members] == pytest.approx(rewards)
        centre = sum(rewards) / 4
        spread = math.sqrt(sum((reward - centre) ** 2 for reward in rewards) / 3) + 1e-4
        assert [m["advantage"] for m in members] == pytest.approx([(r - centre) / spread for r in rewards], abs=1e-5)


def test_totals_are_over_all_processes(scored):
    [one], two = scored[1], scored[2]
    assert one["items"] == one["loss_tokens"] > 0
    assert [seen["items"] for seen in two] == [one["items"]] * 2 == [sum(seen["loss_tokens"] for seen in two)] * 2
    for name in ("reward", "accuracy", "request_rate", "penalty_mean", "groups/any_request", "accuracy/easy"):
        assert two[0]["logs"][name] == two[1]["logs"][name] == pytest.approx(one["logs"][name])
    assert one["logs"]["request_rate"] == pytest.approx(7 / 16)  # 2 + 2 + 0 + 3 of 16
    assert one["logs"]["accuracy"] == pytest.approx(6 / 16)  # 3 + 2 + 1 + 0 of 16


def test_evaluation_counts_every_row_once(two):
    """7 rows, 2 processes with batches of 2: the last batch is filled up with rows seen before.

    First members of the plans: rows 0, 1, 2, 4, 5, 6 are right and row 3 is wrong, so 6/7; rows 1, 3 and 5 ask.
    Counting the filler too would give a share of eighths.
    """
    ranks = two["evaluate"]
    assert sorted({row for seen in ranks for row in seen["rows"]}) == [f"row-{index}" for index in range(7)]
    assert sum(len(seen["rows"]) for seen in ranks) > 7  # there is a filler, else this test shows nothing
    for seen in ranks:
        assert seen["metrics"]["eval_accuracy"] == pytest.approx(6 / 7)
        assert seen["metrics"]["eval_request_rate"] == pytest.approx(3 / 7)


def test_two_processes_train_one_model(two):
    """Two steps of sampling and updating: other rollouts on each rank, the same parameters to the bit."""
    first, second = two["train"]
    assert first["drawn"] != second["drawn"]
    assert first["parameters"] == second["parameters"]
    losses = [entry["loss"] for entry in first["log"] if "loss" in entry]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    norms = [entry["grad_norm"] for entry in first["log"] if "grad_norm" in entry]
    assert all(norm > 0 for norm in norms)


def test_the_table_of_a_step_holds_the_rollouts_of_both_ranks(two):
    """Each rank rolls out a group of 4 per step; every member asks, so it has two pictures."""
    first, second = two["completions"]
    assert [[one.step for one in table] for table in (first, second)] == [[1] * 8, [2] * 8]
    groups = {one.group.split("/")[0] for one in second}
    assert groups == {"0", "1"} and [one.member for one in second] == [0, 1, 2, 3] * 2
    drawn = [len(ids) for seen in two["train"] for ids in seen["drawn"]]
    assert [turn.tokens for one in second for turn in one.turns if turn.status in ("sampled", "cut")] == drawn
    assert all(len(one.images) == 2 for one in second)


def test_refill_ends_on_both_ranks_with_good_groups_only(two):
    """Half of the rows teach nothing, and the ranks lack different numbers of groups in most rounds."""
    ranks = two["refill"]
    for seen in ranks:
        assert len(seen["rows"]) == 8
        assert {int(row.removeprefix("row-")) % 2 for row in seen["rows"]} == {0}
    logs = [log for log in ranks[0]["log"] if "loss" in log]
    assert len(logs) == 2 and all(log["groups/effective_share"] == 1 for log in logs)
    assert max(log["groups/rounds"] for log in logs) > 1
    assert ranks[0]["parameters"] == ranks[1]["parameters"]
