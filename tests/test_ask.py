"""``vt-trl ask``: the turns on the terminal, the pictures on disk, and errors in one line."""

from __future__ import annotations

import json

import pytest
from conftest import picture
from helpers import SHORT_PROMPTS
from PIL import Image
from rich.console import Console

from vt_trl import ask as asking
from vt_trl import cli
from vt_trl.pipeline import VisionThinkPipeline


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "picture.png"
    picture(0).save(path)
    return str(path)


@pytest.fixture
def arguments(checkpoint, image):
    env = json.dumps({"prompts": SHORT_PROMPTS, "min_pixels": 3136})
    settings = ["--device", "cpu", "--max-turn-tokens", "4", "--environment-args", env]
    return ["ask", "--image", image, "--question", "What is it?", "--model", str(checkpoint), *settings]


def test_turns_and_pictures(arguments, tmp_path, capsys):
    """The policy writes whatever it writes; two turns and both pictures must be shown and kept."""
    kept = tmp_path / "kept"
    assert cli.main([*arguments, "--policy", "helpers:AsksFirst", "--save-pictures", str(kept)]) == 0
    out = capsys.readouterr().out
    assert "turn 1" in out and "turn 2" in out
    assert "shown: 112 x 112 px" in out and "looked again; 20 visual tokens" in out
    assert [Image.open(kept / f"picture-{number}.png").size for number in (1, 2)] == [(56, 56), (112, 112)]


def test_what_a_policy_writes_commands_no_terminal(monkeypatch, checkpoint):
    from helpers import Script

    from vt_trl.generation.base import ScriptedBackend

    class Scripted(VisionThinkPipeline):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            text = "<think>\x1b[2J[bold]x[/]</think><answer>[red]a\x07</answer>"
            self.runner.backend = ScriptedBackend(Script(self.model.parts.tokenizer, lambda index, turn: text))

    monkeypatch.setattr(asking, "VisionThinkPipeline", Scripted)
    console = Console(record=True, width=200, force_terminal=False)
    settings = {"environment_args": {"prompts": SHORT_PROMPTS, "min_pixels": 3136}, "device": "cpu"}
    result = asking.ask(picture(0), "What?", checkpoint, console=console, **settings)
    shown = console.export_text()
    assert result.answer == "[red]a\x07"
    assert "[bold]x[/]" in shown and "[red]a" in shown and not {"\x1b", "\x07"} & set(shown)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--image": "no_such.png"}, "cannot read the image: No such file"),
        ({"--model": "no_such_model_here"}, "model is 'no_such_model_here', which does not load"),
        ({"--environment-args": "3"}, "--environment-args must map names to settings"),
        ({"--policy": "two-turns"}, "Did you mean 'two-turn'"),
    ],
)
def test_errors_are_one_line(arguments, capsys, change, words):
    for name, value in change.items():
        arguments = [*arguments, name, value]
    assert cli.main(arguments) == 2
    shown = capsys.readouterr().err.strip()
    assert words in shown and shown.startswith("vt-trl: ") and "Traceback" not in shown


def test_a_file_that_is_no_picture(arguments, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    assert cli.main([*arguments, "--image", str(broken)]) == 2
    assert "cannot read the image: it is in none of the formats" in capsys.readouterr().err
