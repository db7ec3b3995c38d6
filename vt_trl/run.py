"""From a recipe to a trained model: ``vt-trl train RECIPE``, ``accelerate launch -m vt_trl RECIPE``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, PretrainedConfig, TrainingArguments

from vt_trl.config import VTGRPOConfig
from vt_trl.data import load_rows, require_good_rows
from vt_trl.envs import make_environment
from vt_trl.errors import ConfigError
from vt_trl.families import Family, family_of
from vt_trl.preflight import check_run
from vt_trl.quantized import four_bits
from vt_trl.recipe import RunArguments, effective_settings, parse_recipe
from vt_trl.trainer import VTGRPOTrainer

logger = logging.getLogger(__name__)


def train(recipe: str | Path, overrides: Sequence[str] = (), **trainer_arguments: Any) -> VTGRPOTrainer:
    """Run a recipe to its end and save the model in its ``output_dir``; returns the trainer.

    ``trainer_arguments`` go to :class:`VTGRPOTrainer` (callbacks, an environment, reward functions).
    """
    run, args = parse_recipe(recipe, overrides)
    trainer = make_trainer(run, args, **trainer_arguments)
    trainer.note_keeper.describe(effective_settings(recipe, overrides, run, args), run)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.end_in_order.asked:
        return trainer  # there may be seconds left: the checkpoint is saved, and that is enough
    if args.eval_strategy != "no" or run.eval_dataset:
        trainer.evaluate()
    trainer.save_state()  # the figures of every step, for `vt-trl view`
    trainer.save_model(args.output_dir)  # and, with push_to_hub, push it
    return trainer


def make_trainer(run: RunArguments, args: VTGRPOConfig, **trainer_arguments: Any) -> VTGRPOTrainer:
    """Check the rows, load the model, and build the trainer of a recipe."""
    config = open_config(run, args)
    family = family_of(config)
    check_run(run, args, config)
    most = make_environment(args.environment, args.environment_args)().max_pictures
    forbidden = (family.turn_start, family.turn_end, *family.control_tokens)
    rows = load_rows(run.dataset, run.dataset_split, run.max_rows)
    eval_rows = load_rows(run.eval_dataset, run.eval_split, run.max_eval_rows) if run.eval_dataset else None
    checks = {"forbidden": forbidden, "most_pictures": most}
    trainer = VTGRPOTrainer(
        model=run.model,
        args=args,
        train_dataset=require_good_rows(rows, run.on_bad_row, **checks),
        eval_dataset=None if eval_rows is None else require_good_rows(eval_rows, run.on_bad_row, **checks),
        peft_config=lora_config(run, family),
        **trainer_arguments,
    )
    if not run.train_vision:
        freeze_vision(trainer.model, family)
    return trainer


def open_config(run: RunArguments, args: TrainingArguments) -> PretrainedConfig:
    """The configuration of a run's model, with how it is to be loaded noted in ``args``.

    Raises ConfigError for a model that is not there and for weights too coarse to train.
    """
    try:
        config = AutoConfig.from_pretrained(run.model, revision=run.model_revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model is {run.model!r}, which does not load: {error}") from error
    family = family_of(config)
    check_precision(run, args)
    args.model_init_kwargs = {
        "dtype": run.dtype,
        "attn_implementation": run.attn_implementation,
        **({"revision": run.model_revision} if run.model_revision else {}),
        **(args.model_init_kwargs or {}),
    }
    if run.quantize != "none":
        args.model_init_kwargs["quantization_config"] = four_bits(getattr(torch, run.dtype), family)
    return config


def check_precision(run: RunArguments, args: TrainingArguments) -> None:
    """Refuse to train 16-bit weights in place: an update of relative size 1e-6 is rounded away.

    Adapters keep their own fp32 weights, and DeepSpeed and FSDP keep an fp32 copy of the policy's.
    """
    sharded = args.deepspeed_plugin is not None or args.distributed_state.distributed_type == DistributedType.FSDP
    if run.quantize != "none" and sharded:
        raise ConfigError(
            f"quantize is {run.quantize}, and the launch divides weights between processes (ZeRO or FSDP): packed "
            f"4-bit weights are held whole. Launch with recipes/accelerate/ddp.yaml, or set quantize: none."
        )
    if run.lora == "none" and run.dtype != "float32" and not sharded:
        raise ConfigError(
            f"dtype is {run.dtype} and lora is none: the weights themselves would be trained in 16 bits, in which an "
            f"update of learning_rate {args.learning_rate} is rounded away. Set dtype: float32 (bf16: true still "
            f"computes in bf16), or train with DeepSpeed, FSDP, or an adapter."
        )


def lora_config(run: RunArguments, family: Family) -> LoraConfig | None:
    """The adapter of a run: on every linear layer, or on those outside the vision tower."""
    if run.lora == "none":
        return None
    tower = family.vision_module.rpartition(".")[2]
    return LoraConfig(
        r=run.lora_r,
        lora_alpha=run.lora_alpha,
        lora_dropout=0.0,  # old, new and sampled log-probabilities must come from the same function
        target_modules="all-linear",
        exclude_modules=rf".*\b{tower}\b.*" if run.lora == "language" else None,
    )


def freeze_vision(model: nn.Module, family: Family) -> None:
    """Stop gradients into the vision tower, merger included."""
    model.get_submodule(family.vision_module).requires_grad_(False)
