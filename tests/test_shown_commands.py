"""Commands that READMEs, documentation and recipes show are ones the program understands."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from shipped import LOOPS, ON_A_CPU, RECIPES, ROOT, kind_of

from data_prep import STEPS
from vt_trl import cli, tiny
from vt_trl.commands import COMMANDS, loop
from vt_trl.errors import ConfigError
from vt_trl.loop import plan_loop
from vt_trl.recipe import parse_recipe


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    """A recipe's ``env`` goes into the environment of the process; here it has to leave it again."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


_STARTS = (
    *("vt-trl ", "python -m vt_trl", "python -m demos.", "python demos/", "python -m benchmarks."),
    *("accelerate launch ", "make "),
)
GIVEN = ("--pool", "org/pool", "--held_out", "org/held-out")  # what openvlthinker.yaml leaves to its user
_PLACES = {"RECIPE": "recipes/demo.yaml", "RECIPE.yaml": "recipes/demo.yaml", "STEP": "select"}


def commands_of(text: str, comments: bool) -> list[str]:
    """Command lines of a Markdown file (lines and inline code), or of the comments of a YAML file."""
    lines = [line.lstrip() for line in re.sub(r"\\\n\s*(?:#\s+)?", " ", text).splitlines()]
    if comments:
        lines = [line.lstrip("# ") for line in lines if line.startswith("#")]
    lines = [line.removeprefix("$ ") for line in lines]
    lines += re.findall(r"`([^`\n]+)`", text)
    lines = [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line) for line in lines]
    found = [line for line in lines if line.startswith(_STARTS) and "…" not in line and "..." not in line]
    return [shlex.join(shlex.split(line, comments=True)) for line in found if "`" not in line]


def shown() -> list[tuple[str, str]]:
    pages = (
        "README.md",
        "CONTRIBUTING.md",
        "recipes/README.md",
        "benchmarks/README.md",
        "docs/judges.md",
        "docs/loop.md",
        "docs/performance.md",
        "docs/data.md",
        "docs/hub.md",
        "docs/environments.md",
        "docs/evaluate.md",
        "docs/seeing-a-run.md",
        "docs/serve.md",
        "docs/loop_demo.md",
        "demos/space/README.md",
    )
    texts = [(path, path.read_text()) for path in (*(ROOT / name for name in pages), *RECIPES, *LOOPS)]
    return sorted({(path.name, line) for path, text in texts for line in commands_of(text, path.suffix == ".yaml")})


def check_command(line: str) -> None:
    """Raise unless a command line would be understood: targets, files, settings, launch options."""
    words = [_PLACES.get(word, word) for word in shlex.split(line)]
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "accelerate":
        options = launch_command_parser().parse_args(words[2:])
        if options.config_file:
            load_config_from_file(str(ROOT / options.config_file))
        assert options.module and options.training_script == "vt_trl", line
        check_arguments(options.training_script_args)
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file() and len(words) == 2, line
    elif words[:3] == ["python", "-m", "vt_trl.tiny"]:
        tiny._parser().parse_args(words[3:])
    elif words[0] == "python" and words[2] != "vt_trl":
        found = importlib.util.find_spec(words[2])
        package = found.submodule_search_locations is not None
        importlib.import_module(f"{words[2]}.__main__" if package else words[2]).parse_args(words[3:])
    else:
        check_arguments(words[1:] if words[0] == "vt-trl" else words[3:])


def check_arguments(words: list[str]) -> None:
    if words[0].endswith((".yaml", ".yml")):
        words = ["train", *words]
    if words[0].startswith("-"):
        return cli._parser().print_help() if words in (["--help"], ["--version"]) else pytest.fail(str(words))
    if (len(words) == 1 and words[0] in COMMANDS) or words in [["prepare", step] for step in STEPS]:
        return  # a command named in a sentence
    module, options, overrides = cli.parse(words)
    if module is loop:
        plan_loop(ROOT / options.recipe, (*GIVEN, *overrides) if "smoke" not in options.recipe else overrides)
    elif hasattr(options, "recipe"):
        path = ROOT / options.recipe
        parse_recipe(path, (*overrides, *ON_A_CPU), kind_of(path))


def test_commands_are_found():
    assert ("smoke.yaml", "accelerate launch -m vt_trl recipes/smoke.yaml --model MODEL --dataset ROWS") in shown()
    assert ("CONTRIBUTING.md", "make test-vllm") in shown()
    assert any(
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 32" in line
        for file, line in shown()
        if file == "README.md"
    )


@pytest.mark.parametrize(("file", "line"), shown())
def test_a_command_that_is_shown_is_understood(file, line):
    check_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "make no-such-target",
        "vt-trl train recipes/no_such.yaml",
        "vt-trl no-such-command",
        "python -m vt_trl recipes/smoke.yaml --model x",
        "accelerate launch --no_such_option 1 -m vt_trl recipes/demo.yaml",
        "accelerate launch --config_file recipes/accelerate/no_such.yaml -m vt_trl recipes/demo.yaml",
        "python -m vt_trl recipes/demo.yaml --learing_rate 3",
        "python -m vt_trl.tiny runs/tiny --famly qwen3_vl",
    ],
)
def test_a_command_with_a_mistake_would_be_found(line):
    with pytest.raises((SystemExit, ConfigError, OSError, ValueError, subprocess.CalledProcessError)):
        check_command(line)
