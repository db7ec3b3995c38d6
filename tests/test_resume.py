"""Checkpoints are whole or not there, and a resumed run is the run."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from datasets import Dataset
from helpers import SHORT_PROMPTS
from transformers import TrainerCallback

from vt_trl import checkpoints as saved
from vt_trl import cli
from vt_trl.checkpoints import MANIFEST, STAGING, last_checkpoint, problem_with, put_in_place, resume_path, rotate
from vt_trl.config import VTGRPOConfig
from vt_trl.errors import CheckpointError, ConfigError
from vt_trl.resume import TERMINATED
from vt_trl.trainer import VTGRPOTrainer

ROOT = Path(__file__).resolve().parents[1]


def complete(output: Path, step: int, text: str = "weights") -> Path:
    staged = output / STAGING / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    (staged / "model.safetensors").write_text(text)
    return put_in_place(output, staged.name)


def test_a_checkpoint_is_moved_into_place_with_a_list_of_its_files(tmp_path):
    path = complete(tmp_path, 3)
    assert path == tmp_path / "checkpoint-3" and problem_with(path) is None
    assert json.loads((path / MANIFEST).read_text()) == {"model.safetensors": len("weights")}
    assert not (tmp_path / STAGING).exists()
    assert complete(tmp_path, 3, "other") == path and (path / "model.safetensors").read_text() == "other"


@pytest.mark.parametrize("damage", ["cut", "missing", "no list", "broken list"])
def test_incomplete_checkpoints_are_skipped_and_named(tmp_path, damage, caplog):
    good, bad = complete(tmp_path, 9), complete(tmp_path, 10)
    file = bad / "model.safetensors"
    {
        "cut": lambda: file.write_text("wei"),
        "missing": file.unlink,
        "no list": (bad / MANIFEST).unlink,
        "broken list": lambda: (bad / MANIFEST).write_text("{"),
    }[damage]()
    assert last_checkpoint(tmp_path) == good
    assert "checkpoint-10 is skipped" in caplog.text
    assert resume_path(tmp_path, "true") == resume_path(tmp_path, True) == str(good)
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        resume_path(tmp_path, str(bad))
    assert resume_path(tmp_path, str(good)) == str(good)


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (2, 10, 9):
        complete(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    assert resume_path(tmp_path, None) is None and resume_path(tmp_path, False) is None
    assert resume_path(tmp_path / "nothing", True) is None  # the first start of a job that always says true


def test_rotation_keeps_the_newest_complete_and_the_best(tmp_path):
    paths = {step: complete(tmp_path, step) for step in range(1, 6)}
    (paths[5] / MANIFEST).unlink()
    removed = rotate(tmp_path, 2, [str(paths[1])])
    assert removed == [paths[2], paths[3], paths[5]]
    assert rotate(tmp_path, None, []) == []


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    good = complete(tmp_path, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saved.os, "rename", full)
    with pytest.raises(CheckpointError, match="No space left.*checkpoint-1.*save_total_limit"):
        complete(tmp_path, 2)
    assert problem_with(good) is None and last_checkpoint(tmp_path) == good
    assert not (tmp_path / STAGING).exists()


def parity(completion_ids: list[list[int]], **columns) -> list[float]:
    return [float(sum(ids) % 2) for ids in completion_ids]


def make_trainer(checkpoint, out, *callbacks: TrainerCallback, **settings) -> VTGRPOTrainer:
    settings = {"max_steps": 4, "save_steps": 1} | settings
    args = VTGRPOConfig(
        str(out),
        environment="direct",
        environment_args={"prompts": {name: SHORT_PROMPTS[name] for name in ("system", "task")}, "min_pixels": 3136},
        penalty="none",
        num_generations=4,
        per_device_train_batch_size=4,
        steps_per_generation=2,  # two updates per generation: every other checkpoint falls between them
        max_turn_tokens=6,
        max_completion_length=16,
        learning_rate=1e-3,
        mask_truncated_completions=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        **settings,
    )
    rows = Dataset.from_list(make_rows(12, size=(56, 56)))
    evaluation = Dataset.from_list(make_rows(2, size=(56, 56)))
    return VTGRPOTrainer(
        str(checkpoint), args, rows, evaluation, reward_funcs=[parity, parity], callbacks=list(callbacks)
    )


def weights(trainer: VTGRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def losses(trainer: VTGRPOTrainer) -> dict[int, tuple]:
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {log["step"]: (log["loss"], log["grad_norm"], log.get("reward")) for log in logs}


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory) -> VTGRPOTrainer:
    """A run of four steps that nobody disturbed."""
    trainer = make_trainer(checkpoint, tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_resumed_from_any_checkpoint_is_the_same_run(checkpoint, whole, step, tmp_path):
    """Steps 1 and 3 fall between two updates of one generation: their rollouts are in the checkpoint."""
    start = Path(whole.args.output_dir) / f"checkpoint-{step}"
    assert (start / "vt_trl_rollouts_0.pt").exists() == (step % 2 == 1)
    trainer = make_trainer(checkpoint, tmp_path)
    trainer.train(resume_from_checkpoint=str(start))
    assert losses(trainer) == losses(whole)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(trainer).items())


class Terminate(TrainerCallback):
    """What a batch system does, in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_and_ends_in_order(checkpoint, whole, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(checkpoint, tmp_path, Terminate(2), save_steps=100)
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.end_in_order.asked
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in saved.checkpoints_in(tmp_path)] == ["checkpoint-2"]
    again = make_trainer(checkpoint, tmp_path, save_steps=100)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole)


