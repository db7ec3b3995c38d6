"""A person plays an episode of a recipe: same environment, same rewards, no model."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import picture
from PIL import Image

from vt_trl.cli import main
from vt_trl.errors import ConfigError, DataError
from vt_trl.play import play, printable

CALL = '<think>Too small.</think>\n<tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'
ANSWER = "<think>Now I see.</think>\n<answer>7</answer>"
OWN = """
from vt_trl.envs import Environment
from vt_trl.envs.base import user
from vt_trl.types import Done, RolloutStatus

class Guess(Environment):
    def __init__(self, greeting="Hello"):
        self.greeting = greeting
    def reset(self, row):
        return self.show(user(self.greeting, row["question"]))
    def step(self, reply, truncated=False):
        return Done(RolloutStatus.ANSWERED, answer=reply)

async def judged(prompts, completions, completion_ids, answer, trainer_state, **columns):
    assert len(prompts) == len(completions) == len(completion_ids) == 1
    return [float(completions[0][-1]["content"] == answer[0][0])]

def silent(completions, **columns):
    return [None]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two rows in a folder, and a recipe whose model does not exist and whose bf16 no CPU could train."""
    folder = tmp_path / "data"
    folder.mkdir()
    with (folder / "data.jsonl").open("w") as file:
        for index in range(2):
            picture(index).save(folder / f"{index}.png")
            row = {"id": f"r{index}", "image": f"{index}.png", "question": f"Which\x1b[2J {index}?", "answer": "7"}
            file.write(json.dumps(row) + "\n")
    settings = {
        "model": "nobody/no-such-model",
        "dataset": str(folder),
        "output_dir": str(tmp_path / "out"),
        "bf16": True,
        "use_vllm": True,
        "environment_args": {"min_pixels": 56 * 56, "max_pixels": 112 * 112},
        "reward_weights": [1.0, 0.5],
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_play_module.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_play_module"
    sys.modules.pop("own_play_module", None)


def typing(*replies: str, end: bool = True) -> Callable[[str], str]:
    """An ``ask`` that types the replies, each ended by an empty line (the last only with ``end``), and then EOF."""
    lines = iter("\n\n".join(replies).split("\n") + ([""] if end else []) if replies else [])

    def ask(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    return ask


def test_a_whole_episode_of_two_turns(recipe: Path, tmp_path: Path) -> None:
    shown: list[str] = []
    result = play(recipe, [], row=1, folder=tmp_path / "seen", ask=typing(CALL, ANSWER), show=shown.append)
    assert result["finished"] and result["status"] == "answered" and result["turns"] == 2
    assert result["faults"] == [[], []] and (result["answer"], result["gold"]) == ("7", ["7"])
    assert result["parts"] == {"accuracy": 1.0, "format": 1.0} and result["total"] == 1.5
    assert [Image.open(path).size for path in result["pictures"]] == [(56, 56), (112, 112)]
    assert Image.open(result["pictures"][1]).tobytes() == picture(1).tobytes()
    text = "\n".join(shown)
    assert "[picture 2: 112 x 112 px, saved as " in text and "Which\N{REPLACEMENT CHARACTER}[2J 1?" in text
    assert "Reward format: 1 (weight 0.5)" in text and "Total: 1.5 (no group penalty" in text
    assert "Correct: 7" in text and "\x1b" not in text


def test_a_malformed_call_is_explained_and_costs_the_format(recipe: Path) -> None:
    shown: list[str] = []
    bad = CALL.replace('"resize"', '"grow"')
    result = play(recipe, [], ask=typing(bad, ANSWER, end=False), show=shown.append)
    assert result["faults"] == [["wrong_arguments"], []] and len(result["pictures"]) == 1
    assert result["parts"] == {"accuracy": 1.0, "format": 0.0} and result["total"] == 1.0
    assert any("The call was not carried out" in text for text in shown)
    assert "Turn 1: wrong_arguments" in "\n".join(shown)
    assert result["pictures"][0].is_file(), "the temporary folder is kept"


@pytest.mark.parametrize(("replies", "turns"), [((), 0), ((CALL,), 1)])
def test_end_of_input_ends_the_session(recipe: Path, replies: tuple[str, ...], turns: int) -> None:
    shown: list[str] = []
    result = play(recipe, [], ask=typing(*replies), show=shown.append)
    assert not result["finished"] and "total" not in result and result["turns"] == turns
    assert "nothing is scored" in shown[-1]


@pytest.mark.parametrize("row", [2, -1])
def test_a_row_that_is_not_there_is_named(recipe: Path, row: int, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ConfigError, match=rf"row is {row}, but .* has 2 rows; give a number from 0 to 1"):
        play(recipe, [], row=row, ask=typing(), show=lambda text: None)
    assert main(["play", str(recipe), "--row", str(row)]) == 2
    assert "has 2 rows" in capsys.readouterr().err


def test_a_row_that_cannot_be_shown_is_named(recipe: Path) -> None:
    (recipe.parent / "data" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"row 1 \(id 'r1'\): cannot read the image"):
        play(recipe, [], row=1, ask=typing(), show=lambda text: None)


def test_an_environment_and_rewards_of_ones_own(recipe: Path, own_module: str) -> None:
    shown: list[str] = []
    names = [f"{own_module}:judged", f"{own_module}:silent"]
    overrides = ["--environment", f"{own_module}:Guess", "--environment_args", '{"greeting": "Good day"}']
    overrides += ["--rewards", *names, "--correctness_reward", names[0], "--reward_weights", "2", "1"]
    result = play(recipe, overrides, ask=typing("7"), show=shown.append)
    assert result["parts"] == {names[0]: 1.0, names[1]: None} and result["total"] is None
    text = "\n".join(shown)
    assert "Good day" in text and "could not be judged" in text and "whole group would be dropped" in text
    assert result["pictures"] == []


def test_the_command_reads_the_keyboard(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(ANSWER))
    assert main(["play", str(recipe), "--pictures", str(recipe.parent / "p"), "--penalty", "none"]) == 0
    assert "Status: answered" in capsys.readouterr().out
    assert (recipe.parent / "p" / "picture-1.png").is_file()


def test_printable_keeps_text_and_lines() -> None:
    assert printable("é 漢\n\tx") == "é 漢\n\tx"
    assert printable("\x1b]0;\u202e") == "\N{REPLACEMENT CHARACTER}]0;\N{REPLACEMENT CHARACTER}"
