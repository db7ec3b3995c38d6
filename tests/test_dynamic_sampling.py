"""Dynamic sampling: which groups are replaced, by what, when it ends, and what the loss is divided by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_rows
from datasets import Dataset
from helpers import SHORT_PROMPTS, Script, answer

from vt_trl.config import VTGRPOConfig
from vt_trl.errors import ConfigError, SamplingShortfall
from vt_trl.generation.base import ScriptedBackend
from vt_trl.groups import Fate, Group
from vt_trl.trainer import VTGRPOTrainer

GROUP = 4
MIXED, FLAT, UNJUDGED = "mixed", "flat", "unjudged"


class ByRow:
    """Replies and scores that depend on the row's number alone: every third kind of row is a different fate."""

    def __init__(self, tokenizer: Any, fates: list[str]):
        self.tokenizer, self.fates, self.rows = tokenizer, fates, []

    def fate(self, number: int) -> str:
        return self.fates[number % len(self.fates)]

    def __call__(self, request):
        text = self.tokenizer.decode(request.token_ids)
        number = int(text.split("Which number is ")[1].split("?")[0])
        member = request.request_id % GROUP
        if member == 0:
            self.rows.append(number)
        right = self.fate(number) == FLAT or member % 2 == 0
        said = "?" if self.fate(number) == UNJUDGED and member == 1 else str(number) if right else "no"
        return Script(self.tokenizer, lambda *_: answer(said))(request)


def judged(completions: list, rollout: list, **columns: Any) -> list[float | None]:
    """1 for the gold answer; None for "?"."""
    return [None if one.answer == "?" else float(one.answer == one.row["answer"][0]) for one in rollout]


def form(completions: list, **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def make_trainer(checkpoint, out, fates: list[str], rows: int = 24, per_step: int = 2, **settings) -> VTGRPOTrainer:
    settings = {"max_turn_tokens": 64, "max_completion_length": 128} | settings
    args = VTGRPOConfig(
        str(out),
        environment="direct",
        environment_args={"prompts": {name: SHORT_PROMPTS[name] for name in ("system", "task")}, "min_pixels": 3136},
        penalty="none",
        num_generations=GROUP,
        per_device_train_batch_size=GROUP * per_step,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        **settings,
    )
    data = Dataset.from_list(make_rows(rows, size=(56, 56)))
    trainer = VTGRPOTrainer(str(checkpoint), args, data, reward_funcs=[judged, form])
    trainer.script = ByRow(trainer.processing_class.tokenizer, fates)
    trainer.runner.backend = ScriptedBackend(trainer.script)
    trainer.model.train()
    return trainer


def batch_of(trainer: VTGRPOTrainer, *numbers: int) -> tuple[dict[str, Any], dict[str, float]]:
    """One generation batch from rows with these numbers, and what was logged."""
    batch = trainer._generate_and_score_completions([trainer.train_dataset[n] for n in numbers for _ in range(GROUP)])
    logs: dict[str, float] = {}
    trainer.log(logs)
    return batch, logs


def test_fates():
    def group(*rewards: float) -> Group:
        reward = torch.tensor(rewards, dtype=torch.float32)
        return Group([None] * len(rewards), reward[:, None], reward, reward, reward)

    assert group(1, 0, 1).fate is Fate.GOOD
    assert group(1, 1, 1).fate is Fate.ZERO_STD
    assert group(1, float("nan"), 0).fate is Fate.UNJUDGED
    assert group(1).fate is Fate.GOOD  # evaluation: one rollout per row


def test_off_keeps_flat_groups_in_the_loss(checkpoint, tmp_path):
    trainer = make_trainer(checkpoint, tmp_path, [MIXED, FLAT, UNJUDGED], per_step=3)
    batch, logs = batch_of(trainer, 0, 1, 2)
    assert [bool(part.sum()) for part in batch["tool_mask"].split(GROUP)] == [True, True, False]
    assert batch["loss_scale"].tolist() == [1.5] * 12
    assert logs["groups/effective_share"] == pytest.approx(2 / 3)


def test_drop_takes_their_loss(checkpoint, tmp_path):
    trainer = make_trainer(checkpoint, tmp_path, [MIXED, FLAT, UNJUDGED], per_step=3, dynamic_sampling="drop")
    batch, logs = batch_of(trainer, 0, 1, 2)
    assert [bool(part.sum()) for part in batch["tool_mask"].split(GROUP)] == [True, False, False]
    assert batch["loss_scale"].tolist() == [3.0] * 12
    assert trainer.script.rows == [0, 1, 2]  # nothing was generated anew


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "sapo"])
def test_loss_and_gradient_are_those_of_the_good_groups_alone(checkpoint, tmp_path, loss_type):
    """A batch of one good, one flat and one unjudged group, against a batch of the good group only."""

    def gradient(*numbers: int) -> tuple[float, torch.Tensor]:
        settings = {"dynamic_sampling": "drop", "beta": 0.01, "loss_type": loss_type, "entropy_coef": 0.01}
        trainer = make_trainer(checkpoint, tmp_path, [MIXED, FLAT, UNJUDGED], per_step=len(numbers), **settings)
        batch, _ = batch_of(trainer, *numbers)
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return loss.item(), torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()])

    loss, whole = gradient(0, 1, 2)
    expected, alone = gradient(0)
    assert loss == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert (whole - alone).norm() / alone.norm() < 1e-4


