"""The preflight against real allocations, and the figures and commands of docs/scaling.md."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from benchmarks import preflight_check
from benchmarks.preflight_trainer import trainer_rollouts
from vt_trl.preflight import tables
from vt_trl.preflight.planned import parse_planned

ROOT = Path(__file__).resolve().parents[1]
REPORT = json.loads((ROOT / "docs" / "results" / "preflight_cpu.json").read_text(encoding="utf-8"))
SCALING = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.fixture
def one_thread():
    """Two threads that share a busy machine wait for each other, not for work."""
    torch.set_num_threads(1)


def test_one_tiny_model_within_tolerance(checkpoint, one_thread):
    config = AutoConfig.from_pretrained(checkpoint)
    results = preflight_check.check_model(
        config, checkpoint, preflight_check.tiny_cases(small=True), torch.device("cpu")
    )
    check_errors({"tiny": results})


def test_rollouts_of_the_trainer(checkpoint, one_thread):
    held, estimated = trainer_rollouts(checkpoint)
    for part in held:
        assert estimated[part] == pytest.approx(held[part], rel=0.01)


def check_errors(results: dict) -> None:
    for part, error in preflight_check.worst(results).items():
        exact = part in (*preflight_check.EXACT, "rollouts", "splitting")
        assert abs(error) <= (0.01 if exact else 0.15), (part, error)


def test_committed_report_is_within_tolerance():
    check_errors(REPORT["results"])
    assert REPORT["worst_error"] == preflight_check.worst(REPORT["results"])
    assert len(REPORT["results"]) >= 6


def test_tables_are_the_preflight_s(shared):
    seven = AutoConfig.from_pretrained(shared / "qwen" / "qwen2.5-vl-7b-instruct")
    command = "run `python -m vt_trl.preflight.tables docs/scaling.md`"
    assert tables.with_tables(SCALING, seven) == SCALING, command


def test_errors_in_the_docs_are_the_report_s():
    worst = REPORT["worst_error"]
    rows = re.findall(r"^\| ([\w, -]+) \| ([+-][\d.]+)% \|", SCALING, re.MULTILINE)
    told = {part: float(error) for names, error in rows for part in names.split(", ")}
    assert told == {part: pytest.approx(100 * error, abs=0.05) for part, error in worst.items()}
    assert REPORT["machine"] in " ".join(SCALING.split()) and REPORT["date"] in SCALING


def test_commands_in_the_docs_parse(tmp_path):
    from accelerate.commands.launch import launch_command_parser

    blocks = re.findall(r"```bash\n(.*?)```", SCALING, re.DOTALL)
    script = tmp_path / "train.sh"
    for block in blocks:
        script.write_text(block, encoding="utf-8")
        assert subprocess.run(["bash", "-n", script], capture_output=True, check=False).returncode == 0
    launches = re.findall(r"accelerate launch ((?:.*\\\n)*.*)", "\n".join(blocks))
    assert len(launches) == 3
    for text in launches:
        words = shlex.split(text.replace("\\\n", " ").rstrip("'"))
        numbers = {
            "$SLURM_NNODES": "4",
            "$((SLURM_NNODES * 8))": "32",
            "$SLURM_NODEID": "1",
            "$MAIN_PORT": "2",
            "RANK": "1",
        }
        options = launch_command_parser().parse_args([numbers.get(word, word) for word in words])
        assert (ROOT / options.config_file).is_file() and options.module
        recipe, *overrides = options.training_script_args
        if "--vllm_mode" in overrides:  # one machine, with vLLM on another
            assert parse_planned(ROOT / recipe, overrides, 8)[1].vllm_mode == "server"
            continue
        assert (options.num_machines, options.num_processes, options.machine_rank) == (4, 32, 1)
        assert options.deepspeed_multinode_launcher == "standard"
        args = parse_planned(ROOT / recipe, overrides, 32)[1]
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 32 == 512
