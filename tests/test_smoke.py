"""Real receipts through the command a user types: recipes/smoke.yaml on tiny checkpoints.

Pictures are up to 940 x 2077 pixels. They are shown as they are in the first run and in the in-process tests; two
processes and vLLM get smaller ones.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILY_NAMES
from helpers import AsksFirst, environment_of_its_own
from transformers import AutoProcessor

from vt_trl.config import VTGRPOConfig
from vt_trl.data import load_rows, require_good_rows
from vt_trl.features import ImageFeatures
from vt_trl.images import ResolutionRule, load_image
from vt_trl.packing import placeholder_runs
from vt_trl.passes import completion_logprobs
from vt_trl.trainer import VTGRPOTrainer

ROOT = Path(__file__).resolve().parents[1]
# A random model never asks: this makes its first turn a call, and its rewards differ, so that something is trained.
FORCED = [
    *("--environment", "helpers:AsksFirst", "--rewards", "accuracy", "format", "two_processes:alternating"),
    *("--mask_truncated_completions", "false"),
]

# With pictures of 940 x 2077 in every completion these runs take many minutes on two cores.
SMALLER = ["--environment_args", '{"max_pixels": 200000, "min_pixels": 3136}']


def smoke(checkpoint: Path, rows: Path, out: Path, *options: str, launch: tuple[str, ...] = ()) -> list[dict]:
    """``accelerate launch -m vt_trl recipes/smoke.yaml`` in a process of its own; what it logged per step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = (*launch, "--main_process_port", port) if launch else ("--cpu", "--num_processes", "1")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", *launch),
            *("-m", "vt_trl", "recipes/smoke.yaml", "--model", str(checkpoint), "--dataset", str(rows)),
            *("--output_dir", str(out), "--num_generations", "2", "--per_device_train_batch_size", "2", *options),
        ],
        cwd=ROOT,
        env=environment_of_its_own(PYTHONPATH=paths, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    state = json.loads((out / "trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(logs) == 3
    assert all(math.isfinite(log[name]) for log in logs for name in ("loss", "grad_norm", "reward"))
    assert (out / "model.safetensors").is_file() and (out / "tokenizer.json").is_file()
    return logs


def low_tokens(checkpoint: Path, rows: Path) -> int:
    """Visual tokens of the first receipt's low view, by the processor alone."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    views = ResolutionRule().views(load_image(load_rows(rows, limit=1)[0]["image"]))
    return processor(text=["<|image_pad|>"], images=[views.low])["input_ids"][0].count(image_id(processor))


def image_id(processor) -> int:
    return processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")


def test_three_steps_with_the_real_tokenizer(real_checkpoints, receipts, tmp_path):
    checkpoint = real_checkpoints["qwen2_5_vl"]
    logs = smoke(checkpoint, receipts, tmp_path, "--max_rows", "3")  # three questions on one receipt
    for log in logs:
        # 470 x 1038 pixels: 17 x 37 squares of 28 x 28
        assert log["visual_tokens"] == low_tokens(checkpoint, receipts) == 629
        assert log["images"] == 1


def test_three_steps_on_two_processes(real_checkpoints, receipts, tmp_path):
    config = ("--config_file", str(ROOT / "recipes" / "accelerate" / "cpu.yaml"))
    checkpoint = real_checkpoints["qwen2_5_vl"]
    logs = smoke(checkpoint, receipts, tmp_path, *FORCED, *SMALLER, "--max_rows", "6", launch=config)
    assert all(log["images"] == 2 and log["request_rate"] == 1 for log in logs)
    assert all(log["grad_norm"] > 0 for log in logs)


@pytest.mark.vllm
def test_three_steps_with_vllm(real_checkpoints, receipts, tmp_path):
    pytest.importorskip("vllm")
    options = [*FORCED, *SMALLER, "--use_vllm", "true", "--max_rows", "3"]
    logs = smoke(real_checkpoints["qwen2_5_vl"], receipts, tmp_path, *options)
    assert all(log["images"] == 2 for log in logs)
    assert all(log["sampling/logp_difference_max"] < 1e-4 for log in logs)
    assert all(log["grad_norm"] > 0 for log in logs)


@pytest.mark.vllm
def test_vllm_takes_receipts_as_they_are(real_checkpoints, receipts, tmp_path):
    pytest.importorskip("vllm")
    logs = smoke(real_checkpoints["qwen2_5_vl"], receipts, tmp_path, "--use_vllm", "true", "--max_rows", "3")
    assert all(log["visual_tokens"] == 629 for log in logs)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_visual_tokens_of_every_receipt_are_the_processors_own(real_checkpoints, receipts, family):
    processor = AutoProcessor.from_pretrained(real_checkpoints[family])
    features, rule = ImageFeatures(processor.image_processor), ResolutionRule()
    side = {"qwen2_5_vl": 28, "qwen3_vl": 32}[family]
    for row in load_rows(receipts).to_list()[::3]:
        views = rule.views(load_image(row["image"]))
        for view in (views.low, views.full):
            count = processor(text=["<|image_pad|>"], images=[view])["input_ids"][0].count(image_id(processor))
            assert features.visual_tokens(view) == count
            shown = min(view.width * view.height, processor.image_processor.size["longest_edge"])
            assert count == pytest.approx(shown / side**2, rel=0.12)


def test_a_full_size_receipt_inside_the_completion(real_checkpoints, receipts, tmp_path):
    """The tool turn is forced: 2516 visual tokens lie inside the completion, and both passes agree on what follows."""
    args = VTGRPOConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        num_generations=2,
        max_turn_tokens=12,
        max_completion_length=4096,
        mask_truncated_completions=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
    )
    rows = require_good_rows(load_rows(receipts, limit=1), "error")
    trainer = VTGRPOTrainer(str(real_checkpoints["qwen2_5_vl"]), args, rows, environment=AsksFirst)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([rows[0]] * 2)
    assert batch["image_index"] == [[0, 1]] * 2
    assert batch["image_grid_thw"].tolist() == [[1, 74, 34], [1, 148, 68]]  # patches of 14 pixels, each picture once
    for ids, mask, loss in zip(batch["completion_ids"], batch["completion_mask"], batch["tool_mask"], strict=True):
        assert placeholder_runs(ids[mask.bool()].tolist(), trainer.image_token_id) == [74 * 34]
        assert not (loss.bool() & (ids == trainer.image_token_id)).any()
    with torch.no_grad():
        trained = completion_logprobs(trainer, trainer.model, batch, chunk=1)
    loss = batch["tool_mask"].bool()
    assert loss.sum(dim=1).min() >= 2
    assert (trained - batch["sampling_per_token_logps"]).abs()[loss].max() < 1e-4
    # The picture counts: with the full view of another receipt the answer has other log-probabilities.
    batch["pixel_values"][1] = batch["pixel_values"][1].flip(0)
    with torch.no_grad():
        other = completion_logprobs(trainer, trainer.model, batch, chunk=1)
    assert (other - trained).abs()[0][loss[0]].max() > 1e-3
