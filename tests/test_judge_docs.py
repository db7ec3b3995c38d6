"""docs/judges.md says what the committed results say, and its example runs."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from vt_trl.config import VTGRPOConfig
from vt_trl.judges.base import Case, Judge, Verdict
from vt_trl.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "judges.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["judge_agreement", "judge_agreement_heldout"])
def test_agreement_figures_are_the_committed_ones(name):
    report = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    (pair,) = report["pairs"]
    line = next(line for line in TEXT.splitlines() if line.startswith(f"| `benchmarks/{report['rows_file']}`"))
    figures = f"| {report['judges']['rule']['coverage']:.1%} | {pair['agreement']:.1%} | {pair['kappa']:.3f} |"
    assert line.endswith(figures) and f": {report['rows']}," in line


def test_the_example_judge_runs():
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict = {}
    exec(compile(block, "judges.md", "exec"), names)  # our own file
    judge = names["Contains"]()
    assert isinstance(judge, Judge)
    cases = [Case.of("q", "7", "it is 7"), Case.of("q", "7", "8")]
    assert [one.verdict for one in asyncio.run(judge.judge(cases))] == [Verdict.RIGHT, Verdict.WRONG]


def test_the_recipe_lines_parse(tmp_path):
    block = re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[1]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{block}\nmodel: x\ndataset: y\nuse_cpu: true\nper_device_train_batch_size: 8\n")
    _, args = parse_recipe(recipe)
    assert isinstance(args, VTGRPOConfig) and args.judge == "openai" and args.judge_args["concurrency"] == 64


def test_every_setting_named_in_the_docs_exists():
    fields = VTGRPOConfig.__dataclass_fields__
    assert set(re.findall(r"`(judge_[a-z_]+)`", TEXT)) - {"judge_args"} <= set(fields)
    assert {"judge_max_failed", "judge_cache_dir"} <= set(re.findall(r"judge_[a-z_]+", TEXT))
