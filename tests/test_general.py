"""General VQA end to end: ten real GRPO steps on a CPU, judged locally and through the OpenAI client."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from conftest import make_rows
from datasets import Dataset
from helpers import SHORT_PROMPTS, Script

from benchmarks.judge_server import JudgeServer, per_case, refusal, server_error
from demos.general import __main__ as demo
from vt_trl.config import VTGRPOConfig
from vt_trl.envs import DirectEnv
from vt_trl.errors import ConfigError, JudgeOutage
from vt_trl.generation.base import ScriptedBackend
from vt_trl.trainer import VTGRPOTrainer


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One folder for both runs, so that the policy is made once."""
    return tmp_path_factory.mktemp("general")


def check(report: dict) -> None:
    assert report["steps"] == 10 and len(report["loss"]) == 10
    assert all(math.isfinite(value) for name in ("loss", "grad_norm", "accuracy") for value in report[name])
    assert all(0 < asked <= cases for asked, cases in zip(report["judge/asked"], report["judge/cases"], strict=True))
    assert report["unjudged"] == [0.0] * 10
    assert 0 < max(report["accuracy"]) < 1 and max(report["grad_norm"]) > 0
    assert report["last_step_agreement_with_equal_strings"] >= 0.98


def test_ten_steps_with_the_openai_client(out, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-demo-secret-demo")
    check(demo.main(["--judge", "openai", "--out", str(out), "--threads", "1"]))
    report = json.loads((out / "openai" / "report.json").read_text(encoding="utf-8"))
    assert report["judge"] == "openai" and report["versions"]["trl"]
    texts = [path.read_bytes() for path in (out / "openai").rglob("*") if path.is_file()]
    assert texts and not any(b"demo-secret" in text for text in texts)  # nor in training_args.bin


def test_ten_steps_with_a_local_judge(out, tiny_judge):
    check(demo.main(["--judge", "local", "--out", str(out), "--threads", "1", "--judge-model", str(tiny_judge)]))


def make_trainer(checkpoint, tmp_path, server: JudgeServer, replies: list[str], **settings) -> VTGRPOTrainer:
    """A trainer whose rollouts are the given replies, four per group."""
    args = VTGRPOConfig(
        str(tmp_path),
        environment="direct",
        environment_args={"prompts": {name: SHORT_PROMPTS[name] for name in ("system", "task")}, "min_pixels": 3136},
        judge="openai",
        judge_args={
            "base_url": server.base_url,
            "max_attempts": 2,
            "max_wait": 0.01,
            **settings.pop("judge_args", {}),
        },
        judge_cache=False,
        penalty="none",
        num_generations=4,
        per_device_train_batch_size=8,
        max_turn_tokens=64,
        max_completion_length=128,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        logging_steps=1,
        **settings,
    )
    trainer = VTGRPOTrainer(str(checkpoint), args, Dataset.from_list(make_rows(2)))
    script = Script(trainer.processing_class.tokenizer, lambda member, turn: replies[member])
    trainer.runner.backend = ScriptedBackend(script)
    return trainer


def batch_of(trainer: VTGRPOTrainer, groups: int) -> dict:
    trainer.model.train()
    return trainer._generate_and_score_completions([trainer.train_dataset[n // 4] for n in range(4 * groups)])


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def said(text: str) -> str:
    return f"<think>x</think><answer>{text}</answer>"


def test_a_failed_verdict_drops_its_group_and_no_other(checkpoint, tmp_path):
    """Group 0: gold "0", one member the judge refuses. Group 1: gold "1", all judged."""
    replies = [said("0"), said("bad"), said("2"), said("0"), said("1"), said("3"), said("1"), "no tags"]
    with JudgeServer(per_case({"bad": refusal("no")})) as server:
        trainer = make_trainer(checkpoint, tmp_path, server, replies, judge_max_failed=0.5)
        batch = batch_of(trainer, 2)
        logs: dict = {}
        trainer.log(logs)
    assert batch["advantages"][:4].tolist() == [0.0] * 4 and batch["tool_mask"][:4].sum() == 0
    assert (batch["advantages"][4:] > 0).tolist() == [True, False, True, False]
    assert batch["tool_mask"][4:].sum() > 0
    assert logs["groups/dropped_unjudged"] == 0.5 and logs["unjudged"] == 1 / 8
    assert logs["accuracy"] == pytest.approx(4 / 7)
    assert logs["judge/cases"] == 7 and logs["judge/asked"] == len(server.requests) == 5
    assert logs["judge/failed"] == pytest.approx(1 / 7)


def test_judging_starts_while_other_rollouts_still_run(checkpoint, tmp_path):
    replies = [said(str(number)) for number in range(8)]
    with JudgeServer() as server:
        trainer = make_trainer(checkpoint, tmp_path, server, replies)
        begun, seen = trainer.runner.backend.completed, []

        def slowly():
            for sample in begun():
                yield sample
                if not seen:
                    deadline = time.monotonic() + 10
                    while not server.requests and time.monotonic() < deadline:
                        time.sleep(0.01)
                seen.append(len(server.requests))

        trainer.runner.backend.completed = slowly
        batch_of(trainer, 2)
    assert seen[0] >= 1 and len(seen) == 8  # the first was judged before the second was handed over


def test_an_outage_stops_the_run(checkpoint, tmp_path):
    with JudgeServer(server_error()) as server:
        trainer = make_trainer(checkpoint, tmp_path, server, [said(str(n)) for n in range(8)], max_steps=4)
        with pytest.raises(JudgeOutage, match="HTTP 500"):
            trainer.train()
    assert trainer.state.global_step <= 2


def test_a_batch_without_any_verdict_trains_nothing(checkpoint, tmp_path):
    with JudgeServer(server_error()) as server:
        replies = [said(str(number)) for number in range(8)]
        trainer = make_trainer(checkpoint, tmp_path, server, replies, max_steps=1, judge_max_failed=1.0, beta=0.0)
        before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
        trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == 0.0 and log["unjudged"] == 1.0 and log["groups/dropped_unjudged"] == 1.0
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())


def test_validation_reports_what_was_not_judged_apart(checkpoint, tmp_path):
    with JudgeServer(per_case({"bad": refusal("no")})) as server:
        trainer = make_trainer(checkpoint, tmp_path, server, [said("0"), said("bad")], judge_max_failed=0.9)
        trainer.eval_dataset = Dataset.from_list(make_rows(2))
        logs = trainer.evaluate()
    assert logs["eval_accuracy"] == 1.0 and logs["eval_unjudged"] == 0.5


def test_the_environment_shows_the_full_picture_once():
    row = make_rows(1, size=(112, 84))[0]
    environment = DirectEnv(min_pixels=3136)
    observation = environment.reset(row)
    assert environment.max_turns == 1
    assert [image.size for message in observation.messages for image in message.images] == [(112, 84)]
    assert observation.messages[1].text.strip() == "<image>\nWhich number is 0?"
    assert "<answer>" in observation.messages[0].text and "\\boxed{}" in observation.messages[0].text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge": "openia"}, "Did you mean"),
        ({"judge_args": {"model": "x"}}, "no judge is set"),
        ({"judge": "rule", "rewards": ["format"], "correctness_reward": "format"}, "accuracy"),
        ({"judge": "rule", "judge_args": "text"}, "mapping"),
        ({"judge": "rule", "judge_max_failed": 2.0}, "share"),
        ({"judge": "openai", "judge_args": {"api_key": "sk-secret-secret"}}, "OPENAI_API_KEY"),
    ],
)
def test_judge_settings_are_checked_at_start(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        VTGRPOConfig(str(tmp_path), use_cpu=True, per_device_train_batch_size=8, **settings)
    assert "sk-secret" not in str(error.value)
