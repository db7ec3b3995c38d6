"""Recipes of policies that look (VLM-R3, look), run by their command on tiny checkpoints with small rows."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import picture
from safetensors.torch import load_file
from shipped import ON_A_CPU, ROOT

from vt_trl import cli
from vt_trl.recipe import parse_recipe

TINY = [
    *(*ON_A_CPU, "--dtype", "float32", "--gradient_checkpointing", "false", "--max_steps", "1"),
    *("--gradient_accumulation_steps", "1", "--learning_rate", "1e-3", "--warmup_steps", "0"),
]
GRPO = [
    *("--use_vllm", "false", "--judge", "rule", "--judge_args", "{}", "--judge_cache", "false"),
    *("--num_generations", "4", "--per_device_train_batch_size", "4", "--max_turn_tokens", "8"),
]
FORCED = {"vlm_r3_lora": "helpers:ZoomsFirst", "vlm_r3_full": "helpers:ZoomsFirst", "look_lora": "helpers:LooksFirst"}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())


def recipe(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.yaml"


@pytest.fixture
def rows(tmp_path) -> Path:
    """Four rows with pictures of 112 x 112, and the same as rationales in VLIR's layout."""
    root = tmp_path / "rows"
    root.mkdir()
    plain, vlir = [], []
    for number in range(4):
        picture(number).save(root / f"{number}.png")
        question = f"Which number is {number}?"
        plain.append({"image": f"{number}.png", "question": question, "answer": str(number)})
        texts = ["<think>Left?", f"It is {number}.</think><answer>{number}</answer>"]
        boxes = [[0, 0, 56, 112]]
        vlir.append(
            {"image_path": f"{number}.png", "question": question, "response_list": texts, "img_crop_list": boxes}
        )
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, plain)))
    (root / "vlir.jsonl").write_text("\n".join(map(json.dumps, vlir)))
    return root


def run(command: str, name: str, checkpoint: Path, rows: Path, out: Path, *options: str) -> dict:
    """``vt-trl COMMAND recipes/NAME.yaml`` for one step; what it logged."""
    given = ["--model", str(checkpoint), "--dataset", str(rows), "--output_dir", str(out), *TINY, *options]
    assert cli.main([command, str(recipe(name)), *given]) == 0
    state = json.loads((out / "checkpoint-1" / "trainer_state.json").read_text())
    (log,) = (entry for entry in state["log_history"] if "loss" in entry)
    assert math.isfinite(log["loss"]) and math.isfinite(log["grad_norm"])
    return log


@pytest.mark.parametrize("shape", ["inline", "tool_call"])
def test_rationales_are_taught(checkpoint, rows, tmp_path, shape):
    """From VLIR's layout to a step of SFT in both shapes: the language model moves, the vision tower does not."""
    traces, out = tmp_path / "traces", tmp_path / "out"
    assert cli.main(["prepare", "vlir", str(rows), "--files", "vlir.jsonl", "--out", str(traces)]) == 0
    settings = yaml.safe_load(recipe("vlm_r3_sft").read_text())["environment_args"] | {"shape": shape}
    log = run("sft", "vlm_r3_sft", checkpoint, traces, out, "--environment_args", json.dumps(settings))
    assert log["grad_norm"] > 0
    before, after = load_file(checkpoint / "model.safetensors"), load_file(out / "model.safetensors")
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and not any("visual" in name for name in moved)


@pytest.mark.parametrize("name", FORCED)
def test_a_random_model_goes_through(checkpoint, rows, tmp_path, name):
    log = run("train", name, checkpoint, rows, tmp_path / "out", *GRPO)
    assert log["status/truncated"] + log["status/no_answer"] == 1
    assert log["images"] == 1 and log["request_rate"] == 0


@pytest.mark.parametrize(
    ("name", "shape"),
    [("vlm_r3_lora", "inline"), ("vlm_r3_lora", "tool_call"), ("vlm_r3_full", "inline"), ("look_lora", "tool_call")],
)
def test_completions_with_crops_are_trained(checkpoint, rows, tmp_path, name, shape):
    """The first look is forced: 16 visual tokens in full (look: 4) and 8 of a half, which is not enlarged."""
    settings = yaml.safe_load(recipe(name).read_text())["environment_args"] | {"shape": shape}
    options = [*GRPO, "--environment", FORCED[name], "--mask_truncated_completions", "false"]
    log = run("train", name, checkpoint, rows, tmp_path / "out", *options, "--environment_args", json.dumps(settings))
    assert log["images"] == 2 and log["request_rate"] == 1
    assert log["visual_tokens"] == (4 if name == "look_lora" else 16) + 8
    assert log["accuracy"] == 0.5 and log["grad_norm"] > 0
    if name != "look_lora":
        assert log["rewards/region/mean"] == 0.25  # 0.5 for the right half of the group


def test_a_receipt_is_looked_at_with_the_real_tokenizer(real_checkpoints, receipts, tmp_path):
    """Real tokenizer, template and limits: 940 x 2077 pixels shown at 200,000, and its left half in 256 tokens."""
    real = real_checkpoints["qwen2_5_vl"]
    settings = yaml.safe_load(recipe("vlm_r3_lora").read_text())["environment_args"]
    settings |= {"max_pixels": 200_000, "crop_tokens": [4, 256]}
    options = [
        *GRPO,
        "--environment",
        "helpers:ZoomsFirst",
        "--mask_truncated_completions",
        "false",
        "--max_rows",
        "1",
    ]
    log = run(
        "train", "vlm_r3_lora", real, receipts, tmp_path / "out", *options, "--environment_args", json.dumps(settings)
    )
    assert log["images"] == 2 and log["grad_norm"] > 0
    assert 0.8 * 512 < log["visual_tokens"] <= 200_000 // 784 + 256


def test_the_papers_numbers():
    """VLM-R3 (arXiv 2505.16192): 300 steps are two epochs of about 5000 rows, so about 33 prompts per update."""
    given = yaml.safe_load(recipe("vlm_r3_full").read_text())
    processes = load_config_from_file(str(ROOT / "recipes" / "accelerate" / "zero3.yaml")).num_processes
    update = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"] * processes
    assert update / given["num_generations"] == 32
    _, args = parse_recipe(recipe("vlm_r3_full"), ON_A_CPU)
    assert (args.num_generations, args.learning_rate, args.num_train_epochs) == (5, 1e-6, 2)
    assert (args.epsilon, args.epsilon_high, args.beta, args.max_turn_tokens) == (0.2, 0.28, 0.0, 2048)
    weights = {"accuracy": 1.0, "format": 1.0, "region": 1.0, "length_paper": 1.0}
    assert dict(zip(args.rewards, args.reward_weights, strict=True)) == weights


@pytest.mark.parametrize("name", FORCED)
def test_a_micro_batch_is_a_whole_group(name):
    given = yaml.safe_load(recipe(name).read_text())
    assert given["per_device_train_batch_size"] == given["num_generations"] and given["use_vllm"]


def test_the_cold_start_shows_what_the_training_shows():
    sft, lora, full = (
        yaml.safe_load(recipe(name).read_text()) for name in ("vlm_r3_sft", "vlm_r3_lora", "vlm_r3_full")
    )
    assert sft["environment_args"] == lora["environment_args"] == full["environment_args"]
    assert sft["output_dir"] == lora["model"] == full["model"]
