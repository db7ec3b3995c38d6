"""What a trainer saves and restores so that a run that was killed goes on as if it had not been.

Transformers keeps weights, optimizer, schedule, random states and the place in the data. Missing is what lies between:
the rollouts that are still to be trained on when a checkpoint falls between two updates of one generation. A trainer
with this mixin saves them too, writes checkpoints whole or not at all, and ends in order on SIGTERM.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vt_trl.checkpoints import STAGING, checkpoints_in, clear_staging, not_saved, put_in_place, resume_path, rotate
from vt_trl.hub import HubTrainer

logger = logging.getLogger(__name__)

TERMINATED = 143  # exit status of a run that SIGTERM ended: 128 + 15
_BUFFER = "vt_trl_rollouts_{rank}.pt"
_STATE = "vt_trl_state.json"


class WholeCheckpoints:
    """Mixin for a trainer of transformers: checkpoints by :mod:`vt_trl.checkpoints`, and full weights loaded by name.

    ``_saving`` says that a checkpoint is being written in the staging folder.
    """

    _saving = False

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """TRL's, from the newest complete checkpoint when ``resume_from_checkpoint`` is true."""
        if self.accelerator.is_main_process:
            clear_staging(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        checkpoint = resume_path(self.args.output_dir, resume_from_checkpoint)
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if self._has_plain_weights(model):
            load_weights(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._has_plain_weights(self.model):
            load_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _has_plain_weights(self, model: nn.Module) -> bool:
        """Neither adapters nor shards, which have files and loaders of their own."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        return isinstance(model, PreTrainedModel) and not is_peft_model(model) and not sharded

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is written, its parent is the staging folder."""
        return os.path.join(self.args.output_dir, STAGING) if self._saving else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        staged = Path(self.args.output_dir) / STAGING / name
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            self._add_to_checkpoint(staged)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise not_saved(self.args.output_dir, error) from error
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._name_best(staged)
            put_in_place(self.args.output_dir, name)
            rotate(self.args.output_dir, self.args.save_total_limit, [self.state.best_model_checkpoint])
            if self.args.push_to_hub:
                self._push_from_checkpoint(os.path.join(self.args.output_dir, name))
        self.accelerator.wait_for_everyone()

    def _add_to_checkpoint(self, staged: Path) -> None:
        """What else a process has to keep, while the checkpoint is still in the staging folder."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """transformers calls this while the checkpoint is still being written."""
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _name_best(self, staged: Path) -> None:
        """Let the state name the best checkpoint where it will lie, not where it is being written."""
        if self.state.best_global_step:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir() or best.name == staged.name:
                self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(staged / "trainer_state.json"))


class ResumableTrainer(WholeCheckpoints, HubTrainer):
    """Mixin for a GRPO trainer: whole checkpoints, with the buffer of rollouts and the state of the alarm in them."""

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.note_keeper.best_loaded = True

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.push_to_hub and self.args.save_total_limit:
            self._finish_current_push()  # of a checkpoint that may be deleted now
        super()._save_checkpoint(model, trial)

    def _add_to_checkpoint(self, staged: Path) -> None:
        if not self.args.save_only_model:
            self._save_buffer(staged)
        if self.args.should_save:
            own = {"alarm": dataclasses.asdict(self.alarm.state)}
            (staged / _STATE).write_text(json.dumps(own) + "\n", encoding="utf-8")

    def _save_buffer(self, folder: Path) -> None:
        """The rollouts of this process that later updates still need; nothing when a generation is used up."""
        generation = self.args.steps_per_generation * self.num_iterations
        if self._buffered_inputs is None or self._step % generation == 0:
            return
        kept = {"step": self._step, "inputs": self._buffered_inputs}
        torch.save(kept, folder / _BUFFER.format(rank=self.accelerator.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.note_keeper.restore(checkpoint)
        own = Path(checkpoint) / _STATE
        if own.is_file():
            self.alarm.restore(json.loads(own.read_text(encoding="utf-8"))["alarm"])
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
        self._step = state["global_step"] * self.args.gradient_accumulation_steps
        path = Path(checkpoint) / _BUFFER.format(rank=self.accelerator.process_index)
        if path.is_file():
            device = self.accelerator.device
            device = "cpu" if device.type == "cpu" else device  # torch does not know cpu:0 here
            kept = torch.load(path, map_location=device, weights_only=True)
            self._step, self._buffered_inputs = kept["step"], kept["inputs"]
        elif self._step % (self.args.steps_per_generation * self.num_iterations):
            logger.warning(
                f"{checkpoint} lies between two updates of one generation and holds no rollouts for this process (it "
                f"was written by another number of processes): they are generated anew, so the run goes on, but not "
                f"to the bit."
            )
            self._buffered_inputs = None


def load_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Load a checkpoint's weights into ``model`` in place, every one of them.

    ``save_pretrained`` writes the published names of a vision-language model and ``from_pretrained`` translates them;
    the Trainer's own loading does not, finds no name it knows, warns, and goes on with the weights it had.
    """
    saved = type(model).from_pretrained(checkpoint, dtype=next(model.parameters()).dtype)
    model.load_state_dict(saved.state_dict())


class EndInOrder(TrainerCallback):
    """On SIGTERM (a batch system, a spot machine) finish the step, save, and stop training.

    All processes stop after the same step, whichever of them got the signal. A log is written with every checkpoint,
    so that averages never reach across one.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.asked = False
        self._before: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        try:
            self._before = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # signals can be caught in the main thread only
            logger.warning("Training runs outside the main thread: SIGTERM will end it without a checkpoint.")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        logger.warning("SIGTERM: the step is finished, a checkpoint is saved, and the run ends.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        accelerator = self.trainer.accelerator
        flag = torch.tensor([int(self.asked)], device=accelerator.device)
        self.asked = bool(accelerator.gather(flag).max())
        if self.asked:
            control.should_save = not checkpoint_exists(args.output_dir, state.global_step)
            control.should_training_stop = True
        if control.should_save:
            control.should_log = True
        return control

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def checkpoint_exists(output_dir: str | Path, step: int) -> bool:
    return any(path.name == f"checkpoint-{step}" for path in checkpoints_in(output_dir))
