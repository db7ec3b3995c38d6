"""vLLM on weights that stay as they are: for data preparation, and for a judge beside a training run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vt_trl.errors import ConfigError
from vt_trl.generation.tensor_parallel import EngineGroup
from vt_trl.generation.vllm_common import pixel_limits


class FixedEngine:
    """vLLM on a checkpoint as it is, outside training: no weights to push and no sleep, in a process of its own.

    What :class:`~vt_trl.generation.vllm.VLLMBackend` needs of an engine, and no more. Arguments as for
    :class:`ColocatedEngine`; ``processor`` gives the size limits of pictures, None is a model of texts alone. Raises
    ConfigError without vLLM.
    """

    def __init__(
        self,
        *,
        model: str,
        revision: str | None,
        dtype: str,
        max_model_length: int,
        max_num_seqs: int,
        gpu_memory_utilization: float,
        processor: Any = None,
        max_images: int = 0,
        max_image_tokens: int = 0,
    ):
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(
                f"backend is vllm, which does not import ({error}). Install vt-trl[vllm], or set it to transformers."
            ) from error
        self.group = EngineGroup()  # one process, one engine
        pictures = {} if processor is None else {"mm_processor_kwargs": pixel_limits(processor)}
        pictures |= {} if processor is None else {"limit_mm_per_prompt": {"image": max_images, "video": 0}}
        with own_process():
            self.llm = LLM(
                model=model,
                revision=revision,
                dtype=dtype,
                seed=0,
                max_model_len=max_model_length,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max(8192, max_image_tokens, max_num_seqs),
                gpu_memory_utilization=gpu_memory_utilization,
                enable_prefix_caching=True,  # the samples of a prompt share its keys and values
                enforce_eager=not torch.cuda.is_available(),
                logprobs_mode="processed_logprobs",
                **pictures,
            )

    def wake(self, stale: bool) -> None:
        """Nothing to do: the weights are those of the checkpoint."""

    def sleep(self) -> None:
        """Nothing to do: nobody else needs the memory."""

    def close(self) -> None:
        """End vLLM's process, and have its memory back. Left to the garbage collector it may live on for long."""
        self.llm.llm_engine.engine_core.shutdown()


@contextmanager
def own_process() -> Iterator[None]:
    """Let vLLM start its engine as a fresh process on this process's GPU, without a place in our process group."""
    changed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        here = torch.cuda.current_device()
        changed["CUDA_VISIBLE_DEVICES"] = visible[here] if here < len(visible) and visible[here] else str(here)
    from vt_trl.generation.vllm_engine import random_state_kept

    with _environment_read_anew(), _changed_environment(changed, hidden), random_state_kept():
        yield


@contextmanager
def _changed_environment(changed: Mapping[str, str], hidden: Sequence[str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in (*changed, *hidden)}
    for name in hidden:
        os.environ.pop(name, None)
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _environment_read_anew() -> Iterator[None]:
    """An engine in this process makes vLLM keep what it has read from the environment, our changes to which it would
    miss: the next engine would start in this process too, and fall asleep and wake with the first."""
    from vllm import envs

    kept = hasattr(envs.__getattr__, "cache_clear")
    if kept:
        envs.disable_envs_cache()
    try:
        yield
    finally:
        if kept:
            envs.enable_envs_cache()
