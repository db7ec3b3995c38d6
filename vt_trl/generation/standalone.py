"""A rollout loop outside training: a checkpoint whose weights stay as they are, on transformers or on vLLM."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from vt_trl.boxes import Sight
from vt_trl.chat import ChatEncoder
from vt_trl.envs import Environment
from vt_trl.errors import ConfigError
from vt_trl.families import Family, family_of
from vt_trl.features import ImageFeatures, ImageSizes
from vt_trl.generation.backends import largest_image_tokens
from vt_trl.generation.base import Backend
from vt_trl.generation.hf import HFBackend
from vt_trl.rollout import Limits, RolloutRunner

BACKENDS = ("auto", "vllm", "transformers")


@dataclass(frozen=True)
class Checkpoint:
    """A model to sample from, and how.

    ``backend``: ``auto`` is vLLM where there is a GPU and vLLM, else transformers. ``dtype``: ``auto`` is bfloat16 on
    a GPU and float32 elsewhere. ``max_batch``: sequences at a time. ``gpu_memory_utilization`` is vLLM's, ``device``
    transformers' (default: the GPU if there is one).
    """

    model: str
    revision: str | None = None
    backend: str = "auto"
    dtype: str = "auto"
    max_batch: int = 128
    gpu_memory_utilization: float = 0.9
    device: str | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend is {self.backend!r}; use one of {', '.join(BACKENDS)}.")

    @property
    def uses_vllm(self) -> bool:
        if self.backend == "auto":
            return torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None
        return self.backend == "vllm"

    @property
    def usual_device(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def torch_dtype(self) -> str:
        return ("bfloat16" if torch.cuda.is_available() else "float32") if self.dtype == "auto" else self.dtype


def load_part(checkpoint: Checkpoint, load: Callable[..., Any], **settings: Any) -> Any:
    """``load`` (a ``from_pretrained``) on a checkpoint. Raises ConfigError when there is none, or only an adapter."""
    folder = Path(checkpoint.model).expanduser()
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"model is {checkpoint.model!r}, an adapter without its base. Merge them with "
            f"`vt-trl export {checkpoint.model} --merge`, and name the folder that this writes."
        )
    try:
        return load(folder if folder.is_dir() else checkpoint.model, revision=checkpoint.revision, **settings)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model is {checkpoint.model!r}, which does not load: {why} Give a folder with weights and processor, or "
            f"a name on the Hub."
        ) from error


def open_runner(checkpoint: Checkpoint, environment: Callable[[], Environment], limits: Limits) -> RolloutRunner:
    """The rollout loop of a checkpoint. Raises ConfigError when it does not load."""
    parts = open_parts(checkpoint)
    example = environment()
    image_tokens = largest_image_tokens(parts.processor, example.max_image_pixels)
    if checkpoint.uses_vllm and not limits.context:
        # 4096 for the texts
        limits = replace(limits, context=image_tokens * example.max_images + limits.completion + 4096)
    backend = open_backend(checkpoint, parts, limits.context, example.max_images, image_tokens)
    return parts.runner(backend, environment, limits)


@dataclass(frozen=True)
class Parts:
    """All of a checkpoint but its weights, and the token ids that follow from it."""

    config: Any
    processor: Any
    family: Family
    features: ImageFeatures
    stop_ids: set[int]
    banned_ids: list[int]
    generation_config: GenerationConfig

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def sight(self) -> Sight:
        return self.family.sight(self.processor.image_processor)

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.family.image_token)

    def runner(self, backend: Backend, environment: Callable[[], Environment], limits: Limits) -> RolloutRunner:
        encoder = ChatEncoder(self.tokenizer, self.family, self.features)
        return RolloutRunner(environment, backend, encoder, self.stop_ids, limits)


def open_parts(checkpoint: Checkpoint) -> Parts:
    """Everything but the weights; refuses families nobody has taught us before gigabytes are read."""
    config = load_part(checkpoint, AutoConfig.from_pretrained)
    family = family_of(config)
    processor = load_part(checkpoint, AutoProcessor.from_pretrained)
    try:
        settings = GenerationConfig.from_pretrained(checkpoint.model, revision=checkpoint.revision)
    except OSError:  # a checkpoint need not have any
        settings = GenerationConfig()
    parts = make_parts(config, processor, family, settings)
    return replace(parts, features=ImageSizes(processor.image_processor)) if checkpoint.uses_vllm else parts


def make_parts(config: Any, processor: Any, family: Family, settings: GenerationConfig) -> Parts:
    """Token ids as in training: what ends a turn, and what is never sampled (also what the checkpoint suppresses)."""
    stop_ids = stop_ids_of(processor.tokenizer, settings)
    banned = family.banned_ids(processor.tokenizer, config.get_text_config().vocab_size, stop_ids)
    banned = sorted({*banned, *(settings.suppress_tokens or ())} - stop_ids)
    return Parts(config, processor, family, ImageFeatures(processor.image_processor), stop_ids, banned, settings)


def open_backend(
    checkpoint: Checkpoint, parts: Parts, context: int | None, max_images: int, max_image_tokens: int
) -> Backend:
    """Load the weights, into vLLM or onto the device. ``max_images``: in one context, of so many tokens each."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # each process of a launch has its own GPU
    if checkpoint.uses_vllm:
        return _vllm_backend(checkpoint, parts, context, max_images, max_image_tokens)
    model = load_part(checkpoint, AutoModelForImageTextToText.from_pretrained, dtype=checkpoint.torch_dtype)
    return _hf_backend(model.to(checkpoint.usual_device).eval().requires_grad_(False), parts, checkpoint.max_batch)


