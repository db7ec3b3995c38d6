"""A rollout loop outside training: a checkpoint whose weights stay as they are, on transformers or on vLLM."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from vt_trl.chat import ChatEncoder
from vt_trl.envs import Environment
from vt_trl.errors import ConfigError
from vt_trl.evaluate import make_runner, stop_ids_of
from vt_trl.families import family_of
from vt_trl.features import ImageFeatures
from vt_trl.generation.backends import largest_image_tokens
from vt_trl.rollout import Limits, RolloutRunner

BACKENDS = ("auto", "vllm", "transformers")


@dataclass(frozen=True)
class Checkpoint:
    """A model to sample from, and how.

    ``backend``: ``auto`` is vLLM where there is a GPU and vLLM, else transformers. ``dtype``: ``auto`` is bfloat16 on
    a GPU and float32 elsewhere. ``max_batch``: sequences at a time. ``gpu_memory_utilization`` is vLLM's.
    """

    model: str
    revision: str | None = None
    backend: str = "auto"
    dtype: str = "auto"
    max_batch: int = 128
    gpu_memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend is {self.backend!r}; use one of {', '.join(BACKENDS)}.")

    @property
    def uses_vllm(self) -> bool:
        if self.backend == "auto":
            return torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None
        return self.backend == "vllm"

    @property
    def torch_dtype(self) -> str:
        return ("bfloat16" if torch.cuda.is_available() else "float32") if self.dtype == "auto" else self.dtype


def open_runner(checkpoint: Checkpoint, environment: Callable[[], Environment], limits: Limits) -> RolloutRunner:
    """The rollout loop of a checkpoint. Raises ConfigError when it does not load."""
    try:
        config = AutoConfig.from_pretrained(checkpoint.model, revision=checkpoint.revision)
        processor = AutoProcessor.from_pretrained(checkpoint.model, revision=checkpoint.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model is {checkpoint.model!r}, which does not load: {error}") from error
    family_of(config)  # refuses families nobody has taught us before gigabytes are read
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # each process of a launch has its own GPU
    if checkpoint.uses_vllm:
        return _vllm_runner(checkpoint, config, processor, environment, limits)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint.model, revision=checkpoint.revision, dtype=checkpoint.torch_dtype
    )
    model.to(device).eval().requires_grad_(False)
    return make_runner(model, processor, environment, limits, checkpoint.max_batch)


def _vllm_runner(
    checkpoint: Checkpoint, config: Any, processor: Any, environment: Callable[[], Environment], limits: Limits
) -> RolloutRunner:
    from vt_trl.generation.fixed_engine import FixedEngine
    from vt_trl.generation.vllm import VLLMBackend

    tokenizer, family = processor.tokenizer, family_of(config)
    example = environment()
    image_tokens = largest_image_tokens(processor, example.max_image_pixels)
    context = limits.context or image_tokens * example.max_turns + limits.completion + 4096  # for the texts
    limits = Limits(limits.turn, limits.completion, context)
    stop_ids = stop_ids_of(tokenizer, GenerationConfig.from_pretrained(checkpoint.model, revision=checkpoint.revision))
    engine = FixedEngine(
        model=checkpoint.model,
        revision=checkpoint.revision,
        dtype=checkpoint.torch_dtype,
        processor=processor,
        max_images=example.max_turns,
        max_image_tokens=image_tokens,
        max_model_length=context,
        max_num_seqs=checkpoint.max_batch,
        gpu_memory_utilization=checkpoint.gpu_memory_utilization,
    )
    vocab = getattr(config, "text_config", config).vocab_size
    backend = VLLMBackend(
        engine,
        image_token_id=tokenizer.convert_tokens_to_ids(family.image_token),
        eos_token_ids=sorted(stop_ids),
        banned_ids=family.banned_ids(tokenizer, vocab, stop_ids),
        weights_version=lambda: 0,
    )
    encoder = ChatEncoder(tokenizer, family, ImageFeatures(processor.image_processor))
    return RolloutRunner(environment, backend, encoder, stop_ids, limits)
