"""Started by test_scale_out.py, alone and under ``accelerate launch``: every rank writes what it saw.

python tests/scale_out.py JOB CHECKPOINT OUT
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, set_seed
from helpers import AsksFirst
from torch.distributed.tensor import DTensor
from two_processes import ENVIRONMENT, GROUP, ByRowAndMember, by_token, numbered_rows

from benchmarks.rollout_parts import RoundByRound
from vt_trl.config import VTGRPOConfig
from vt_trl.generation.base import Request, SamplingSettings, ScriptedBackend
from vt_trl.trainer import VTGRPOTrainer
from vt_trl.types import Done, Observation, RolloutStatus

STEPS = 4
SAMPLES = 32  # per update, over all processes: 8 rows x 4 members


def asked_for(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}") == "true"


def allow_sharding_on_cpu() -> None:
    """Let accelerate's FSDP and DeepSpeed code run on CPUs: it asks for a GPU where it decides, and nowhere after."""
    original = AcceleratorState.__init__

    def on_cpu(self: AcceleratorState, *args, **kwargs) -> None:
        if not AcceleratorState._shared_state:
            PartialState(cpu=True)
            kind = DistributedType.DEEPSPEED if asked_for("DEEPSPEED") else DistributedType.MULTI_GPU
            PartialState._shared_state["distributed_type"] = kind
        kwargs.pop("cpu", None)
        original(self, *args, **kwargs)

    AcceleratorState.__init__ = on_cpu


class FirstHalfAsks(AsksFirst):
    """Episodes of rows 0 to 3 have a second turn, whichever process plays them; the others end after the first."""

    def reset(self, row: Mapping[str, Any]) -> Observation:
        self.asks = int(row["id"].removeprefix("row-")) < 4
        return super().reset(row)

    def step(self, reply: str, truncated: bool = False) -> Observation | Done:
        return super().step(reply) if self.asks else Done(RolloutStatus.ANSWERED, answer=reply)


