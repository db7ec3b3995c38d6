"""Progress: a line per log without a terminal, a bar with the phase on one, and silence when it is switched off."""

from __future__ import annotations

import io
from types import SimpleNamespace

from rich.console import Console
from test_trainer import make_trainer
from transformers import PrinterCallback, ProgressCallback

from vt_trl.progress import RunProgress

LOGS = {"reward": 1.25, "request_rate": 0.5, "accuracy": 0.75, "loss": 0.1, "time/rollout_seconds": 8.04,
        "time/score_seconds": 0.5, "time/update_seconds": 3.0}  # fmt: skip


def told(terminal: bool, main: bool = True) -> str:
    """What is printed of 3 steps of 100, at 12 s each, an evaluation, and an end."""
    out = io.StringIO()
    now = iter(range(0, 1000, 12))
    console = Console(file=out, force_terminal=terminal, width=160, highlight=False, soft_wrap=True)
    progress = RunProgress(console, clock=lambda: next(now))
    state = SimpleNamespace(global_step=10, max_steps=100, is_world_process_zero=main)
    progress.on_train_begin(None, state, None)
    for _ in range(3):
        progress.enter("rollout")
        state.global_step += 1
        progress.on_step_end(None, state, None)
        progress.on_log(None, state, None, logs=LOGS)
    progress.on_prediction_step(None, state, None)
    progress.on_log(None, state, None, logs={"eval_reward": 0.5, "eval_accuracy": 1.0})
    progress.on_log(None, state, None, logs={"train_runtime": 36.0})
    progress.on_train_end(None, state, None)
    return out.getvalue()


def test_without_a_terminal_a_log_is_one_plain_line():
    """87 steps are left after step 13, at 12 s: 17 min 24 s."""
    lines = told(terminal=False).splitlines()
    assert lines[0] == "training from step 10 to 100" and len(lines) == 5
    assert lines[3] == (
        "step 13/100 | 12.0 s/step, 0:17:24 left | reward 1.250, request_rate 0.500, accuracy 0.750 | "
        "rollout 8.0 s, score 0.5 s, update 3.0 s"
    )
    assert lines[4] == "evaluation at step 13/100 | reward 0.500, accuracy 1.000"


def test_a_terminal_gets_a_bar_with_the_phase():
    text = told(terminal=True)
    assert "\x1b[?25l" in text and text.rstrip().endswith("\x1b[?25h")  # the cursor is hidden, and shown again
    assert "evaluate" in text and "13/100" in text and "12.0 s/step, 0:17:24 left" in text


def test_other_processes_say_nothing():
    assert told(terminal=False, main=False) == told(terminal=True, main=False) == ""


def test_a_log_outside_of_training_has_no_pace():
    out = io.StringIO()
    state = SimpleNamespace(global_step=0, max_steps=0, is_world_process_zero=True)
    RunProgress(Console(file=out, highlight=False, soft_wrap=True)).on_log(None, state, None, logs={"reward": 0.5})
    assert out.getvalue() == "step 0/0 | reward 0.500\n"


def test_it_stands_where_transformers_bar_stood_and_can_be_switched_off(checkpoint, tmp_path, capsys):
    trainer = make_trainer(checkpoint, tmp_path, disable_tqdm=False)
    kinds = {type(callback) for callback in trainer.callback_handler.callbacks}
    assert RunProgress in kinds and not {ProgressCallback, PrinterCallback} & kinds
    seen: list[str] = []
    trainer.progress.enter = seen.append
    trainer.train()
    assert seen == ["rollout", "update", "logprob", "update", "score", "update"]
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert line.startswith("step 1/1 | ") and "request_rate" in line and "rollout" in line
    quiet = make_trainer(checkpoint, tmp_path, disable_tqdm=True)
    assert RunProgress not in {type(callback) for callback in quiet.callback_handler.callbacks}
