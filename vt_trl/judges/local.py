"""A small language model as judge in the same job: yes or no, by the probabilities of the two words.

Nothing is sampled: one forward per case, and the answer is right when ``p(yes) / (p(yes) + p(no))`` reaches the
threshold. Rubric and question come first, so vLLM's prefix cache computes what a group has in common once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vt_trl.errors import ConfigError
from vt_trl.judges.base import Case, Judge, Judgement
from vt_trl.judges.prompt import PROMPT_VERSION, RUBRIC, YES_NO_REPLY, Limits, case_text

_YES, _NO = ("yes", "Yes"), ("no", "No")


class LocalJudge(Judge):
    """Qwen3, or any causal language model with a chat template, on this machine.

    Args:
        model: id or folder; default Qwen3-1.7B, thinking off (VisionThink, Appendix).
        backend: ``vllm`` (asleep but for the moment it judges), ``transformers``, or ``auto``: vLLM where it is
            installed and there is a GPU.
        device: for transformers: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ...
        dtype: ``auto`` is bfloat16 on a GPU and float32 on a CPU.
        threshold: share of yes from which an answer is right.
        min_mass: least probability of yes and no together; below it the model has not understood, and has failed.
        batch_size: cases per forward with transformers.
        max_tokens: longest prompt; a longer case fails.
        gpu_memory_utilization: vLLM's share of the GPU while it judges.
        rubric: replaces the text that says what is right.
        max_prediction_chars, max_question_chars, max_gold_chars: see :class:`vt_trl.judges.prompt.Limits`.
    """

    name = "local"

    def __init__(
        self,
        model: str = "Qwen/Qwen3-1.7B",
        backend: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        threshold: float = 0.5,
        min_mass: float = 0.05,
        batch_size: int = 32,
        max_tokens: int = 8192,
        gpu_memory_utilization: float = 0.2,
        rubric: str = RUBRIC,
        max_prediction_chars: int = Limits.prediction,
        max_question_chars: int = Limits.question,
        max_gold_chars: int = Limits.gold,
    ):
        if backend not in ("auto", "vllm", "transformers"):
            raise ConfigError(f"judge_args.backend is {backend!r}; it must be auto, vllm or transformers.")
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"judge_args.dtype is {dtype!r}; it must be auto, float32, bfloat16 or float16.")
        for label, share in {"threshold": threshold, "min_mass": min_mass}.items():
            if not 0 <= share <= 1:
                raise ConfigError(f"judge_args.{label} is {share}; it is a probability, from 0 to 1.")
        for label, count in {"batch_size": batch_size, "max_tokens": max_tokens}.items():
            if count < 1:
                raise ConfigError(f"judge_args.{label} is {count}; it must be 1 or more.")
        self.model, self.backend, self.device, self.dtype = model, backend, device, dtype
        self.threshold, self.min_mass = threshold, min_mass
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.gpu_memory_utilization = gpu_memory_utilization
        self.rubric = rubric
        self.limits = Limits(max_prediction_chars, max_question_chars, max_gold_chars)
        self._scorer: Any = None
        self._counts: Counter[str] = Counter()

    def open(self) -> None:
        """Load tokenizer and model. Raises ConfigError when they do not load or do not fit a judge."""
        if self._scorer is not None:
            return
        from transformers import AutoTokenizer

        from vt_trl.judges.scorers import make_scorer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise ConfigError(f"judge_args.model is {self.model!r}, which does not load: {error}") from error
        self._before, self._after = self._frame()
        self._yes, self._no = self._word_ids(_YES), self._word_ids(_NO)
        self._scorer = make_scorer(self, self._tokenizer)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": self.model,
            "prompt": PROMPT_VERSION,
            "rubric": self.rubric,
            "threshold": self.threshold,
            "min_mass": self.min_mass,
            "max_tokens": self.max_tokens,
            "limits": [self.limits.prediction, self.limits.question, self.limits.gold],
        }

    def counts(self) -> Counter[str]:
        return self._counts

    async def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        self.open()
        judgements = [self.limits.check(case) for case in cases]
        prompts = {
            index: self.prompt_ids(case)
            for index, (case, early) in enumerate(zip(cases, judgements, strict=True))
            if early is None
        }
        for index in [index for index, ids in prompts.items() if len(ids) > self.max_tokens]:
            length = len(prompts.pop(index))
            judgements[index] = Judgement.failed(f"{length} tokens, over judge_args.max_tokens ({self.max_tokens})")
        scored = self._scorer.logprobs(list(prompts.values()), [*self._yes, *self._no]) if prompts else []
        self._counts["forwards"] += len(scored)
        for index, logprobs in zip(prompts, scored, strict=True):
            judgements[index] = self._decide(logprobs)
        return judgements

    def prompt_ids(self, case: Case) -> list[int]:
        """Token ids of the whole prompt. The case's text never becomes a control token, whatever it says."""
        text = self._tokenizer(case_text(case), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*self._before, *text, *self._after]

    def _frame(self) -> tuple[list[int], list[int]]:
        """The chat around a case, as ids."""
        from vt_trl.generation.text import chat_frame

        parts = chat_frame(
            self._tokenizer, "", self.model, system=f"{self.rubric}\n{YES_NO_REPLY}", enable_thinking=False
        )
        return tuple(self._tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)

    def _word_ids(self, words: Sequence[str]) -> list[int]:
        """The tokens that say a word; only those that are one token."""
        ids = [self._tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        single = [found[0] for found in ids if len(found) == 1]
        if not single:
            raise ConfigError(
                f"judge_args.model is {self.model!r}, in whose vocabulary {' or '.join(words)} is no single token, so "
                f"its probability cannot be read off. Use a Qwen3 model, or `judge: openai` with a local server."
            )
        return single

    def _decide(self, logprobs: Sequence[float]) -> Judgement:
        yes = sum(map(math.exp, logprobs[: len(self._yes)]))
        no = sum(map(math.exp, logprobs[len(self._yes) :]))
        if not yes + no > 0 or yes + no < self.min_mass:
            return Judgement.failed(f"neither yes nor no: together they have a probability of {yes + no:.2g}")
        share = yes / (yes + no)
        return Judgement.of(share >= self.threshold, f"p(yes) = {share:.3f}")

    async def close(self) -> None:
        if self._scorer is not None:
            self._scorer.close()
            self._scorer = None
