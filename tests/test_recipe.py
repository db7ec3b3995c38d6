"""Recipes, their settings and the command line: everything that is checked before anything loads."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from shipped import ON_A_CPU, RECIPES, ROOT, kind_of

from vt_trl import cli, run
from vt_trl.errors import ConfigError, DataError
from vt_trl.recipe import parse_recipe

LAUNCHES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
NAMED = ("--model", "x", "--dataset", "y")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    """A recipe's ``env`` goes into the environment of the process; here it has to leave it again."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.fixture
def parse(tmp_path):
    """``parse("key: value", ..., overrides=())`` on a CPU, with a model and a dataset."""

    def parsed(*lines: str, overrides: tuple[str, ...] = (), named: bool = True):
        recipe = tmp_path / "recipe.yaml"
        head = ["use_cpu: true", "bf16: false", "per_device_train_batch_size: 8"] + ["model: x", "dataset: y"] * named
        head = [line for line in head if line.split(":")[0] not in {own.split(":")[0] for own in lines}]
        recipe.write_text("\n".join([*head, *lines]))
        return parse_recipe(recipe, overrides)

    return parsed


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT / "recipes")) for path in paths]


def test_recipes_are_found():
    assert {"smoke.yaml", "demo.yaml", "efficient_full.yaml", "efficient_lora.yaml"} <= set(ids(RECIPES))
    assert len(LAUNCHES) >= 4


@pytest.mark.parametrize("path", RECIPES, ids=ids(RECIPES))
def test_every_recipe_parses(path):
    arguments, args = parse_recipe(path, (*NAMED, *ON_A_CPU), kind_of(path))
    assert (arguments.model, arguments.dataset) == ("x", "y")
    given = yaml.safe_load(path.read_text())
    for name in ("learning_rate", "num_generations", "penalty_theta", "environment_args", "reward_weights"):
        if name in given:
            assert getattr(args, name) == given[name]


