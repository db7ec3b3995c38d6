"""VTGRPOTrainer on tiny checkpoints: alignment, what is trained, evaluation, dropped groups."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILY_NAMES, make_rows
from datasets import Dataset
from helpers import CALL, SHORT_PROMPTS, AsksFirst, Script, answer
from peft import LoraConfig
from transformers import AutoConfig, AutoProcessor

from vt_trl.config import VTGRPOConfig
from vt_trl.families import family_of
from vt_trl.generation.base import SamplingSettings, ScriptedBackend
from vt_trl.passes import completion_logprobs
from vt_trl.recipe import RunArguments
from vt_trl.rollout import Limits
from vt_trl.run import freeze_vision, lora_config
from vt_trl.trainer import VTGRPOTrainer

ENVIRONMENT = {"min_pixels": 3136, "prompts": SHORT_PROMPTS}


def dataset(count: int) -> Dataset:
    return Dataset.from_list(make_rows(count))


def make_trainer(checkpoint: Path, tmp_path: Path, rows: int = 8, **settings: Any) -> VTGRPOTrainer:
    arguments = {name: settings.pop(name, None) for name in ("backend", "environment", "peft_config")}
    functions = settings.pop("reward_funcs", None)
    if "environment_name" in settings:
        settings["environment"] = settings.pop("environment_name")
    defaults = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_steps": 1,
        "max_turn_tokens": 8,
        "max_completion_length": 128,
        "learning_rate": 1e-2,
        "environment_args": ENVIRONMENT,
        "mask_truncated_completions": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    args = VTGRPOConfig(str(tmp_path), **defaults | settings)
    data = dataset(rows)
    return VTGRPOTrainer(str(checkpoint), args, data, data, reward_funcs=functions, **arguments)


def scripted(checkpoint: Path, choose: Any, **kwargs: Any) -> ScriptedBackend:
    return ScriptedBackend(Script(AutoProcessor.from_pretrained(checkpoint).tokenizer, choose, **kwargs))


def asks_first() -> AsksFirst:
    return AsksFirst(**ENVIRONMENT)


def random_score(completions: list, **columns: Any) -> list[float]:
    """Any difference between members gives a gradient; the first member is the one to reinforce."""
    return [float(index % 4 == 0) for index in range(len(completions))]


def inputs_of(trainer: VTGRPOTrainer, groups: int) -> list[dict]:
    rows = [trainer.train_dataset[index] for index in range(groups)]
    return [row for row in rows for _ in range(trainer.num_generations)]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_rollout_and_trainer_agree_with_tool_images(checkpoints, tmp_path, family):
    """Worst difference seen: 2e-6. Also after a large step that moved the vision tower."""
    trainer = make_trainer(checkpoints[family], tmp_path, environment=asks_first, reward_funcs=[random_score] * 2)
    tower = trainer.model.get_submodule(trainer.family.vision_module)
    for attempt in range(2):
        trainer.model.train()
        batch = trainer._generate_and_score_completions(inputs_of(trainer, 2))
        assert [len(images) for images in batch["image_index"]] == [2] * 8
        assert batch["prompt_images"] == [1] * 8  # the second picture lies inside the completion
        with torch.no_grad():
            trained = completion_logprobs(trainer, trainer.model, batch, chunk=3)
        gap = ((trained - batch["sampling_per_token_logps"]).abs() * batch["tool_mask"]).max()
        assert gap < 1e-5, f"attempt {attempt}"
        if attempt == 0:
            before = copy.deepcopy(tower.state_dict())
            trainer.train()
            moved = max((before[name] - value).abs().max() for name, value in tower.state_dict().items())
            assert moved > 1e-3
            now = completion_logprobs(trainer, trainer.model, batch, chunk=8)
            # The same tokens are worth something else now, so agreement in the second attempt is no accident.
            assert ((now - trained).abs() * batch["tool_mask"]).max() > 1e-3


def test_masks_of_a_batch(checkpoint, tmp_path):
    """[prompt | call | tool text and image | answer]: loss on call and answer only, attention on everything."""
    choose = lambda member, turn: CALL if turn == 0 and member % 2 else answer(str(member))  # noqa: E731
    backend = scripted(checkpoint, choose)
    trainer = make_trainer(checkpoint, tmp_path, backend=backend, max_turn_tokens=None, max_completion_length=400)
    trainer.model.train()
    batch = trainer._generate_and_score_completions(inputs_of(trainer, 1))
    tokenizer = trainer.processing_class.tokenizer
    for member in range(4):
        replies = [CALL, answer(str(member))] if member % 2 else [answer(str(member))]
        ids = batch["completion_ids"][member][batch["completion_mask"][member].bool()].tolist()
        mask = batch["tool_mask"][member][batch["completion_mask"][member].bool()].tolist()
        trained = tokenizer.decode([token for token, keep in zip(ids, mask, strict=True) if keep])
        assert trained == "".join(reply + "<|im_end|>" for reply in replies)
        told = [token for token, keep in zip(ids, mask, strict=True) if not keep]
        assert told.count(trainer.image_token_id) == (16 if member % 2 else 0)  # 112 x 112 at 28 px per token
    assert int(batch["num_items_in_batch"]) == int(batch["tool_mask"].sum())
    assert batch["prompt_mask"].sum() == (batch["prompt_ids"] != tokenizer.pad_token_id).sum()


def changed(trainer: VTGRPOTrainer) -> dict[str, bool]:
    """Which parameters a training step moved, by name."""
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    return {name: not torch.equal(before[name], value) for name, value in trainer.model.named_parameters()}


WAYS = {"full": {}, "frozen_vision": {}, "lora_language": {"lora": "language"}, "lora_all": {"lora": "all"}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_is_trained(checkpoints, tmp_path, family, way):
    run = RunArguments(model="m", dataset="d", lora_r=4, lora_alpha=8, **WAYS[way])
    settings = {"environment": asks_first, "reward_funcs": [random_score] * 2, "beta": 0.01, "max_steps": 2}
    described = family_of(AutoConfig.from_pretrained(checkpoints[family]))
    trainer = make_trainer(checkpoints[family], tmp_path, peft_config=lora_config(run, described), **settings)
    if way == "frozen_vision":
        freeze_vision(trainer.model, trainer.family)
    moved = changed(trainer)
    vision = {name: was for name, was in moved.items() if ".visual." in name or name.startswith("visual.")}
    language = {name: was for name, was in moved.items() if name not in vision}
    adapters = {name: was for name, was in moved.items() if "lora_" in name}
    assert vision and language
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    if way == "full":
        assert all(vision.values()) and all(language.values())
    elif way == "frozen_vision":
        assert not any(vision.values()) and all(language.values())
    else:
        assert not any(was for name, was in moved.items() if name not in adapters)
        assert all(was for name, was in adapters.items() if "lora_B" in name)
        assert any(".visual." in name for name in adapters) == (way == "lora_all")


def test_greedy_evaluation_is_greedy_in_every_turn_and_sees_the_last_rows(checkpoint, tmp_path):
    """10 rows in batches of 4: the last batch has 2. Two evaluations agree; a sampled one would not."""
    trainer = make_trainer(
        checkpoint, tmp_path, rows=10, environment=asks_first, per_device_eval_batch_size=4, max_turn_tokens=6
    )
    seen: list[tuple] = []
    run = trainer.runner.run

    def watched(rows: list, group_size: int, settings: SamplingSettings, on_finished) -> list:
        assert settings.greedy and group_size == 1
        rollouts = run(rows, group_size, settings, on_finished)
        seen.extend((r.row["id"], tuple(turn.token_ids for turn in r.turns)) for r in rollouts)
        return rollouts

    trainer.runner.run = watched
    metrics = trainer.evaluate()
    first, seen[:] = sorted(seen), []
    trainer.evaluate()
    assert [name for name, _ in first] == sorted(f"row-{index}" for index in range(10))
    assert first == sorted(seen)
    assert all(len(turns) == 2 for _, turns in first)
    assert "eval_accuracy" in metrics and "eval_request_rate" in metrics


def test_evaluation_means_are_over_rows_not_batches(checkpoint, tmp_path):
    """5 rows in batches of 4: rows 0-3 right, row 4 wrong. The mean is 0.8; a mean of batch means would be 0.5."""
    trainer = make_trainer(checkpoint, tmp_path, rows=5, per_device_eval_batch_size=4)
    tokenizer = trainer.processing_class.tokenizer

    def script(request):
        text = tokenizer.decode(request.token_ids)
        number = next(n for n in range(5) if f"number is {n}?" in text)
        return Script(tokenizer, lambda member, turn: answer("4 is wrong" if number == 4 else str(number)))(request)

    trainer.runner.backend = ScriptedBackend(script)
    trainer.runner.limits = Limits(100, 200)
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(0.8)


def test_a_group_that_could_not_be_judged_is_dropped_and_counted(checkpoint, tmp_path):
    """Group 0 has one None: no loss tokens, advantages 0, counted. Group 1 goes on as if alone."""
    scores = [1.0, None, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]

    def judge(completions: list, **columns: Any) -> list[float | None]:
        return scores

    def form(completions: list, **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    trainer = make_trainer(checkpoint, tmp_path, reward_funcs=[judge, form], penalty="none", logging_steps=1)
    trainer.model.train()
    batch = trainer._generate_and_score_completions(inputs_of(trainer, 2))
    assert batch["advantages"][:4].tolist() == [0.0] * 4
    assert batch["tool_mask"][:4].sum() == 0 and batch["completion_mask"][:4].sum() > 0
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4)
    torch.testing.assert_close(batch["advantages"][4:], expected)
    assert int(batch["num_items_in_batch"]) == int(batch["tool_mask"][4:].sum()) > 0
    logs: dict[str, float] = {}
    trainer.log(logs)
    assert logs["groups/dropped_unjudged"] == 0.5 and logs["unjudged"] == 1 / 8


def test_truncated_episodes_keep_attention_and_lose_loss(checkpoint, tmp_path):
    trainer = make_trainer(checkpoint, tmp_path, mask_truncated_completions=True, max_turn_tokens=3)
    trainer.model.train()
    batch = trainer._generate_and_score_completions(inputs_of(trainer, 1))
    statuses = [rollout.status.value for rollout in trainer.last_rollouts]
    assert "truncated" in statuses
    for status, loss, attention in zip(statuses, batch["tool_mask"], batch["completion_mask"], strict=True):
        assert attention.sum() > 0
        assert (loss.sum() == 0) == (status == "truncated")


def test_advantages_include_the_penalty(checkpoint, tmp_path):
    """Members 0, 1 answer directly and are right, 2 asks and is right, 3 asks and is wrong: r = 2/3 >= 0.2.

    Equation 5 takes 0.1 from both who asked: rewards 1.5, 1.5, 1.4, 0.4 (all well-formed).
    """
    gold = make_rows(1)[0]["answer"][0]

    def choose(member: int, turn: int) -> str:
        if member >= 2 and turn == 0:
            return CALL
        return answer("wrong" if member == 3 else gold)

    trainer = make_trainer(
        checkpoint, tmp_path, backend=scripted(checkpoint, choose), max_turn_tokens=None, max_completion_length=400
    )
    trainer.model.train()
    batch = trainer._generate_and_score_completions(inputs_of(trainer, 1))
    rewards = torch.tensor([1.5, 1.5, 1.4, 0.4])
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    torch.testing.assert_close(batch["advantages"].cpu(), expected)
    record = trainer.recorder.last_records[2]
    assert (record.asked, record.correct, record.well_formed) == (True, True, True)
    assert record.penalty == pytest.approx(0.1) and record.reward == pytest.approx(1.4)


def test_a_lora_config_can_be_given_directly(checkpoint, tmp_path):
    config = LoraConfig(r=2, target_modules="all-linear")
    trainer = make_trainer(checkpoint, tmp_path, environment=asks_first, peft_config=config, beta=0.1)
    trainer.train()
    assert any("kl" in log for log in trainer.state.log_history)