def make_trainer(checkpoint: str, out: Path, scripted: bool, **settings) -> VTGRPOTrainer:
    """Rollouts that do not depend on the number of processes, or real sampling with uneven numbers of rounds."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = VTGRPOConfig(
        str(out),
        **{
            "per_device_train_batch_size": SAMPLES // processes,
            "num_generations": GROUP,
            "max_steps": STEPS,
            "max_completion_length": 400,
            "max_turn_tokens": 400 if scripted else 5,
            "shuffle_dataset": scripted,  # else rows 0 to 3, which ask, are the first process's
            "environment_args": ENVIRONMENT,
            "mask_truncated_completions": False,
            "gradient_checkpointing": False,
            "learning_rate": 0.1,
            "optim": "sgd",
            "beta": 0.01,
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            **settings,
        },
    )
    if scripted:
        options = {"backend": ScriptedBackend(ByRowAndMember(checkpoint, GROUP))}
    else:
        options = {"reward_funcs": [by_token, by_token], "environment": lambda: FirstHalfAsks(**ENVIRONMENT)}
    return VTGRPOTrainer(checkpoint, args, numbered_rows(8), **options)


def whole_sums(trainer: VTGRPOTrainer) -> dict[str, float]:
    """The sum of squares of every parameter, gathered from its shards."""
    sums = {}
    for name, value in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        with trainer._dist.gather_params([value]):
            whole = value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()
            sums[name] = whole.double().square().sum().item()
    return sums


def losses(checkpoint: str, out: Path, **changes) -> dict:
    """STEPS updates on scripted rollouts: whole batches, and two micro-batches of them whose forward is split further.

    How often it is split depends on the lengths a process has, and those that share weights must agree on a number.
    """
    seen = {}
    for name, pieces in (("whole", 1), ("accumulated", 2)):
        batch = SAMPLES // int(os.environ.get("WORLD_SIZE", "1")) // pieces
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": pieces, **changes}
        settings["max_packed_tokens"] = None if pieces == 1 else 300
        trainer = make_trainer(checkpoint, out / name, scripted=True, **settings)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        seen[name] = {
            "log": [{key: entry[key] for key in ("loss", "grad_norm", "kl", "entropy", "reward")} for entry in log],
            "sums": whole_sums(trainer),
            "kind": trainer.accelerator.distributed_type.name,
            "sharded": any(
                isinstance(value, DTensor) or hasattr(value, "ds_shape") for value in trainer.model.parameters()
            ),
        }
    return seen


def adam(checkpoint: str, out: Path) -> dict:
    """``losses`` with AdamW, which is what DeepSpeed shards."""
    return losses(checkpoint, out, optim="adamw_torch", learning_rate=1e-3)


def uneven(checkpoint: str, out: Path) -> dict:
    """Sampling from the policy itself, where one process needs more rounds than the other."""
    trainer = make_trainer(checkpoint, out / "uneven", scripted=False, max_steps=2)
    trainer.train()
    turns = [len(rollout.turns) for rollout in trainer.last_rollouts]
    gap = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"turns": turns, "losses": gap, "sums": whole_sums(trainer)}


def resumed(checkpoint: str, out: Path) -> dict:
    """STEPS updates at once, and the same cut in the middle of a generation and resumed."""
    settings = {"steps_per_generation": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    settings |= {
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "per_device_train_batch_size": SAMPLES // 2 // int(os.environ.get("WORLD_SIZE", "1")),
    }
    logs = {}
    for name, steps in (("at once", [STEPS]), ("in two", [STEPS - 1, STEPS])):
        for last in steps:
            set_seed(0)
            trainer = make_trainer(
                checkpoint, out / name, True, lr_scheduler_type="constant", max_steps=last, **settings
            )
            trainer.train(resume_from_checkpoint=last != steps[0])
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        logs[name] = {"losses": [entry["loss"] for entry in log], "sums": whole_sums(trainer)}
    return logs


def tensor_parallel(checkpoint: str, out: Path) -> dict:
    """One vLLM engine over both processes; the first's rows ask, so its episodes are longer than the other's."""
    engine = {"use_vllm": True, "vllm_tensor_parallel_size": 2, "vllm_max_model_length": 1024}
    trainer = make_trainer(
        checkpoint, out / "tp", scripted=False, max_steps=2, vllm_gpu_memory_utilization=0.1, **engine
    )
    trainer.train()
    gaps = [entry["sampling/logp_difference_max"] for entry in trainer.state.log_history if "loss" in entry]
    rollouts = trainer.last_rollouts
    return {
        "gaps": gaps,
        "rows": [rollout.row["id"] for rollout in rollouts],
        "turns": [len(rollout.turns) for rollout in rollouts],
        "drawn": [list(rollout.turns[0].token_ids) for rollout in rollouts],
        "sums": whole_sums(trainer),
        "free": greedy_of_uneven_turns(trainer, Uneven(trainer.runner.backend)),
        "rounds": greedy_of_uneven_turns(trainer, Uneven(RoundByRound(trainer.runner.backend))),
    }


class Uneven:
    """A backend whose turns have 2, 9, 16 or 23 tokens, by the number of their rollout."""

    def __init__(self, backend: Any):
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def submit(self, request: Request) -> None:
        self.backend.submit(replace(request, max_new_tokens=2 + 7 * (request.request_id % 4)))


def greedy_of_uneven_turns(trainer: VTGRPOTrainer, backend: Any) -> list[list[list[int]]]:
    """Tokens of each turn of this process's rows, two rollouts each."""
    runner = copy(trainer.runner)
    runner.backend = backend
    rows = list({rollout.row["id"]: rollout.row for rollout in trainer.last_rollouts}.values())
    rollouts = runner.run(rows, 2, SamplingSettings(temperature=0.0))
    return [[list(turn.token_ids) for turn in rollout.turns] for rollout in rollouts]


JOBS = {"tensor_parallel": tensor_parallel, "losses": losses, "adam": adam, "uneven": uneven, "resumed": resumed}


def main(job: str, checkpoint: str, out: str) -> None:
    torch.set_num_threads(1)
    set_seed(0)
    if asked_for("FSDP") or asked_for("DEEPSPEED"):
        allow_sharding_on_cpu()
    for name in job.split(","):
        seen = JOBS[name](checkpoint, Path(out))
        (Path(out) / f"{name}-{PartialState().process_index}.json").write_text(json.dumps(seen))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
