"""The vLLM engine inside the training process: how it is built, how weights get in, when it sleeps.

TRL's wrapper is reused for what it is good at, gathering parameters under PEFT, FSDP and ZeRO. Its engine arguments
and its weight sync are not: that one keeps vLLM's image features after an update and loads each tensor by a call of
its own. One engine per process, or per group of processes with tensor parallelism.
"""

from __future__ import annotations

import functools
import os
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from trl.generation.vllm_generation import empty_cache
from trl.trainer.utils import ensure_master_addr_port

from vt_trl.errors import ConfigError
from vt_trl.generation.tensor_parallel import EngineGroup
from vt_trl.generation.vllm_common import EngineWeights, pixel_limits

CACHES = ("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache")  # methods of vLLM's LLMEngine


class ColocatedEngine(EngineWeights):
    """A vLLM engine in this process that holds a copy of ``model``.

    Takes every argument of TRL's ``VLLMGeneration`` and, by keyword:

    Args:
        max_images: most images in one context.
        max_image_tokens: visual tokens of the largest image; a smaller batch budget would never schedule it.
        dtype: of the engine's weights. Default: what training computes in, that is accelerate's mixed precision, else
            the model's own type. Float32 stays float32, where vLLM's "auto" would halve it.
        enforce_eager: no CUDA graphs and no compilation. Default: on a CPU only.
        enable_prefix_caching: reuse the keys and values of a first turn in the second, and of a prompt in its group.
        mm_processor_kwargs: for vLLM's image processor. Default: the size limits of ``processing_class``.

    Raises:
        ConfigError: for server mode, processes that do not divide into engines, sleep mode on a CPU, or an unsuitable
            vLLM.
    """

    def __init__(
        self,
        *args: Any,
        max_images: int = 2,
        max_image_tokens: int = 0,
        dtype: torch.dtype | None = None,
        enforce_eager: bool | None = None,
        enable_prefix_caching: bool = True,
        mm_processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.max_images = max_images
        self.max_image_tokens = max_image_tokens
        self.dtype = dtype
        self.enforce_eager = enforce_eager
        self.enable_prefix_caching = enable_prefix_caching
        self.mm_processor_kwargs = mm_processor_kwargs
        super().__init__(*args, **kwargs)  # ends with _init_vllm

    def _init_vllm(self) -> None:
        self._llm_weights_sleeping = False
        self._check_mode()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM reads it late; load_weights needs the model in reach
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConfigError(
                f"use_vllm=True, but vLLM does not import ({error}). Install vt-trl[vllm], or set use_vllm to False."
            ) from error

        on_cpu = current_platform.is_cpu()
        if on_cpu:
            keep_cpu_weights_writable()
        if on_cpu and self.enable_sleep_mode:
            raise ConfigError("vllm_enable_sleep_mode=True: vLLM cannot sleep on a CPU; set it to False")
        # The variables torchrun would set; vLLM joins the process group that they describe.
        os.environ["RANK"] = str(self.accelerator.process_index)
        os.environ["LOCAL_RANK"] = str(self.accelerator.local_process_index)
        os.environ["WORLD_SIZE"] = str(self.accelerator.num_processes)
        ensure_master_addr_port()
        self.group = EngineGroup(self.tensor_parallel_size, self.accelerator.num_processes)
        eager = on_cpu if self.enforce_eager is None else self.enforce_eager
        with random_state_kept():
            self.llm = LLM(**self._llm_arguments(eager))
        missing = [name for name in CACHES if not hasattr(self.llm.llm_engine, name)]
        if missing:
            raise ConfigError(
                f"This vLLM has no {', '.join(missing)}: after an update it would go on sampling from features of the "
                "old weights. Install vLLM 0.22 to 0.31."
            )
        self.sleep()
        self.accelerator.wait_for_everyone()  # loading takes each process its own time, and DeepSpeed would hang on it

    def _check_mode(self) -> None:
        if self.mode != "colocate":
            raise ConfigError(f"vllm_mode is {self.mode!r}: this engine runs in the training process; set colocate.")
        processes = self.accelerator.num_processes
        if processes % self.tensor_parallel_size:
            raise ConfigError(
                f"vllm_tensor_parallel_size is {self.tensor_parallel_size}, and the {processes} processes do not "
                f"divide into engines of that many. Set a divisor of {processes}."
            )

    def _llm_arguments(self, enforce_eager: bool) -> dict[str, Any]:
        """Everything ``vllm.LLM`` is built with."""
        return {
            "model": self.model.name_or_path,
            "dtype": str(self.dtype or self._weight_dtype()).removeprefix("torch."),
            "distributed_executor_backend": "external_launcher",
            "tensor_parallel_size": self.tensor_parallel_size,
            "seed": self.accelerator.process_index // self.tensor_parallel_size,
            "max_model_len": self.max_model_length,
            "max_num_seqs": self.max_num_seqs,
            # vLLM's profiler reserves memory for a batch this large, so not more than needed.
            "max_num_batched_tokens": max(4096, self.max_image_tokens, self.max_num_seqs or 0),
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "enable_sleep_mode": self.enable_sleep_mode,
            "enable_prefix_caching": self.enable_prefix_caching,
            "enforce_eager": enforce_eager,
            "limit_mm_per_prompt": {"image": self.max_images, "video": 0},  # 0: no memory for a dummy video
            "mm_processor_kwargs": self.mm_processor_kwargs or pixel_limits(self.processing_class),
            "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from
            "model_impl": self.model_impl,
            "trust_remote_code": self.trust_remote_code,
        }

    @torch.no_grad()
    def sync_weights(self) -> None:
        """Copy the weights of the training model into the engine and forget what was computed with the old ones.

        A collective under ZeRO and FSDP. One ``load_weights`` call for all tensors: a call per tensor looks up all
        parameter names each time. vLLM takes tensors from the iterator one by one, so gathered ones never pile up.
        """
        if self._llm_weights_sleeping:
            empty_cache()  # give back what the optimizer step left reserved before the engine maps its memory
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        weights = self._iter_named_params()
        if self._dist.is_zero3 or self._dist.is_fsdp or is_peft_model(self.model):
            # When the iterator moves on, a gathered tensor is freed, and at its end merged adapters are subtracted
            # again in place: a model that collects its weights before loading them would load the wrong ones.
            weights = ((name, weight.clone()) for name, weight in weights)
        self.llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights(weights)
        deque(weights, maxlen=0)  # its end is where adapters are unmerged and where other ranks wait
        self.reset_caches()

    def reset_caches(self) -> None:
        """Forget keys and values, processed images and image features.

        TRL leaves the image features, so that a trained vision tower is sampled stale wherever an image recurs.
        """
        for name in CACHES:
            if getattr(self.llm.llm_engine, name)() is False:
                raise RuntimeError(f"vLLM refused {name}: turns still run. Sync weights between rollout phases only.")

    def wake(self, stale: bool) -> None:
        """Make ready to sample; push weights when they are ``stale`` or were given up in sleep."""
        if stale or self._llm_weights_sleeping:
            self.sync_weights()
        if self.enable_sleep_mode:
            self.llm.wake_up(tags=["kv_cache"])

    def sleep(self) -> None:
        """Give all memory back, weights included (level 2). Does nothing unless sleep mode is enabled."""
        if self.enable_sleep_mode:
            self.llm.sleep(level=2)
            self._llm_weights_sleeping = True


def keep_cpu_weights_writable() -> None:
    """Make vLLM's CPU build multiply with the weights themselves; call it before the engine is built.

    By default it packs each weight into a private layout and frees the original, so that ``load_weights`` has nothing
    left to write to. Packing saves time for serving; a training run pushes new weights every step.
    """
    from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding

    dispatch = utils.dispatch_cpu_unquantized_gemm
    if getattr(dispatch, "keeps_weights", False):
        return

    @functools.wraps(dispatch)
    def unpacked(layer: torch.nn.Module, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = torch.nn.functional.linear
        else:
            dispatch(layer, remove_weight)

    unpacked.keeps_weights = True
    for module in (utils, linear, vocab_parallel_embedding):  # some releases import the name, some look it up
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            module.dispatch_cpu_unquantized_gemm = unpacked


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the global random states as they were.

    vLLM seeds them all when it starts, with a seed of its own; its sampling and the training around it draw from them,
    and would no longer depend on the seed of the training run.
    """
    python, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
