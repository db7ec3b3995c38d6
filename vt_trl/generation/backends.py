"""The backend of a trainer: which one its settings ask for, and what it has to know of the model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from vt_trl.envs import Environment
from vt_trl.generation.base import Backend
from vt_trl.generation.hf import HFBackend

if TYPE_CHECKING:
    from vt_trl.trainer import VTGRPOTrainer


def hf_backend(trainer: VTGRPOTrainer) -> HFBackend:
    """Turns sampled by the training model itself."""
    return HFBackend(
        trainer.generation_model,
        trainer.features,
        pad_id=trainer._tokenizer.pad_token_id,
        stop_ids=trainer.stop_ids,
        banned_ids=trainer.banned_ids,
        image_token_id=trainer.image_token_id,
        max_batch=trainer.args.generation_chunk,
        tokenizer=trainer._tokenizer,
    )


def vllm_backend(trainer: VTGRPOTrainer, example: Environment) -> Backend:
    """Turns sampled by vLLM, at sizes that fit the environment ``example``: in the training process or on a server."""
    args = trainer.args
    known = {
        "image_token_id": trainer.image_token_id,
        "eos_token_ids": trainer.stop_ids,
        "banned_ids": trainer.banned_ids,
        "weights_version": lambda: trainer.state.global_step,
    }
    model = {
        "model": trainer.model,
        "accelerator": trainer.accelerator,
        "processing_class": trainer.processing_class,
        "mode": args.vllm_mode,
    }
    if args.vllm_mode == "server":
        from vt_trl.generation.vllm_server import ServerBackend, ServerEngine

        trainer.vllm_generation = ServerEngine(
            **model,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
        )
        return ServerBackend(trainer.vllm_generation, **known)
    from vt_trl.generation.vllm import ColocatedEngine, VLLMBackend

    trainer.vllm_generation = ColocatedEngine(
        **model,
        max_images=example.max_images,
        max_image_tokens=largest_image_tokens(trainer.processing_class, example.max_image_pixels),
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_length=args.vllm_max_model_length,
        max_num_seqs=args.per_device_train_batch_size * args.steps_per_generation * args.vllm_tensor_parallel_size,
        enable_sleep_mode=args.vllm_enable_sleep_mode,
        model_impl=args.vllm_model_impl,
        trust_remote_code=args.trust_remote_code,
    )
    return VLLMBackend(trainer.vllm_generation, **known)


def largest_image_tokens(processing_class: Any, max_pixels: int | None) -> int:
    """Visual tokens of the largest picture the environment can show; vLLM's batch must hold one."""
    processor = processing_class.image_processor
    largest = min(max_pixels or math.inf, processor.size["longest_edge"])
    return math.ceil(largest / (processor.patch_size * processor.merge_size) ** 2)