@pytest.mark.parametrize("path", LAUNCHES, ids=ids(LAUNCHES))
def test_every_launch_configuration_loads(path):
    config = load_config_from_file(str(path))  # raises on keys that accelerate does not know
    kinds = {"cpu": "MULTI_GPU", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == kinds[path.stem]
    assert config.num_processes == (2 if path.stem == "cpu" else 8)
    assert config.mixed_precision == ("no" if path.stem == "cpu" else "bf16")


def test_the_papers_numbers():
    """VisionThink (arXiv 2507.13348), Section 4.1 and released settings; batch sizes for 8 GPUs."""
    given = yaml.safe_load((ROOT / "recipes" / "efficient_full.yaml").read_text())
    processes = load_config_from_file(str(ROOT / "recipes" / "accelerate" / "zero3.yaml")).num_processes
    update = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"] * processes
    assert given["num_generations"] == 16
    assert given["generation_batch_size"] / given["num_generations"] == 512  # prompts per generation
    assert given["generation_batch_size"] / update == 16  # updates per generation
    _, args = parse_recipe(ROOT / "recipes" / "efficient_full.yaml", ON_A_CPU)
    assert args.learning_rate == 1e-6
    assert (args.beta, args.entropy_coef, args.epsilon) == (0.001, 0.001, 0.2)
    assert (args.penalty, args.penalty_theta, args.penalty_amount) == ("paper", 0.2, 0.1)
    assert dict(zip(args.rewards, args.reward_weights, strict=True)) == {"accuracy": 1.0, "format": 0.5}


# Each: lines of a recipe, and what the one line of the error has to say.
WRONG = {
    "unknown key": (["learing_rate: 1.0e-3"], r"'learing_rate' \(did you mean 'learning_rate'\?\)"),
    "text for a number": (["num_generations: six"], "num_generations.*invalid int value: 'six'"),
    "list for a number": (["max_steps: [3]"], r"max_steps is \[3\], but it takes int"),
    "fraction": (["num_generations: 4.5"], "num_generations is 4.5, but it takes int"),
    "text for a list": (["rewards: accuracy"], r"rewards is 'accuracy', but it takes list\[str\]"),
    "null": (["learning_rate: null"], "learning_rate is None, but it takes float"),
    "unquoted no": (["save_strategy: no"], "save_strategy is False.*quote"),
    "number for a folder": (["output_dir: 2024"], "output_dir is 2024, but it takes str"),
    "choice": (["lora: langage"], "Did you mean 'language'"),
    "rank": (["lora_r: 0"], "lora_r is 0; a rank is 1 or more"),
    "penalty": (["penalty: papr"], "penalty is 'papr'. Did you mean 'paper'"),
    "reward": (["rewards: [acuracy]"], "'acuracy' is unknown. Did you mean 'accuracy'"),
    "environment": (["environment: resise"], "'resise', which is unknown. Did you mean 'resize'"),
    "environment module": (["environment: no_such_module:Env"], "No module named 'no_such_module'"),
    "environment setting": (["environment_args: {max_pixls: 3}"], "do not fit ResizeEnv.*'max_pixls'"),
    "long turns": (
        ["max_turn_tokens: 100", "max_completion_length: 64"],
        "max_turn_tokens is 100 and max_completion_length.*is 64; lower the first or raise the second",
    ),
    "greedy groups": (["num_generations_eval: 4"], "is 4.*set it to 1, or set eval_greedy: false"),
    "cold": (["temperature: 0"], "temperature is 0.*Set it above 0"),
    "top_p with vLLM": (["top_p: 0.9", "use_vllm: true"], "top_p is set: vLLM.*importance ratio"),
    "server": (["vllm_mode: server", "vllm_tensor_parallel_size: 2"], "the server's own command line"),
    "frozen and adapter": (["lora: language", "train_vision: false"], "Remove train_vision"),
    "correctness": (["rewards: [format]"], r"correctness_reward is 'accuracy', but rewards are \['format'\]"),
    "weights": (["reward_weights: [1.0]"], r"reward_weights has 1 numbers for 2 rewards \(accuracy, format\)"),
    "theta": (["penalty_theta: 20"], "penalty_theta is 20.*from 0 to 1"),
    "TRL's own": (["generation_batch_size: 10"], r"generation_batch_size \(10\) must be divisible by"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_refused_in_words(parse, name):
    lines, words = WRONG[name]
    with pytest.raises(ConfigError, match=words):
        parse(*lines)


def test_what_is_wrong_above_is_right_when_changed(parse):
    """The same settings with good values parse, so that each refusal above is about its value."""
    lines = ["learning_rate: 1e-3", "max_steps: 3", "rewards: [accuracy, format]", "save_strategy: 'no'",
             "output_dir: '2024'", "lora: language", "penalty: paper_correct", "top_p: 0.9", "temperature: 0.5",
             "max_turn_tokens: 64", "max_completion_length: 64", "eval_greedy: false", "num_generations_eval: 4",
             "resume_from_checkpoint: true"]  # fmt: skip
    arguments, args = parse(*lines)
    assert args.learning_rate == 1e-3  # YAML reads 1e-3 as a text
    assert (arguments.lora, args.output_dir, args.num_generations_eval) == ("language", "2024", 4)
    assert args.resume_from_checkpoint is True
    assert parse("use_vllm: true", "vllm_mode: colocate")[1].use_vllm


@pytest.mark.parametrize("missing", ["model", "dataset"])
def test_a_missing_name_says_how_to_give_it(parse, missing):
    other = {"model": "dataset: y", "dataset": "model: x"}[missing]
    with pytest.raises(ConfigError, match=f"{missing} is not set; .*`--{missing} NAME_OR_FOLDER`"):
        parse(other, named=False)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("--learing_rate 3", r"command line: 'learing_rate' \(did you mean 'learning_rate'\?\)"),
        ("--learn 3", "did you mean 'learning_rate'"),  # no abbreviations: a typing error must not set something
        ("--max_steps six", "max_steps.*invalid int value: 'six'"),
        ("--lora langage", "invalid choice: 'langage'"),
        ("--environment_args 3", "environment_args is '3'; write a mapping"),
        ("stray", "left over: stray"),
    ],
)
def test_overrides_are_checked_like_the_recipe(parse, overrides, words):
    with pytest.raises(ConfigError, match=words):
        parse(overrides=tuple(overrides.split()))


def test_overrides_win(parse):
    given = "--learning_rate 2e-3 --environment_args '{\"max_pixels\": 500000}' --reward_weights 2 1"
    overrides = tuple(shlex.split(given))
    _, args = parse("learning_rate: 1e-3", "environment_args: {max_pixels: 600000}", overrides=overrides)
    assert args.learning_rate == 2e-3
    assert args.environment_args == {"max_pixels": 500000}
    assert args.reward_weights == [2.0, 1.0]


@pytest.mark.parametrize(("processes", "batch"), [(1, 24), (2, 48)])
def test_torn_groups_name_the_number_to_set(parse, monkeypatch, processes, batch):
    """8 per device against groups of 12: 24 = 3 x 8 is the smallest number of rollouts that holds whole groups.

    Stock TRL accepts the case of two processes with 6 x 2 x 2 = 24 rollouts, half a group on each.
    """
    monkeypatch.setattr("vt_trl.config.VTGRPOConfig.world_size", processes)
    lines = ["num_generations: 12", "gradient_accumulation_steps: 2"]
    with pytest.raises(ConfigError, match=f"steps_per_generation .*multiple of 3, or .* multiple of {batch}") as error:
        parse(*lines)
    assert "groups would be torn" in str(error.value)
    assert parse("num_generations: 12", "gradient_accumulation_steps: 3")[1].generation_batch_size == batch
    assert parse("num_generations: 12", f"generation_batch_size: {batch}")[1].steps_per_generation == 3


def test_half_a_group_on_each_process_is_refused(parse, monkeypatch):
    """2 processes x 6 = 12 rollouts make one group of 12, which TRL takes; the penalty would see halves of it."""
    monkeypatch.setattr("vt_trl.config.VTGRPOConfig.world_size", 2)
    with pytest.raises(ConfigError, match=r"\(6\) x steps_per_generation \(1\) = 6 rollouts.*to a multiple of 2"):
        parse("num_generations: 12", "per_device_train_batch_size: 6", "gradient_accumulation_steps: 1")


def test_bf16_without_a_gpu_is_one_clear_line(parse, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ConfigError, match="Your setup doesn't support bf16/gpu"):
        parse("use_cpu: false", "bf16: true")


@pytest.mark.parametrize(
    ("text", "words"), [("", "no `key: value` lines"), ("a: [", "not valid YAML"), (None, "Cannot read the recipe")]
)
def test_a_file_that_is_no_recipe(tmp_path, text, words):
    if text is not None:
        (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        parse_recipe(tmp_path / "x.yaml")


# The command line.


def test_a_recipe_alone_means_train(monkeypatch):
    calls, ended = [], SimpleNamespace(end_in_order=SimpleNamespace(asked=False))
    monkeypatch.setattr(run, "train", lambda recipe, overrides: calls.append((recipe, overrides)) or ended)
    assert cli.main(["x.yaml", "--max_steps", "3"]) == 0
    assert cli.main(["train", "y.yml"]) == 0
    assert calls == [("x.yaml", ["--max_steps", "3"]), ("y.yml", [])]


@pytest.mark.parametrize("error", [ConfigError("a number is wrong"), DataError("a picture is wrong", row=3)])
def test_errors_of_the_user_are_one_line_and_status_2(monkeypatch, capsys, error):
    def train(recipe: str, overrides: list[str]) -> None:
        raise error

    monkeypatch.setattr(run, "train", train)
    assert cli.main(["x.yaml"]) == 2
    assert capsys.readouterr() == ("", f"vt-trl: {error}\n")


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(run, "train", lambda recipe, overrides: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["x.yaml"])


def test_a_model_and_rows_that_do_not_exist(tmp_path, checkpoint, capsys):
    smoke = str(ROOT / "recipes" / "smoke.yaml")
    assert cli.main([smoke, "--model", str(tmp_path / "no_model"), "--dataset", str(tmp_path)]) == 2
    assert "no_model" in capsys.readouterr().err
    assert cli.main([smoke, "--model", str(checkpoint), "--dataset", str(tmp_path / "no_rows")]) == 2
    assert "no_rows" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "words"), [("--help", "vt-trl"), ("--version", "vt-trl 0.")])
def test_help_and_version(capsys, option, words):
    with pytest.raises(SystemExit) as end:
        cli.main([option])
    assert end.value.code == 0 and words in capsys.readouterr().out


def test_the_module_runs_as_a_command():
    """A process of its own: status and stderr as a shell sees them, and no traceback."""
    command = [sys.executable, "-m", "vt_trl", "no_such_recipe.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    line = "vt-trl: Cannot read the recipe no_such_recipe.yaml: No such file or directory."
    assert done.stderr.splitlines()[-1] == line
    assert "Traceback" not in done.stderr
