"""Where a local judge computes: log-probabilities of a few next tokens, by transformers or by vLLM.

vLLM's judge is an engine in a process of its own. Sleep in vLLM gives back everything one process holds, so two
engines in the training process would put each other to sleep.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from vt_trl.errors import ConfigError

if TYPE_CHECKING:
    from vt_trl.judges.local import LocalJudge

_TOP = 20  # vLLM reports this many next tokens; a judge whose yes and no are not among them has failed


class Scorer(Protocol):
    def logprobs(self, prompts: Sequence[Sequence[int]], words: Sequence[int]) -> list[list[float]]:
        """Log-probability of each of ``words`` as the token after each prompt; ``-inf`` when it is next to nothing."""

    def close(self) -> None:
        """Give memory back."""


def make_scorer(judge: LocalJudge, tokenizer: Any) -> Scorer:
    """The scorer of a judge's settings. Raises ConfigError when it cannot be built."""
    backend = judge.backend
    if backend == "auto":
        both = torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None
        backend = "vllm" if both else "transformers"
    return VLLMScorer(judge) if backend == "vllm" else TransformersScorer(judge, tokenizer)


class TransformersScorer:
    """One forward per batch, of cases of similar length."""

    def __init__(self, judge: LocalJudge, tokenizer: Any):
        from transformers import AutoModelForCausalLM

        on_gpu = torch.cuda.is_available() if judge.device == "auto" else not judge.device.startswith("cpu")
        device = ("cuda" if on_gpu else "cpu") if judge.device == "auto" else judge.device
        dtype = ("bfloat16" if on_gpu else "float32") if judge.dtype == "auto" else judge.dtype
        try:
            model = AutoModelForCausalLM.from_pretrained(judge.model, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ConfigError(f"judge_args.model is {judge.model!r}, which does not load: {error}") from error
        self._model = model.to(device).eval().requires_grad_(False)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._batch_size = judge.batch_size

    @torch.no_grad()
    def logprobs(self, prompts: Sequence[Sequence[int]], words: Sequence[int]) -> list[list[float]]:
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found: list[list[float]] = [[] for _ in prompts]
        for start in range(0, len(order), self._batch_size):
            part = order[start : start + self._batch_size]
            ids = [torch.tensor(prompts[index]) for index in part]
            tokens = pad_sequence(ids, batch_first=True, padding_value=self._pad, padding_side="left")
            mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True, padding_side="left")
            logits = self._model(
                input_ids=tokens.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0).to(self._model.device),
                logits_to_keep=1,
                use_cache=False,
            ).logits[:, -1]
            values = logits.float().log_softmax(dim=-1)[:, list(words)].tolist()
            for index, row in zip(part, values, strict=True):
                found[index] = row
        return found

    def close(self) -> None:
        del self._model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class VLLMScorer:
    """vLLM in a child process; on a GPU it sleeps, its memory given back, whenever it is not judging."""

    def __init__(self, judge: LocalJudge):
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(
                f"judge_args.backend is vllm, which does not import ({error}). Install vt-trl[vllm], or set it to "
                f"transformers."
            ) from error
        self._sleeps = torch.cuda.is_available()
        from vt_trl.generation.fixed_engine import own_process

        with own_process():
            self._llm = LLM(
                model=judge.model,
                dtype=judge.dtype if judge.dtype != "auto" or self._sleeps else "float32",
                max_model_len=judge.max_tokens + 1,
                gpu_memory_utilization=judge.gpu_memory_utilization,
                enable_prefix_caching=True,
                enable_sleep_mode=self._sleeps,
                max_logprobs=_TOP,
                logprobs_mode="raw_logprobs",
                enforce_eager=not self._sleeps,
                seed=0,
            )
        self._sleep()

    def logprobs(self, prompts: Sequence[Sequence[int]], words: Sequence[int]) -> list[list[float]]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=_TOP, detokenize=False)
        if self._sleeps:
            self._llm.wake_up()
        try:
            outputs = self._llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)
        finally:
            self._sleep()
        tops = [output.outputs[0].logprobs[0] for output in outputs]
        return [[top[word].logprob if word in top else -math.inf for word in words] for top in tops]

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _sleep(self) -> None:
        if self._sleeps:
            self._llm.sleep(level=1)
