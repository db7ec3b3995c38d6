"""Two processes with DDP, FSDP2 and ZeRO against one: the same losses and weights; resuming; uneven sampling."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import environment_of_its_own

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-5  # absolute, in fp32: sums over samples are taken in another order


def run(job: str, checkpoint: Path, out: Path, config: Path | None = None) -> dict[str, list[dict]]:
    """What every rank saw of each job of ``scale_out.py``; alone without ``config``, an accelerate file."""
    out.mkdir(exist_ok=True)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    launch = []
    if config is not None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", port]
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "tests" / "scale_out.py"), job, str(checkpoint), str(out)],
        env=environment_of_its_own(PYTHONPATH=paths, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    ranks = 1 if config is None else 2
    return {name: [json.loads((out / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]
            for name in job.split(",")}  # fmt: skip


def shipped(name: str, folder: Path) -> Path:
    """A launch configuration of ``recipes/accelerate``, for two processes and in fp32."""
    settings = yaml.safe_load((ROOT / "recipes" / "accelerate" / f"{name}.yaml").read_text())
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings | {"num_processes": 2, "mixed_precision": "no"}))
    return path


@pytest.fixture(scope="module")
def seen(checkpoint, tmp_path_factory) -> dict[str, dict[str, list[dict]]]:
    root = tmp_path_factory.mktemp("scale_out")
    return {
        "one": run("losses", checkpoint, root / "one"),
        "ddp": run("losses,resumed", checkpoint, root / "ddp", shipped("cpu", root)),
        "fsdp2": run("losses,resumed,uneven", checkpoint, root / "fsdp2", shipped("fsdp2", root)),
    }


@pytest.fixture(scope="module")
def with_deepspeed(checkpoint, tmp_path_factory) -> dict[str, dict[str, list[dict]]]:
    """DeepSpeed compiles its communication on CPUs, which takes a minute the first time."""
    pytest.importorskip("deepspeed")
    root = tmp_path_factory.mktemp("deepspeed")
    return {
        "one": run("adam", checkpoint, root / "one"),
        "zero2": run("adam,resumed", checkpoint, root / "zero2", shipped("zero2", root)),
        "zero3": run("adam,resumed,uneven", checkpoint, root / "zero3", shipped("zero3", root)),
    }


def check_alike(one: dict, two: dict, steps: int = 4) -> None:
    assert len(one["log"]) == len(two["log"]) == steps
    for alone, shared in zip(one["log"], two["log"], strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], abs=TOLERANCE)
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], abs=TOLERANCE)
        assert shared["entropy"] == pytest.approx(alone["entropy"], abs=1e-4)
        assert shared["kl"] == pytest.approx(alone["kl"], abs=1e-4)
    assert one["log"][0]["grad_norm"] > 0.1  # there is something to compare
    assert one["log"][-1]["kl"] > 1e-4  # the weights have moved
    assert two["sums"] == {name: pytest.approx(value, rel=1e-5) for name, value in one["sums"].items()}


def check_resumed(ranks: list[dict]) -> None:
    """To the bit: rollouts left over, optimizer, order of data and random states are those of the run that was cut."""
    for rank in ranks:
        whole, cut = rank["at once"], rank["in two"]
        assert len(whole["losses"]) == 4
        assert cut == whole


def check_uneven(ranks: list[dict]) -> None:
    first, second = ranks
    assert (max(first["turns"]), max(second["turns"])) == (2, 1)
    assert first["losses"] == second["losses"] and len(first["losses"]) == 2
    assert first["sums"] == second["sums"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("batches", ["whole", "accumulated"])
def test_two_processes_give_the_losses_and_weights_of_one(seen, engine, batches):
    one, two = seen["one"]["losses"][0][batches], seen[engine]["losses"][0][batches]
    assert (two["kind"], two["sharded"]) == {"ddp": ("MULTI_CPU", False), "fsdp2": ("FSDP", True)}[engine]
    check_alike(one, two)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_resume_in_the_middle_of_a_generation(seen, engine):
    check_resumed(seen[engine]["resumed"])


def test_fsdp2_samples_where_one_process_needs_more_rounds_than_the_other(seen):
    """Every forward of a sharded model gathers weights; a process that is done must not be waited for."""
    check_uneven(seen["fsdp2"]["uneven"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_zero_gives_the_losses_and_weights_of_one_process_and_resumes(with_deepspeed, engine):
    for batches in ("whole", "accumulated"):
        one, two = with_deepspeed["one"]["adam"][0][batches], with_deepspeed[engine]["adam"][0][batches]
        assert (two["kind"], two["sharded"]) == ("DEEPSPEED", engine == "zero3")
        check_alike(one, two)
    check_resumed(with_deepspeed[engine]["resumed"])


@pytest.mark.slow
def test_zero_3_samples_where_one_process_needs_more_rounds_than_the_other(with_deepspeed):
    check_uneven(with_deepspeed["zero3"]["uneven"])


@pytest.mark.vllm
def test_two_processes_share_one_vllm_engine(tmp_path):
    """Each gets the rollouts of its own rows, of other lengths than the other's, and the trainer's log-probabilities
    agree with those of the engine before and after an update."""
    from vt_trl.tiny import build_tiny

    checkpoint = build_tiny(tmp_path / "wide", family="qwen2_5_vl", hidden_size=128)  # two heads, one per process
    first, second = run("tensor_parallel", checkpoint, tmp_path / "out", shipped("cpu", tmp_path))["tensor_parallel"]
    assert sorted({*first["rows"]}) == [f"row-{index}" for index in range(4)]
    assert sorted({*second["rows"]}) == [f"row-{index}" for index in range(4, 8)]
    assert (first["turns"], second["turns"]) == ([2] * 16, [1] * 16)
    assert first["drawn"] != second["drawn"]
    assert len({tuple(ids) for ids in first["drawn"]}) > 4  # members of a group differ
    assert len(first["gaps"]) == 2 and max(first["gaps"] + second["gaps"]) < 1e-4
    assert first["sums"] == second["sums"]
    for one, turns in ((first, 2), (second, 1)):  # and turns that end at different times give what rounds of them give
        assert one["free"] == one["rounds"]
        assert [list(map(len, found)) for found in one["free"]] == [
            [2] * turns,
            [9] * turns,
            [16] * turns,
            [23] * turns,
        ] * 2
