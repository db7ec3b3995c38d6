"""Figures of each kind of stage, sizes of a plan, and command lines, all by hand."""

from __future__ import annotations

import io
import json
import sys

import pytest
import yaml
from helpers import row
from loops import stage, write
from rich.console import Console
from shipped import ROOT

from vt_trl.errors import ConfigError
from vt_trl.loop import plan_loop
from vt_trl.loop.driver import Driver
from vt_trl.loop.metrics import best_round, metrics_of, progress_of
from vt_trl.loop.show import show_plan
from vt_trl.loop.sizes import architecture, sizes
from vt_trl.loop.stages import Kind, arguments, launcher, processes

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


def of_kind(tmp_path, run, **options):
    """A planned stage of a kind, with its output folder there."""
    (one,) = plan_loop(write(tmp_path, [{"name": "a", "run": run, "set": options}]), check=False).stages
    one.out.mkdir(parents=True)
    return one


def test_figures_of_training(tmp_path):
    one = of_kind(tmp_path, "train")
    assert metrics_of(one) == {}
    log = [{"step": 1, "reward": 0.5, "accuracy": 0.25}, {"step": 2, "reward": 0.75, "loss": float("nan")}]
    log += [{"step": 2, "eval_accuracy": 0.5}, {"step": 2, "train_runtime": 3.0}]
    (one.out / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": log}))
    expected = {"steps": 2, "reward": 0.75, "reward/first": 0.5, "accuracy": 0.25, "accuracy/first": 0.25}
    assert metrics_of(one) == expected | {"eval_accuracy": 0.5}
    (one.out / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        metrics_of(one)


def test_figures_of_an_evaluation(tmp_path):
    """Two data sets under two policies: unnamed is the mean over data sets, of the last model, by the first policy."""
    one = of_kind(tmp_path, "evaluate")
    cells = [
        {"model": model, "data": data, "policy": policy, "accuracy": value, "rows": rows, "request_rate": None,
         "visual_tokens": 4.0, "generated_tokens": 2.0}
        for model, data, policy, value, rows in (
            ("base", "x", "p", 0.1, 10), ("new", "x", "p", 0.4, 10),
            ("new", "y", "p", 0.8, 30), ("new", "x", "q", 0.9, 10),
        )
    ]  # fmt: skip
    plan = {"models": {"base": "b", "new": "n"}, "policies": ["p", "q"]}
    (one.out / "results.json").write_text(json.dumps({"plan": plan, "cells": cells}))
    found = metrics_of(one)
    assert found["accuracy"] == pytest.approx(0.6) and found["rows"] == 40 and "request_rate" not in found
    assert found["accuracy/base/x/p"] == 0.1 and found["accuracy/new/x/q"] == 0.9


def test_figures_of_traces_and_of_bands(tmp_path):
    """Counts of all units, joined over their sources; a report adds what it has."""
    one = of_kind(tmp_path, "prepare traces", dataset="d", model="m")
    units = {
        "0": {"rows": 3, "counts": {"row\tmath\tkept": 2, "row\tgeo\tkept": 1, "row\tgeo\twrong": 1}},
        "1": {"rows": 1, "counts": {"row\tmath\tkept": 1, "row\tmath\twrong": 3}},
    }
    (one.out / "manifest.json").write_text(json.dumps({"units": units}))
    assert metrics_of(one) == {"rows": 4, "row/kept": 4, "row/wrong": 4, "kept_share": 0.5}
    assert progress_of(one) == "2 units done, 4 rows"
    report = {"bands": {"easy": 5, "hard": 3}, "rows": 9, "name": "x", "drift": {"mean_shift": {"pass_rate": 0.25}}}
    (one.out / "report.json").write_text(json.dumps(report))
    found = metrics_of(one)
    assert (found["bands/easy"], found["drift/mean_shift/pass_rate"], found["rows"]) == (5, 0.25, 4)


def test_figures_of_traces_without_fates(tmp_path):
    one = of_kind(tmp_path, "prepare traces", dataset="d", model="m")
    units = {"0": {"rows": 3, "counts": {"rows_without_trace": 1, "rejected/wrong": 5}}}
    (one.out / "manifest.json").write_text(json.dumps({"units": units}))
    assert metrics_of(one) == {"rows": 3, "rows_without_trace": 1, "rejected/wrong": 5, "kept_share": 0.75}


def test_the_best_round():
    found = {1: {"accuracy": 0.5}, 2: {"accuracy": 0.75}, 3: {"accuracy": 0.75}, 4: {}}
    assert best_round("accuracy", False, found) == (2, 0.75)
    assert best_round("accuracy", True, found) == (1, 0.5)
    assert best_round("loss", False, found) is None


def test_options_become_words():
    parser = Kind("prepare traces").parser()
    options = {"dataset": "d", "model": "m", "out": "o", "no_steer": True, "temperature": 0.5, "split": None}
    words = arguments(parser, options | {"environment_args": {"turns": 2}}, "here")
    assert words == [
        "--dataset=d", "--model=m", "--out=o", "--no-steer", "--temperature=0.5", '--environment-args={"turns": 2}',
    ]  # fmt: skip
    assert arguments(Kind("evaluate").parser(), {"model": ["a", "b"], "data": "x", "out": "o"}, "here") == [
        "--model", "a", "b", "--data", "x", "--out=o",
    ]  # fmt: skip
    assert arguments(Kind("export").parser(), {"merge": True, "run": "r", "out": "o"}, "here") == [
        "r",
        "--merge",
        "--out=o",
    ]
    with pytest.raises(ConfigError, match="here: argument --attempts: invalid int value: 'x'"):
        arguments(parser, options | {"attempts": "x"}, "here")


def test_launches():
    assert launcher({}, "here") == [sys.executable]
    file = str(ROOT / "recipes" / "accelerate" / "zero3.yaml")
    words = launcher({"config_file": file, "num_processes": 4, "cpu": True}, "here")
    assert words[1:] == ["-m", "accelerate.commands.launch", f"--config_file={file}", "--num_processes=4", "--cpu"]
    assert processes({"config_file": file}) == 8 and processes({"num_processes": 4}) == 4 and processes({}) == 1


def test_a_trainer_gets_a_recipe_of_its_own(tmp_path):
    """Written next to the loop, so that it can be read, and run alone."""
    sft = {"model": "m", "dataset": "d", **CPU}
    entry = {"name": "a", "run": "sft", "set": sft, "launch": {"num_processes": 2, "cpu": True}}
    plan = plan_loop(write(tmp_path, [entry]))
    command = Driver(plan, Console(file=io.StringIO()), [])._command(plan.stages[0], None)
    path = tmp_path / "out" / "settings" / "a.yaml"
    assert command[1:] == [
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "-m", "vt_trl", "sft", str(path),
    ]  # fmt: skip
    assert yaml.safe_load(path.read_text()) == plan.stages[0].settings()


def test_sizes_of_a_plan(tmp_path, folder):
    """Seven rows: sft by batches of 2; traces of at most 5; training on those, 2 questions at a time, twice."""
    rows = folder(*(row(number, image="images/0.png") for number in range(7)))
    train = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **CPU}
    stages = [
        {"name": "sft", "run": "sft", "set": {
            "model": "m", "dataset": str(rows), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
            "num_train_epochs": 1, **CPU,
        }},
        {"name": "write", "run": "prepare traces", "set": {
            "dataset": str(rows), "model": "${sft.out}", "max_rows": 5, "attempts": 3, "writer": "local",
        }},
        {"name": "hard", "run": "train", "set": {
            "model": "m", "dataset": "${write.out}", "num_train_epochs": 2, "penalty": "none", **train,
        }},
        {"name": "score", "run": "evaluate", "set": {
            "model": ["a=${hard.out}", "b=m"], "data": [str(rows)], "policies": ["always-full"], "limit": 6,
        }},
    ]  # fmt: skip
    path = write(tmp_path, stages)
    found = sizes(plan_loop(path))
    assert (found["sft"].rows, found["sft"].steps) == (7, 4)
    assert (found["write"].rows, found["write"].made, found["write"].episodes) == (5, 5, 15)
    # A generation is 8 rollouts of 2 questions and one update; 5 rows fill 2 of them, twice.
    assert (found["hard"].rows, found["hard"].steps, found["hard"].episodes) == (5, 4, 32)
    assert (found["score"].rows, found["score"].episodes) == (6, 12)

    said = io.StringIO()
    show_plan(path, console=Console(file=said, width=200))
    assert "4 stages" in said.getvalue() and "At most 59 episodes and 8 optimizer steps" in said.getvalue()
    assert not (tmp_path / "out").exists()


def test_training_on_paper(tmp_path, checkpoint, folder):
    """Hours and memory by the preflight, of the model that the chain of stages began with."""
    rows = folder(*(row(number, image="images/0.png") for number in range(8)))
    shared = {"dataset": str(rows), "report_to": "none", "dtype": "float32"}
    train = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, **shared}
    stages = [
        {"name": "sft", "run": "sft", "set": {"model": str(checkpoint), **shared}},
        {"name": "out", "run": "export", "set": {"run": "${sft.out}"}},
        {"name": "hard", "run": "train", "set": {"model": "${out.out}", "penalty": "none", **train}},
    ]
    plan = plan_loop(write(tmp_path, stages, defaults={"sft": {"bf16": False}, "train": {"bf16": False}}))
    assert architecture(plan.by_id["hard"], plan) == str(checkpoint)
    hard = sizes(plan, gpu_gib=80)["hard"]
    assert hard.note == "fits" and hard.hours > 0 and hard.steps == 8 * 3


def test_a_recipe_over_another(tmp_path):
    """Values, launch and defaults are joined line by line; the rest is replaced."""
    write(tmp_path, [stage("a", text="${x}${y}")], values={"x": 1, "y": 2}, seed=3)
    above = tmp_path / "above.yaml"
    above.write_text(yaml.safe_dump({"extends": "loop.yaml", "values": {"y": 5}, "folder": "elsewhere"}))
    (one,) = plan_loop(above).stages
    assert one.settings() == {"text": "15", "seed": 3, "out": "elsewhere/stages/a"}
    above.write_text(yaml.safe_dump({"extends": "above.yaml"}))
    with pytest.raises(ConfigError, match="extends is 'above.yaml'"):
        plan_loop(above)