def test_refill_replaces_groups_that_teach_nothing(checkpoint, tmp_path):
    trainer = make_trainer(checkpoint, tmp_path, [MIXED, FLAT, UNJUDGED, MIXED], dynamic_sampling="refill")
    batch, logs = batch_of(trainer, 1, 2)
    assert len(batch["advantages"]) == 2 * GROUP
    assert all(part.sum() > 0 for part in batch["tool_mask"].split(GROUP))
    assert all(part.abs().sum() > 0 for part in batch["advantages"].split(GROUP))
    assert batch["loss_scale"].tolist() == [1.0] * 8
    used = {int(rollout.row["answer"][0]) % 4 for rollout in trainer.last_rollouts}
    assert used <= {0, 3}
    assert logs["groups/rounds"] >= 2 and logs["groups/effective_share"] == 1
    assert logs["groups/generated"] == len(trainer.script.rows) >= 4
    assert logs["groups/rejected_zero_std"] >= 1 and logs["groups/rejected_unjudged"] >= 1
    assert len(trainer.recorder.last_records) == len(trainer.last_rollouts) == 8


def test_refill_draws_the_same_rows_again_after_a_resume(checkpoint, tmp_path):
    rows = []
    for _ in range(2):
        trainer = make_trainer(checkpoint, tmp_path, [MIXED, FLAT, FLAT], dynamic_sampling="refill")
        trainer.state.global_step = 7
        batch_of(trainer, 1, 2)
        rows.append(trainer.script.rows)
    assert rows[0] == rows[1]
    trainer.state.global_step = 8
    trainer.script.rows = []
    batch_of(trainer, 1, 2)
    assert trainer.script.rows != rows[0]


def test_a_full_batch_needs_no_second_round(checkpoint, tmp_path):
    trainer = make_trainer(checkpoint, tmp_path, [MIXED], dynamic_sampling="refill")
    _, logs = batch_of(trainer, 0, 1)
    assert logs["groups/rounds"] == 1 and trainer.script.rows == [0, 1]


