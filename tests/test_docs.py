"""docs/troubleshooting.md quotes what the program says, names settings that exist, and links to files that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vt_trl.config import VTGRPOConfig
from vt_trl.metrics import RolloutRecord, summarise
from vt_trl.recipe import RunArguments

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = [
    message
    for part in re.findall(r"\| message \|.*?\n\n", TEXT, re.DOTALL)
    for message in re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE)
]


@pytest.fixture(scope="module")
def source() -> str:
    """All of the package as one text, with literals that are continued on the next line joined."""
    files = sorted((ROOT / "vt_trl").rglob("*.py"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_messages_are_found():
    assert len(MESSAGES) >= 15


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_is_one_the_program_prints(message, source):
    assert message in source


def test_settings_exist():
    known = set(VTGRPOConfig.__dataclass_fields__) | set(RunArguments.__dataclass_fields__)
    named = set(re.findall(r"`([a-z]+_[a-z_]+):? ?[\w.{]*", TEXT)) | set(re.findall(r"--([a-z]+_[a-z_]+)", TEXT))
    logged = {"request_rate", "accuracy_with_tool", "accuracy_without_tool", "frac_reward_zero_std"}
    logged |= {"eval_accuracy", "eval_visual_tokens"}
    inside = {"max_pixels", "max_attempts"}  # of environment_args and of judge_args
    assert named - known - logged - inside == set()


def test_links_lead_somewhere():
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_logged_names_exist():
    record = RolloutRecord(
        id="a", group="0", source="s", status="answered", faults=["bad_json", "no_move"], asked=True, attempted=True,
        correct=True, well_formed=True, reward=1.0, penalty=0.0, advantage=0.0, parts={}, visual_tokens=1, images=1,
        completion_tokens=1, sampled_tokens=1,
    )  # fmt: skip
    names = set(summarise([record, record]))
    elsewhere = {"groups/effective_share", "groups/rounds", "sampling/logp_difference_mean"}  # trainer, refill, passes
    named = {name for name in re.findall(r"`([a-z]+/[a-z_]+)`", TEXT) if not name.startswith("judge/")}
    assert named - names - elsewhere == set()


def test_kill_figures_are_the_committed_ones():
    report = json.loads((ROOT / "docs" / "results" / "benchmark_kill.json").read_text(encoding="utf-8"))
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert f"| kill | kills, resumed | {report['kills']}, {report['resumed']} | |" in text
    compared = f"{report['steps_compared']}, {report['mismatches']}"
    assert f"| kill | tries at steps compared, mismatches | {compared} | |" in text
    assert report["kills"] >= 20 and report["mismatches"] == 0
    assert f"[{report['kills']} kills]" in (ROOT / "README.md").read_text(encoding="utf-8")
