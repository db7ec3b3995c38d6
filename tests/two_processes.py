"""Started by test_distributed.py under ``accelerate launch``: runs three jobs, every rank writes what it saw.

python tests/two_processes.py CHECKPOINT OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from helpers import CALL, SHORT_PROMPTS, AsksFirst, answer
from transformers import AutoTokenizer

from vt_trl.config import VTGRPOConfig
from vt_trl.generation.base import Request, Sample, ScriptedBackend
from vt_trl.trainer import VTGRPOTrainer

GROUP = 4
ENVIRONMENT = {"min_pixels": 3136, "prompts": SHORT_PROMPTS}
RIGHT, WRONG, ASK_RIGHT, ASK_WRONG = "right", "wrong", "ask and right", "ask and wrong"

# What the members of a row's group do: rows differ in the share of direct answers, so penalties differ (Equation 5).
PLANS = [
    [RIGHT, RIGHT, ASK_RIGHT, ASK_WRONG],  # r = 2/3: those who asked pay
    [ASK_RIGHT, ASK_RIGHT, WRONG, WRONG],  # r = 0: those who did not ask pay
    [RIGHT, WRONG, WRONG, WRONG],  # r = 1: nobody asked, nobody pays
    [ASK_WRONG, ASK_WRONG, ASK_WRONG, WRONG],  # nothing right: r counts as 0, the direct answer pays
]
# Odd rows teach nothing: all members are wrong, and pay the same penalty.
HALF_FLAT = [PLANS[0], [WRONG] * 4]


class ByRowAndMember:
    """Replies that depend on the row and on the place in its group alone, wherever and whenever they are sampled."""

    def __init__(self, checkpoint: str, group: int, plans: list[list[str]] = PLANS):
        self.tokenizer, self.group, self.plans = AutoTokenizer.from_pretrained(checkpoint), group, plans

    def __call__(self, request: Request) -> Sample:
        text = self.tokenizer.decode(request.token_ids)
        row = int(text.split("Which number is ")[1].split("?")[0])
        plan = self.plans[row % len(self.plans)][request.request_id % self.group]
        asks = plan.startswith("ask") and len(request.images) == 1
        reply = CALL if asks else answer(str(row) if plan.endswith("right") else "nothing")
        ids = self.tokenizer(reply, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = (*ids, self.tokenizer.eos_token_id)
        return Sample(request.request_id, ids, (None,) * len(ids), finished=True)


def numbered_rows(count: int) -> Dataset:
    from conftest import make_rows

    return Dataset.from_list(make_rows(count))


def make_trainer(job: str, checkpoint: str, out: Path, per_device: int) -> VTGRPOTrainer:
    trains = job == "train"
    args = VTGRPOConfig(
        str(out),
        per_device_train_batch_size=GROUP if job == "evaluate" else per_device,
        per_device_eval_batch_size=per_device,
        num_generations=GROUP,
        max_steps=2,
        max_turn_tokens=6 if trains else None,
        max_completion_length=400,
        environment_args=ENVIRONMENT,
        mask_truncated_completions=False,
        gradient_checkpointing=False,
        learning_rate=1e-2,
        beta=0.01,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        log_completions=trains,
        dynamic_sampling="refill" if job == "refill" else "off",
        dynamic_sampling_rounds=8,
    )
    rows = numbered_rows(7 if job == "evaluate" else 8)
    options = {"environment": lambda: AsksFirst(**ENVIRONMENT), "reward_funcs": [by_token, by_token]}
    if not trains:
        group = 1 if job == "evaluate" else GROUP
        plans = HALF_FLAT if job == "refill" else PLANS
        options = {"backend": ScriptedBackend(ByRowAndMember(checkpoint, group, plans))}
    return VTGRPOTrainer(checkpoint, args, rows, rows, **options)


def by_token(completion_ids: list[list[int]], **columns) -> list[float]:
    """A score that random samples differ in, on every rank."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def alternating(completion_ids: list[list[int]], **columns) -> list[float]:
    """0, 1, 0, 1, ...: the members of every group differ, whatever was sampled."""
    return [float(index % 2) for index in range(len(completion_ids))]


def score(trainer: VTGRPOTrainer) -> dict:
    """One generation batch, as the data loader of this rank gives it: rewards and advantages by row and member."""
    trainer.model.train()
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    records = trainer.recorder.last_records
    assert torch.allclose(batch["advantages"], torch.tensor([record.advantage for record in records]))
    seen = [
        {"row": record.id, "group": record.group, "reward": record.reward, "penalty": record.penalty,
         "advantage": record.advantage, "asked": record.asked, "correct": record.correct}
        for record in records
    ]  # fmt: skip
    logs: dict = {}
    trainer.log(logs)
    return {"records": seen, "items": int(batch["num_items_in_batch"]), "loss_tokens": int(batch["tool_mask"].sum()),
            "logs": logs}  # fmt: skip


def evaluate(trainer: VTGRPOTrainer) -> dict:
    rows: list[str] = []
    run = trainer.runner.run

    def watched(*args, **kwargs):
        rollouts = run(*args, **kwargs)
        rows.extend(rollout.row["id"] for rollout in rollouts)
        return rollouts

    trainer.runner.run = watched
    return {"rows": rows, "metrics": trainer.evaluate()}


def train(trainer: VTGRPOTrainer) -> dict:
    before = fingerprint(trainer)
    trainer.train()
    assert fingerprint(trainer) != before
    drawn = [list(turn.token_ids) for rollout in trainer.last_rollouts for turn in rollout.turns]
    return {"parameters": fingerprint(trainer), "log": trainer.state.log_history, "drawn": drawn}


def refill(trainer: VTGRPOTrainer) -> dict:
    """Both ranks go on until each has its groups, then train on them."""
    trainer.train()
    kept = [rollout.row["id"] for rollout in trainer.last_rollouts]
    return {"log": trainer.state.log_history, "rows": kept, "parameters": fingerprint(trainer)}


def fingerprint(trainer: VTGRPOTrainer) -> dict[str, str]:
    """Every parameter's exact sum, as hex, so that equality is of bits."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    return {name: value.detach().double().sum().item().hex() for name, value in policy.named_parameters()}


JOBS = {"score": score, "evaluate": evaluate, "train": train, "refill": refill}

PER_DEVICE = {"score": 16, "evaluate": 2, "train": 4, "refill": 8}


def main(checkpoint: str, out: str) -> None:
    torch.set_num_threads(1)
    for job, run in JOBS.items():
        set_seed(0)
        trainer = make_trainer(job, checkpoint, Path(out), PER_DEVICE[job])
        seen = run(trainer)
        (Path(out) / f"{job}-{trainer.accelerator.process_index}.json").write_text(json.dumps(seen))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
