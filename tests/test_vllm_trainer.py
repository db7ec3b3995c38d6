"""The trainer with vLLM in its process: what it samples is what it trains on, also after the weights have moved."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import SHORT_PROMPTS, AsksFirst
from peft import LoraConfig

from vt_trl.config import VTGRPOConfig
from vt_trl.passes import completion_logprobs

pytest.importorskip("vllm")
from conftest import make_rows  # noqa: E402

from vt_trl.trainer import VTGRPOTrainer  # noqa: E402

pytestmark = pytest.mark.vllm
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

# Pictures of 12 x 12 and 24 x 24 visual tokens: each fills a block of vLLM's prefix cache (128 tokens on a CPU).
ENVIRONMENT = {"min_pixels": 3136, "prompts": SHORT_PROMPTS}
SIZE = (448, 448)


def score(completion_ids: list[list[int]], **columns) -> list[float]:
    return [float(index % 4 == 0) for index in range(len(completion_ids))]


def make_trainer(checkpoint: Path, out: Path, peft_config: LoraConfig | None = None) -> VTGRPOTrainer:
    args = VTGRPOConfig(
        str(out),
        per_device_train_batch_size=8,
        num_generations=4,
        max_steps=1,
        max_turn_tokens=8,
        max_completion_length=512,
        learning_rate=1e-2,
        environment_args=ENVIRONMENT,
        mask_truncated_completions=False,
        gradient_checkpointing=False,
        use_vllm=True,
        vllm_max_model_length=1024,
        vllm_gpu_memory_utilization=0.1,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = Dataset.from_list(make_rows(2, SIZE))
    environment = lambda: AsksFirst(**ENVIRONMENT)  # noqa: E731
    return VTGRPOTrainer(
        str(checkpoint), args, rows, reward_funcs=[score, score], environment=environment, peft_config=peft_config
    )


def roll_out(trainer: VTGRPOTrainer) -> dict:
    trainer.model.train()
    rows = [trainer.train_dataset[index] for index in range(2)]
    return trainer._generate_and_score_completions([row for row in rows for _ in range(4)])


def trained(trainer: VTGRPOTrainer, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return completion_logprobs(trainer, trainer.model, batch, chunk=4)


def worst(batch: dict, logprobs: torch.Tensor) -> float:
    return ((logprobs - batch["sampling_per_token_logps"]).abs() * batch["tool_mask"]).max().item()


@pytest.mark.parametrize("adapter", [False, True], ids=["weights", "adapter"])
def test_rollouts_follow_the_weights(checkpoint, tmp_path, adapter):
    """The same pictures before and after a large step: nothing computed with the old weights may be left in vLLM."""
    config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear") if adapter else None
    trainer = make_trainer(checkpoint, tmp_path, config)
    tower = trainer.family.vision_module + "."
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if tower in n and p.requires_grad}
    first = roll_out(trainer)
    assert [len(images) for images in first["image_index"]] == [2] * 8
    assert worst(first, trained(trainer, first)) < 1e-4
    torch.testing.assert_close(
        first["importance_sampling_ratio"], torch.ones_like(first["importance_sampling_ratio"]), atol=1e-3, rtol=0
    )

    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert max((after[name] - value).abs().max().item() for name, value in before.items()) > 1e-3
    assert worst(first, trained(trainer, first)) > 1e-2  # so that stale weights or features would be seen below

    second = roll_out(trainer)
    assert worst(second, trained(trainer, second)) < 1e-4
    losses = [log for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 1 and 0 < losses[0]["sampling/logp_difference_max"] < 1e-4
    assert losses[0]["grad_norm"] > 0
    del trainer
    gc.collect()
