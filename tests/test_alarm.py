"""The collapse alarm: when it speaks, what it does, and that a resumed run remembers."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import pytest
from test_resume import make_trainer
from transformers import TrainerControl

from vt_trl.alarm import CollapseAlarm, check_bands
from vt_trl.config import VTGRPOConfig
from vt_trl.errors import ConfigError


def make_alarm(
    action: str = "warn", bands: dict | None = None, patience: int = 3, has_tool: bool = True
) -> CollapseAlarm:
    args = SimpleNamespace(
        alarm_action=action, alarm_bands=bands, alarm_patience=patience, alarm_theta_step=0.05, penalty_theta=0.2
    )
    return CollapseAlarm(SimpleNamespace(args=args), args, has_tool)


def feed(alarm: CollapseAlarm, name: str, *values: float) -> TrainerControl:
    control = TrainerControl()
    for value in values:
        alarm.on_log(None, None, control, logs={name: value, "loss": 0.0})
    return control


def test_it_speaks_after_so_many_logs_in_a_row_and_again(caplog):
    alarm = make_alarm()
    feed(alarm, "request_rate", 0.0, 0.01, 0.5, 0.0, 0.0)
    assert not caplog.records
    feed(alarm, "request_rate", 0.0)
    assert "request_rate is 0, below 0.02 for 3 logs in a row" in caplog.text and "penalty_theta" in caplog.text
    feed(alarm, "request_rate", 0.0, 0.0, 0.0)
    assert len(caplog.records) == 2


def test_other_figures_and_open_sides(caplog):
    alarm = make_alarm(bands={"entropy": [None, 2.0], "accuracy": [0.1, None]})
    feed(alarm, "entropy", -5.0, -5.0, -5.0)
    feed(alarm, "accuracy", 1.0, 1.0, 1.0)
    feed(alarm, "request_rate", 0.0, 0.0, 0.0)  # not among the bands
    assert not caplog.records
    feed(alarm, "entropy", 3.0, 3.0, 3.0)
    assert "entropy is 3, above 2" in caplog.text


def test_it_can_stop_the_run_with_a_checkpoint(caplog):
    control = feed(make_alarm("stop"), "request_rate", 1.0, 1.0, 1.0)
    assert control.should_training_stop and control.should_save
    assert caplog.records[0].levelno == logging.ERROR


def test_it_can_move_theta_towards_the_band():
    alarm = make_alarm("theta")
    feed(alarm, "request_rate", 1.0, 1.0, 1.0)
    assert alarm.trainer.args.penalty_theta == 0.15  # smaller asks less
    feed(alarm, "request_rate", 0.5, 0.0, 0.0, 0.0)
    assert alarm.trainer.args.penalty_theta == 0.2
    for _ in range(10):
        feed(alarm, "request_rate", 1.0, 1.0, 1.0)
    assert alarm.trainer.args.penalty_theta == 0.0
    feed(alarm, "accuracy", 0.0, 0.0, 0.0)  # theta has nothing to do with it
    assert alarm.trainer.args.penalty_theta == 0.0


def test_off_and_without_a_tool_there_is_nothing_to_say(caplog):
    feed(make_alarm("off"), "request_rate", 1.0, 1.0, 1.0, 1.0)
    feed(make_alarm(has_tool=False), "request_rate", 0.0, 0.0, 0.0, 0.0)
    assert not caplog.records


def test_a_resumed_run_remembers():
    alarm = make_alarm("theta")
    feed(alarm, "request_rate", 1.0, 1.0, 1.0, 1.0)
    again = make_alarm("theta")
    again.restore(dataclasses.asdict(alarm.state))
    assert again.trainer.args.penalty_theta == 0.15
    feed(again, "request_rate", 1.0, 1.0)
    assert again.trainer.args.penalty_theta == 0.1


def test_in_a_run(checkpoint, tmp_path, caplog):
    settings = {"alarm_patience": 2, "alarm_action": "stop", "alarm_bands": {"accuracy": [2.0, None]}}
    trainer = make_trainer(checkpoint, tmp_path, max_steps=8, save_steps=100, **settings)
    trainer.train()
    assert trainer.state.global_step == 3  # accuracy is logged by the steps that generate: 1 and 3
    assert (tmp_path / "checkpoint-3" / "vt_trl_state.json").is_file()
    assert "accuracy is" in caplog.text


@pytest.mark.parametrize("band", [[0.5], [0.5, 0.1], [None, None], "x", [0.1, "y"], 3])
def test_bands_that_cannot_work(band):
    with pytest.raises(ConfigError, match="alarm_bands.request_rate"):
        check_bands({"request_rate": band})


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"alarm_action": "shout"}, "off or warn"), ({"alarm_patience": 0}, "1 or more")],
)
def test_settings_that_cannot_work(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        VTGRPOConfig(str(tmp_path), use_cpu=True, per_device_train_batch_size=8, **settings)