def test_at_the_limit_the_step_goes_on_with_fewer_groups(checkpoint, tmp_path, caplog):
    settings = {"dynamic_sampling": "refill", "dynamic_sampling_rounds": 2}
    trainer = make_trainer(checkpoint, tmp_path, [FLAT], **settings)
    trainer.script.fates = [FLAT] * 24
    trainer.script.fates[5] = MIXED
    batch, logs = batch_of(trainer, 5, 1)
    assert [bool(part.sum()) for part in batch["tool_mask"].split(GROUP)] == [True, False]
    assert batch["loss_scale"].tolist() == [2.0] * 8
    assert logs["groups/rounds"] == 3 and logs["groups/effective_share"] == 0.5
    assert "1 of 2 groups" in caplog.text and "fewer" in caplog.text


def test_at_the_limit_the_run_can_stop(checkpoint, tmp_path):
    settings = {"dynamic_sampling": "refill", "dynamic_sampling_rounds": 1, "dynamic_sampling_shortfall": "stop"}
    trainer = make_trainer(checkpoint, tmp_path, [FLAT], **settings)
    with pytest.raises(SamplingShortfall, match="dynamic_sampling_rounds"):
        batch_of(trainer, 0, 1)


@pytest.mark.parametrize("surplus", ["keep", "drop"])
def test_surplus_waits_for_a_batch_of_the_same_weights(checkpoint, tmp_path, surplus):
    """Two processes would make it; here one group more than asked for is made by hand."""
    trainer = make_trainer(
        checkpoint, tmp_path, [MIXED, FLAT], dynamic_sampling="refill", dynamic_sampling_surplus=surplus
    )
    trainer.refiller._most = lambda lack: lack + 1 if lack > 0 else 0  # another process lacks one more
    trainer.script.fates = [MIXED] * 24
    trainer.script.fates[1] = FLAT
    batch_of(trainer, 0, 1)
    assert len(trainer.script.rows) == 4  # two, and in the second round two instead of the one that was missing
    spare = trainer.script.rows[-1]
    trainer.script.rows = []
    _, logs = batch_of(trainer, 2, 1)  # one is missing again, and it is there already
    if surplus == "keep":
        assert trainer.script.rows == [2, 1] and logs["groups/rounds"] == 1
        assert spare in {int(rollout.row["answer"][0]) for rollout in trainer.last_rollouts}
    else:
        assert len(trainer.script.rows) == 4


def test_surplus_of_old_weights_is_left_out_and_counted(checkpoint, tmp_path):
    trainer = make_trainer(checkpoint, tmp_path, [MIXED, FLAT], dynamic_sampling="refill")
    trainer.refiller._most = lambda lack: lack + 1 if lack > 0 else 0
    trainer.script.fates = [MIXED] * 24
    trainer.script.fates[1] = FLAT
    batch_of(trainer, 0, 1)
    trainer.state.global_step += 1
    trainer.script.rows = []
    _, logs = batch_of(trainer, 2, 3)
    assert logs["groups/surplus_stale"] == 1 and trainer.script.rows == [2, 3]


def test_evaluation_never_refills(checkpoint, tmp_path):
    trainer = make_trainer(checkpoint, tmp_path, [FLAT], dynamic_sampling="refill")
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    assert trainer.evaluate()["eval_accuracy"] == 1.0
    assert len(trainer.script.rows) <= 4


def test_training_with_refill(checkpoint, tmp_path):
    trainer = make_trainer(checkpoint, tmp_path, [MIXED, FLAT, UNJUDGED], dynamic_sampling="refill", max_steps=3)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 3 and all(log["groups/effective_share"] == 1 for log in logs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dynamic_sampling": "refil"}, "Did you mean 'refill'"),
        ({"dynamic_sampling_rounds": 0}, "1 or more"),
        ({"dynamic_sampling_surplus": "hoard"}, "keep or drop"),
        ({"dynamic_sampling_shortfall": "wait"}, "fewer or stop"),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        VTGRPOConfig(str(tmp_path), use_cpu=True, per_device_train_batch_size=8, **settings)


def test_off_may_be_written_as_yaml_reads_it(tmp_path):
    assert VTGRPOConfig(str(tmp_path), use_cpu=True, dynamic_sampling=False).dynamic_sampling == "off"