def test_the_command_ends_with_143_after_sigterm(monkeypatch):
    class Run:
        end_in_order = type("End", (), {"asked": True})

    monkeypatch.setattr("vt_trl.run.train", lambda *_: Run)
    assert cli.main(["train", "recipe.yaml"]) == TERMINATED == 143


def test_a_disk_that_fills_up_while_saving_stops_the_run(checkpoint, tmp_path, monkeypatch):
    original, calls = torch.save, []

    def save(*args, **kwargs):
        calls.append(args)
        if len(calls) > 6:  # in the second checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    trainer = make_trainer(checkpoint, tmp_path)
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.train()
    kept = last_checkpoint(tmp_path)
    assert kept is not None and not (tmp_path / STAGING).exists()
    assert kept.name == f"checkpoint-{trainer.state.global_step - 1}"


def test_what_a_killed_process_left_is_cleared(checkpoint, tmp_path, caplog):
    half = tmp_path / STAGING / "checkpoint-7"
    half.mkdir(parents=True)
    (half / "optimizer.pt").write_text("half")
    trainer = make_trainer(checkpoint, tmp_path, max_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert "never finished" in caplog.text and not (tmp_path / STAGING).exists()
    assert last_checkpoint(tmp_path).name == "checkpoint-1"


def test_the_best_checkpoint_is_named_where_it_lies_and_loaded(checkpoint, tmp_path):
    accuracies = iter([0.5, 1.0, 0.0, 0.5])
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_accuracy"}
    trainer = make_trainer(checkpoint, tmp_path, save_total_limit=1, load_best_model_at_end=True, **settings)
    evaluate, seen = trainer.evaluate, {}

    def scripted(*args, **kwargs):
        metrics = evaluate(*args, **kwargs) | {"eval_accuracy": next(accuracies)}
        seen[trainer.state.global_step] = weights(trainer)
        return metrics

    trainer.evaluate = scripted
    trainer.train()
    best = tmp_path / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best) and problem_with(best) is None
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    assert all(torch.equal(value, seen[2][name]) for name, value in weights(trainer).items())


def test_kills_at_random_moments(tmp_path):
    """The benchmark at a small size: SIGKILL during rollout, update and saving."""
    out = tmp_path / "kill.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.kill", "--kills", "3", "--steps", "8", "--json", str(out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
        timeout=1500,  # a dozen processes that each import torch
    )
    report = json.loads(out.read_text())
    assert report["kills"] == 3 and report["mismatches"] == 0
    assert sum(report["kills_by_phase"].values()) == 3
    assert report["resumed"] + report["killed_before_the_first_checkpoint"] >= 3
