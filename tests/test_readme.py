"""The README's figures are those of the committed reports, and the reports meet what the demo promises."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import picture
from helpers import SHORT_PROMPTS
from PIL import Image

from demos.reading import table
from demos.reading.ablation import RULES, outcome
from demos.reading.stages import targets
from vt_trl.envs import ResizeEnv
from vt_trl.run_notes import RunNotes, environment_facts
from vt_trl.types import Done, RolloutStatus

ROOT = Path(__file__).resolve().parents[1]


def test_table_is_the_committed_one():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    current = table.with_table(text, table.load_reports())
    assert text == current, "run `python -m demos.reading.table --write README.md`"


def test_readme_is_short():
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 200


def test_python_examples_run(checkpoint, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # our own file
    environment = names["OneLook"]()
    shown = environment.reset({"image": Image.new("RGB", (56, 56)), "question": "What?"})
    assert shown.messages[0].text == "<image>What?"
    assert environment.step(" 7 ") == Done(RolloutStatus.ANSWERED, answer="7")
    assert environment.step("", truncated=True).status is RolloutStatus.TRUNCATED
    said = [[{"role": "assistant", "content": "x" * length}] for length in (399, 400)]
    assert names["brevity"](said) == [1.0, 0.0]
    model = shutil.copytree(checkpoint, tmp_path / "model")
    facts = environment_facts(ResizeEnv(prompts=SHORT_PROMPTS, min_pixels=3136), SimpleNamespace(max_turn_tokens=2))
    RunNotes(environment=facts).write(model)
    picture(0).save(tmp_path / "receipt.png")
    assert names["read_total"](str(model), str(tmp_path / "receipt.png")) == (None, False, 4)  # cut after two tokens


def test_three_seeds_meet_every_target():
    reports = table.load_reports()
    assert len({report["seed"] for report in reports}) >= 3
    for report in reports:
        missed = [name for name, met in targets(report).items() if not met]
        assert not missed, f"seed {report['seed']}: {missed}"
        assert report["targets_met"] == targets(report)
        assert report["hard_share"] == 0.25
        assert report["wall_seconds"] <= 15 * 60


def test_targets_can_be_missed():
    report = table.load_reports()[0]
    worse = json.loads(json.dumps(report))
    worse["after"]["request_rate_easy"] = 0.11
    assert not all(targets(worse).values())


def test_ablation_results_have_their_shape():
    results = json.loads((ROOT / "docs/results/ablation.json").read_text(encoding="utf-8"))
    assert set(results) == set(RULES)
    for runs in results.values():
        assert len({run["seed"] for run in runs}) >= 2
        for run in runs:
            lengths = {len(run[key]) for key in ("steps", "request_rate_easy", "request_rate_hard", "accuracy")}
            assert len(lengths) == 1 and lengths.pop() > 0
    grid = json.loads((ROOT / "docs/results/ablation_grid.json").read_text(encoding="utf-8"))
    for cell in grid["cells"]:
        assert cell["outcome"] == outcome(cell["request_rate_easy"], cell["request_rate_hard"])


@pytest.mark.parametrize(
    ("easy", "hard", "expected"),
    [(0.0, 1.0, "selective"), (0.9, 0.95, "always asks"), (0.1, 0.0, "never asks"), (0.5, 0.5, "mixed")],
)
def test_outcome(easy: float, hard: float, expected: str):
    assert outcome(easy, hard) == expected
