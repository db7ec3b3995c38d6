"""The loops that are shipped: the published numbers are in the plan, and the smoke ones run, as a user runs them."""

from __future__ import annotations

import json
import time

import loops
import pytest
import yaml
from shipped import LOOPS, ROOT

from vt_trl.data import load_rows
from vt_trl.loop import plan_loop
from vt_trl.loop.manifest import Manifest
from vt_trl.loop.sizes import architecture, sizes
from vt_trl.loop.stages import check_training, processes

PUBLISHED = ROOT / "recipes" / "openvlthinker.yaml"
GIVEN = ("--pool", "org/pool", "--held_out", "org/held-out")
SMOKES = {"openvlthinker_smoke": "single", "loop_resize_smoke": "resize", "loop_zoom_smoke": "zoom"}


@pytest.fixture
def published(monkeypatch):
    monkeypatch.chdir(ROOT)
    return plan_loop(PUBLISHED, GIVEN)


def test_loops_are_found():
    assert {path.stem for path in LOOPS} == {"openvlthinker", *SMOKES}


def test_three_rounds_of_the_published_loop(published):
    """SFT from the base each round; medium on it, hard on that; traces by the model of the round before."""
    round_of = ["sft", "medium", "hard", "score", "drift"]
    assert list(published.by_id) == [
        *("seeds", "difficulty", "medium_rows", "hard_rows"),
        *(f"r1.{name}" for name in (*round_of, "write")),
        *(f"r2.{name}" for name in (*round_of, "write")),
        *(f"r3.{name}" for name in round_of),
        "release",
    ]
    uses = {one.id: one.uses for one in published.stages}
    assert [uses[f"r{n}.sft"] for n in (1, 2, 3)] == [("seeds",), ("r1.write",), ("r2.write",)]
    assert uses["r2.medium"] == ("r2.sft", "medium_rows") and uses["r2.hard"] == ("r2.medium", "hard_rows")
    assert uses["r2.write"] == ("r2.hard",) and uses["r2.drift"] == ("r2.hard", "r1.drift")
    assert uses["r1.drift"] == ("r1.hard",) and "before" in published.by_id["r1.drift"].raw
    assert {architecture(published.by_id[f"r{n}.hard"], published) for n in (1, 2, 3)} == {
        "Qwen/Qwen2.5-VL-7B-Instruct"
    }


def test_the_papers_numbers(published):
    """OpenVLThinker (arXiv 2503.17352): batches are of 8 processes, as the launch says."""
    found = {}
    for name in ("sft", "medium", "hard"):
        one = published.by_id[f"r1.{name}"]
        assert processes(one.launched()) == 8
        found[name] = (*check_training(one.kind, one.settings(), 8, name), 8)
    run, args, count = found["sft"]
    assert (args.learning_rate, args.num_train_epochs, run.train_vision) == (5e-7, 1, False)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * count == 32
    for name, passes in (("medium", 5), ("hard", 15)):
        run, args, count = found[name]
        assert (args.num_generations, args.learning_rate, args.beta, args.top_p) == (5, 1e-6, 0.01, 0.99)
        assert (args.max_turn_tokens, args.num_train_epochs, run.train_vision) == (2048, passes, False)
        assert args.generation_batch_size / args.num_generations == 512
        update = args.per_device_train_batch_size * args.gradient_accumulation_steps * count
        assert update / args.num_generations == 128
        assert args.environment_args == {"max_pixels": 262144}
        assert dict(zip(args.rewards, args.reward_weights, strict=True)) == {
            "accuracy": 0.5, "reasoned": 0.5, "format": 0.0,
        }  # fmt: skip


def test_the_size_of_the_published_loop(monkeypatch, tmp_path):
    """3072 questions: 6 generations of 512 and 4 updates each per pass; 5 passes of medium, 15 of hard ones."""
    (tmp_path / "data.jsonl").write_text("{}\n" * 3072)
    monkeypatch.chdir(ROOT)
    plan = plan_loop(PUBLISHED, (*GIVEN, "--pool", str(tmp_path)))
    found = sizes(plan)
    assert found["r1.medium"].steps == 6 * 4 * 5 and found["r1.medium"].episodes == 3072 * 5 * 5
    assert found["r2.hard"].steps == 6 * 4 * 15
    assert found["seeds"].episodes == 3072 * 4 and found["r3.sft"].steps == -(-3000 // 32)


def smoke(name, *words):
    """``vt-trl loop`` on a smoke recipe."""
    driver = loops.start(ROOT / "recipes" / f"{name}.yaml", *words)
    said, _ = driver.communicate(timeout=2400)
    assert driver.returncode == 0, said[-6000:]


def check_smoke(folder):
    """Every stage is done; the model has written its own right traces, and they are what the next round learns."""
    manifest = Manifest.read(folder)
    assert {one.status for one in manifest.stages.values()} == {"done"}
    write = manifest.stages["r1.write"].metrics
    assert 0 < write["kept_share"] <= 1 and write["rows"] == len(load_rows(folder / "stages" / "r1.write"))
    assert set(manifest.stages["r2.sft"].inputs["files"]) == {"<start/model>", "<r1.write>"}
    assert manifest.stages["r1.sft"].metrics["loss"] < 0.5 * manifest.stages["r1.sft"].metrics["loss/first"]
    assert manifest.best["out"] == f"stages/r{manifest.best['round']}.hard" and manifest.best["value"] > 0.5
    return manifest


def test_the_whole_loop_on_a_cpu_with_a_kill_in_the_middle(tmp_path):
    """Real commands, up to the fine-tuning on the model's own traces; kill -9 of the driver in the first one."""
    words = ("--folder", str(tmp_path / "out"), "--until", "r2.sft")
    driver = loops.start(ROOT / "recipes" / "openvlthinker_smoke.yaml", *words)
    kept = tmp_path / "out" / "stages" / "r1.sft" / "checkpoint-40" / "vt_trl_files.json"
    end = time.monotonic() + 900
    while not kept.exists() and driver.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    driver.kill()
    written = kept.stat().st_mtime_ns
    smoke("openvlthinker_smoke", *words)
    manifest = check_smoke(tmp_path / "out")
    assert list(manifest.stages) == ["start", *(f"r1.{one}" for one in ("sft", "hard", "score", "write")), "r2.sft"]
    assert manifest.stages["start"].starts == 1 and manifest.stages["r1.sft"].starts == 2
    assert kept.stat().st_mtime_ns == written  # it went on after step 40, and did not come by it again
    assert manifest.stages["r1.hard"].metrics["steps"] == 2
    settings = yaml.safe_load((tmp_path / "out" / "settings" / "r1.hard.yaml").read_text())
    assert settings["model"] == str(tmp_path / "out" / "stages" / "r1.sft")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loop_resize_smoke", "loop_zoom_smoke"])
def test_traces_of_several_turns_with_pictures(tmp_path, name):
    """The model of round 1 looks where its traces did, is right, and what it wrote is learnt in round 2."""
    smoke(name, "--folder", str(tmp_path), "--launch.num_processes", "1", "--launch.cpu", "true")
    manifest = check_smoke(tmp_path)
    assert "accelerate.commands.launch" in manifest.stages["r1.hard"].command and "r2.score" in manifest.stages
    replies = load_rows(tmp_path / "stages" / "r1.write")["replies"]
    assert any(len(one) == 2 for one in replies) and any(len(one) == 1 for one in replies)
    assert json.loads((tmp_path / "stages" / "r1.score" / "results.json").read_text())["cells"][0]["request_rate"] > 0