def _hf_backend(model: Any, parts: Parts, max_batch: int) -> HFBackend:
    return HFBackend.for_model(
        model,
        parts.features,
        pad_id=parts.tokenizer.pad_token_id,
        stop_ids=sorted(parts.stop_ids),
        banned_ids=parts.banned_ids,
        image_token_id=parts.image_token_id,
        max_batch=max_batch,
        tokenizer=parts.tokenizer,
    )


def _vllm_backend(
    checkpoint: Checkpoint, parts: Parts, context: int | None, max_images: int, max_image_tokens: int
) -> Backend:
    from vt_trl.generation.fixed_engine import FixedEngine
    from vt_trl.generation.vllm import VLLMBackend

    engine = FixedEngine(
        model=checkpoint.model,
        revision=checkpoint.revision,
        dtype=checkpoint.torch_dtype,
        processor=parts.processor,
        max_images=max_images,
        max_image_tokens=max_image_tokens,
        max_model_length=context,
        max_num_seqs=checkpoint.max_batch,
        gpu_memory_utilization=checkpoint.gpu_memory_utilization,
    )
    return VLLMBackend(
        engine,
        image_token_id=parts.image_token_id,
        eos_token_ids=sorted(parts.stop_ids),
        banned_ids=parts.banned_ids,
        weights_version=lambda: 0,
    )


def make_runner(
    model: Any, processor: Any, environment: Callable[[], Environment], limits: Limits, max_batch: int = 128
) -> RolloutRunner:
    """A rollout loop on a loaded model, with the transformers backend."""
    parts = make_parts(model.config, processor, family_of(model.config), model.generation_config)
    return parts.runner(_hf_backend(model, parts, max_batch), environment, limits)


def stop_ids_of(tokenizer: Any, generation_config: Any) -> set[int]:
    """The tokens that end a turn: those of the checkpoint's generation settings, and the tokenizer's own."""
    stop = generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(stop if isinstance(stop, Iterable) else [stop])} - {None}


def close_engine(backend: Backend | None) -> None:
    """End vLLM's process, where there is one, and have its memory back."""
    engine = getattr(backend, "engine", None)
    if engine is not None:
        engine.close()
