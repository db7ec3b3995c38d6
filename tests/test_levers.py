"""What is computed once instead of many times does not change a training step: each setting off, all off, all on."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from helpers import CALL, answer
from test_trainer import inputs_of, make_trainer, scripted

import vt_trl.forward as forward
from vt_trl.forward.layout import lay_out
from vt_trl.speed import SpeedSettings

LEVERS = [name for name in vars(SpeedSettings) if name.startswith(("share", "loss", "balance", "skip"))]


def choose(member: int, turn: int) -> str:
    return CALL if turn == 0 and member % 3 == 1 else answer(str(member))


def spread(completions: list, **columns: Any) -> list[float]:
    """Unequal within a group, but for the second of two: that one has no advantage."""
    return [float(index % 4 == 1) if index < 4 else 1.0 for index in range(len(completions))]


def trained(checkpoint, tmp_path, **settings: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """All weights after one update on 8 scripted rollouts of two rows, and the step's log."""
    same = {
        "backend": scripted(checkpoint, choose),
        "reward_funcs": [spread, spread],
        "penalty": "none",
        "max_turn_tokens": None,
        "max_completion_length": 400,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "optim": "sgd",
        "max_grad_norm": 0.0,
    }
    trainer = make_trainer(checkpoint, tmp_path, **same | settings)
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), trainer.state.log_history[0]


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_a_step_is_the_same_with_any_of_them_off(checkpoint, tmp_path, loss):
    assert len(LEVERS) == 6
    base, log = trained(checkpoint, tmp_path, loss_type=loss)
    start, _ = trained(checkpoint, tmp_path, loss_type=loss, learning_rate=0.0)
    moved = (base - start).abs().max()
    assert moved > 1e-5 and log["forward/check_difference"] < 1e-5
    for off in [[name] for name in LEVERS] + [LEVERS]:
        other, log = trained(checkpoint, tmp_path, loss_type=loss, **dict.fromkeys(off, False))
        assert (other - base).abs().max() < 1e-4 * moved, off
        assert ("forward/check_difference" in log) == ("share_prefix" not in off)


def test_updates_are_the_same_in_small_pieces_and_with_a_kl_term(checkpoint, tmp_path):
    """Two updates on one generation: the second has ratios and a KL term that are not trivial."""
    settings = {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.05, "epsilon": 10.0}
    whole, _ = trained(checkpoint, tmp_path, beta=1.0, **settings)
    pieces, _ = trained(checkpoint, tmp_path, beta=1.0, max_packed_tokens=100, **settings)
    plain, _ = trained(checkpoint, tmp_path, beta=1.0, **settings, **dict.fromkeys(LEVERS, False))
    without, _ = trained(checkpoint, tmp_path, **settings)
    term = (without - whole).abs().max()
    assert term > 1e-5
    assert (pieces - whole).abs().max() < 1e-3 * term and (plain - whole).abs().max() < 1e-3 * term


def test_rows_without_advantage_are_not_computed(checkpoint, tmp_path, monkeypatch):
    computed: list[int] = []

    def count(batch, rows, *args):
        computed.append(len(rows))
        return lay_out(batch, rows, *args)

    monkeypatch.setattr("vt_trl.forward.passes.lay_out", count)
    trained(checkpoint, tmp_path)
    assert computed == [2, 4, 1] or computed == [2, 1, 4]  # the check; the group with a spread; one to log from
    computed.clear()
    trained(checkpoint, tmp_path, entropy_coef=0.01)
    assert computed == [2, 4, 4]


def test_a_forward_that_is_wrong_is_noticed_and_not_used(checkpoint, tmp_path, monkeypatch, caplog):
    right, _ = trained(checkpoint, tmp_path)

    def wrong(*args):
        row = lay_out(*args)
        row.ids = torch.where(row.ids < 100, row.ids + 1, row.ids)  # letters only
        return row

    monkeypatch.setattr("vt_trl.forward.passes.lay_out", wrong)
    with caplog.at_level(logging.WARNING):
        other, log = trained(checkpoint, tmp_path)
    assert log["forward/check_difference"] > 1e-4
    assert "Prompts are computed once per rollout" in caplog.text and "differ from the plain forward" in caplog.text
    assert (other - right).abs().max() < 1e-7


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_init_kwargs": {"attn_implementation": "eager"}}, "attn_implementation is eager"),
        ({"disable_dropout": False}, "attention_dropout is 0.1; set disable_dropout: true"),
    ],
)
def test_the_plain_forward_says_why(checkpoint, tmp_path, monkeypatch, caplog, change, reason):
    if "disable_dropout" in change:
        monkeypatch.setattr(forward, "why_not_packed", lambda trainer: _with_dropout(trainer, monkeypatch))
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(checkpoint, tmp_path, backend=scripted(checkpoint, choose), **change)
    said = [record.message for record in caplog.records if "once per rollout" in record.message]
    assert len(said) == 1 and reason in said[0]
    assert not trainer.forward.packed
    trainer.model.train()
    batch = trainer._generate_and_score_completions(inputs_of(trainer, 1))
    assert not trainer.forward.score(trainer.model, batch).logprobs.isnan().any()


def _with_dropout(trainer: Any, monkeypatch: Any) -> str | None:
    from vt_trl.forward.support import why_not_packed

    monkeypatch.setattr(trainer.model.config.get_text_config(), "attention_dropout", 0.1)
    return why_not_packed(trainer)
