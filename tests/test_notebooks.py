"""The notebooks for Colab, executed on a CPU with a tiny model: training, then evaluating and asking what it made."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import torch
import yaml
from conftest import picture
from helpers import CALL, SHORT_PROMPTS, answer
from nbclient import NotebookClient
from safetensors.torch import load_file
from shipped import ON_A_CPU
from taught import taught

from vt_trl.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[1]
BOOKS = sorted((ROOT / "demos").glob("*.ipynb"))
ROWS = 6


def read(name: str) -> Any:
    return nbformat.read(ROOT / "demos" / f"{name}.ipynb", as_version=4)


def tagged(book: Any, tag: str) -> list[Any]:
    return [cell for cell in book.cells if tag in cell.metadata.get("tags", ())]


def in_miniature(book: Any, **parameters: Any) -> list[Any]:
    """The cells to execute: other parameters, as papermill sets them, and without what only Colab needs."""
    (cell,) = tagged(book, "parameters")
    names: dict[str, Any] = {}
    exec(cell.source, names)  # our own file
    assert not set(parameters) - set(names), "a parameter that the notebook does not have"
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    return [cell for cell in book.cells if "colab-only" not in cell.metadata.get("tags", ())]


def printed(cells: list[Any]) -> str:
    return "".join(out.text for cell in cells for out in cell.get("outputs", ()) if out.output_type == "stream")


def pages(cells: list[Any]) -> list[str]:
    """HTML of all outputs."""
    data = [out.data for cell in cells for out in cell.get("outputs", ()) if "data" in out]
    return [one["text/html"] for one in data if "text/html" in one]


def data_set(folder: Path) -> Path:
    folder.mkdir()
    lines = []
    for number in range(ROWS):
        picture(50 + number).save(folder / f"{number}.png")
        row = {"id": f"r{number}", "image": f"{number}.png", "question": "Which letter?", "answer": "A"}
        lines.append(json.dumps(row))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> SimpleNamespace:
    """All three, one after the other in one kernel that forgets every name in between: starting three takes a minute.

    The model asks and reads A, or answers H at once, each half of the time; only A is right.
    """
    folder = tmp_path_factory.mktemp("notebooks")
    moves = [("Which letter?", [CALL, answer("A")]), ("Which letter?", [answer("H")])]
    model, rows = str(taught(folder / "model", moves, enough=0.5)), str(data_set(folder / "rows"))
    small = {"environment_args": {"prompts": SHORT_PROMPTS, "min_pixels": 3136}, "dtype": "float32", "bf16": False}
    small |= {"use_cpu": True, "use_vllm": False, "gradient_checkpointing": False, "max_turn_tokens": 8}
    small |= {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "learning_rate": 0.001, "lora_r": 4}
    options = ["--device", "cpu", "--backend", "transformers"]
    export = str(folder / "run-export")
    books = {
        "train_lora": {"model": model, "dataset": rows, "rows": ROWS, "steps": 2, "output": str(folder / "run")},
        "evaluate": {"models": [f"after={export}"], "data": rows, "limit": 4, "out": str(folder / "out")},
        "ask": {"model": export, "question": "Which letter?", "settings": {"device": "cpu"}},
    }
    books["train_lora"]["settings"] = small
    books["evaluate"]["options"] = options
    cells = {name: in_miniature(read(name), **parameters) for name, parameters in books.items()}
    forget = nbformat.v4.new_code_cell
    whole = nbformat.v4.new_notebook(cells=[one for part in cells.values() for one in (*part, forget("%reset -f"))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        client = NotebookClient(
            whole, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        client.execute()
    return SimpleNamespace(folder=folder, model=Path(model), export=Path(export), **cells)


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_holds_no_outputs(path):
    text = path.read_text(encoding="utf-8")
    book = nbformat.reads(text, as_version=nbformat.NO_CONVERT)
    nbformat.validate(book)
    assert (book.nbformat, book.nbformat_minor) >= (4, 5) and len({cell.id for cell in book.cells}) == len(book.cells)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id
    assert len(tagged(book, "parameters")) == 1
    assert all(cell.source.startswith("%pip install") for cell in tagged(book, "colab-only"))


def test_there_are_three():
    assert [path.stem for path in BOOKS] == ["ask", "evaluate", "train_lora"]


def test_training_leaves_an_adapter_that_has_moved(done):
    adapter = load_file(done.folder / "run" / "adapter_model.safetensors")
    moved = [name for name, value in adapter.items() if "lora_B" in name and value.abs().max() > 0]
    assert moved and not any("visual" in name for name in adapter)  # B starts at zero
    state = json.loads((done.folder / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert 0 < [log["request_rate"] for log in state["log_history"] if "request_rate" in log][0] < 1
    shown = pages(done.train_lora)
    assert len(shown) == 2 and all("<article>" in html and "data:image/png" in html for html in shown)
    assert "Correct answer" in shown[0] and "right" in shown[0] and "wrong" in shown[1]
    drawn = [
        out for cell in done.train_lora for out in cell.get("outputs", ()) if "image/svg+xml" in out.get("data", {})
    ]
    assert len(drawn) == 2


def test_the_export_is_the_trained_model(done):
    before, after = (load_file(folder / "model.safetensors") for folder in (done.model, done.export))
    same = {name: torch.equal(value, after[name]) for name, value in before.items()}
    assert set(before) == set(after) and not all(same.values())
    assert all(equal for name, equal in same.items() if "visual" in name)


def test_the_evaluation_has_sane_numbers(done):
    cells = {cell["policy"]: cell for cell in json.loads((done.folder / "out" / "results.json").read_text())["cells"]}
    assert set(cells) == {"two-turn", "always-full", "always-low"}
    assert {cell["rows"] for cell in cells.values()} == {4}
    assert (cells["always-full"]["visual_tokens"], cells["always-low"]["visual_tokens"]) == (16, 4)
    own = cells["two-turn"]
    assert own["visual_tokens"] == 4 + 16 * own["request_rate"]
    assert own["accuracy"] in (0, 0.25, 0.5, 0.75, 1)  # of four rows
    shown = pages(done.evaluate)
    assert any("visual_tokens_share" in html and "always-low" in html for html in shown)
    episodes = [html for html in shown if "<article>" in html]
    assert episodes and all("56 × 56 px, 4 visual tokens" in html and "answered" in html for html in episodes)


def test_a_question_is_answered(done):
    """About the receipt that the notebook draws, which is like nothing the model knows: any answer will do."""
    said = printed(done.ask)
    (asked,) = re.findall("answer: .*; (asked|did not ask)", said)
    ((used, full),) = re.findall(r"(\d+) visual tokens; always-full would take (\d+)", said)
    assert "turn 1: " in said and ("turn 2: " in said) == (asked == "asked")
    (episode,) = pages(done.ask)
    assert episode.count("data:image/") == 1 + (asked == "asked") and "Which letter?" in episode
    assert int(used) > 0 and int(full) > 0 and f"<dt>Visual tokens</dt><dd>{used}</dd>" in episode


def test_the_recipe_of_the_notebook_is_one_that_runs(tmp_path):
    """As it stands, with nothing replaced: read and checked like every recipe that is shipped."""
    names: dict[str, Any] = {}
    for cell in read("train_lora").cells[2:4]:
        exec(cell.source.replace('"runs/colab"', repr(str(tmp_path))), names)  # our own file
    run, args = parse_recipe(tmp_path / "recipe.yaml", ON_A_CPU)
    assert (run.lora, run.model, args.use_vllm) == ("language", "Qwen/Qwen2.5-VL-3B-Instruct", True)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["max_steps"] == args.max_steps == 50
