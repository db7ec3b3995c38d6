"""TRL's own tool loop on the engine of ``python -m benchmarks.rollout``, with the same turns."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from unittest.mock import patch

from datasets import Dataset
from PIL import Image
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_vl_chat_template

from benchmarks.rollout_parts import Endings, Plan, World
from vt_trl.prompts import Prompts

_PROMPTS = Prompts()


class ResizeTool:
    """The two-turn environment as TRL takes it: every method that is not ``reset`` is a tool."""

    def reset(self, full: Image.Image | None = None, **columns: Any) -> None:
        self._full = full

    def resize_image(self, action: str) -> list[dict[str, Any]]:
        """Shows the image again at its full resolution.

        Args:
            action: `resize` doubles both sides of the image shown so far.
        """
        before, after = _PROMPTS.before_image, _PROMPTS.after_image
        texts = [text.replace("<tool_response>\n", "").replace("\n</tool_response>", "") for text in (before, after)]
        picture = {"type": "image", "image": self._full}
        return [{"type": "text", "text": texts[0]}, picture, {"type": "text", "text": texts[1]}]


class PlannedLLM:
    """``vllm.LLM`` as TRL calls it, whose turns are those of a plan; see :class:`PlannedTurns`."""

    def __init__(self, world: World):
        self.llm = world.engine.llm
        self.banned = dict.fromkeys(world.banned, -100.0)
        self.ends = Endings(world.parts.tokenizer)
        self.plan = Plan(())
        self._round = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.llm, name)

    def start(self, plan: Plan) -> None:
        self.plan, self._round = plan, 0

    def generate(self, prompts: Sequence[Any], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        """All turns of a round: TRL sends those who go on in the order of their rollouts."""
        here = [turns for turns in self.plan.turns if len(turns) > self._round]
        asks = [len(turns) > self._round + 1 for turns in here]
        params = []
        for turns in here:
            one = sampling_params.clone()
            one.max_tokens, one.ignore_eos, one.logit_bias = turns[self._round], True, self.banned
            params.append(one)
        outputs = self.llm.generate(prompts, params, use_tqdm=use_tqdm)
        for output, asking in zip(outputs, asks, strict=True):
            sampled = output.outputs[0]
            sampled.token_ids = list(self.ends.put(sampled.token_ids, asking))
        self._round += 1
        return outputs


class _Generated(Exception):  # noqa: N818 - no error
    """The rollouts are there; what TRL would compute from them is not wanted."""


class TRLLoop:
    """TRL's ``GRPOTrainer`` with ``environment_factory`` and its colocated ``VLLMGeneration``, around our engine.

    The engine is shared so that its settings (precision, compilation, caches) do not count. What TRL does for itself
    stays: its weight sync, pictures processed and texts tokenized for each completion, text decoded and parsed.
    """

    def __init__(self, world: World):
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        self.world, self.llm = world, PlannedLLM(world)
        processor = world.parts.processor
        processor.chat_template = processor.tokenizer.chat_template = qwen3_vl_chat_template  # Qwen2.5's has no tools
        args = GRPOConfig(
            str(world.folder.parent / "trl"),
            per_device_train_batch_size=world.seats,
            num_generations=world.seats,
            max_completion_length=world.context,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=world.context,
            vllm_enable_sleep_mode=world.gpu,
            use_cpu=not world.gpu,
            bf16=world.gpu,
            report_to=[],
        )
        rows = Dataset.from_list([{"prompt": self._prompt("Which is it?")}])
        with patch("trl.generation.vllm_generation.LLM", lambda **settings: self.llm):
            self.trainer = _Timed(
                model=world.model,
                args=args,
                reward_funcs=lambda completions, **columns: [0.0] * len(completions),
                train_dataset=rows,
                processing_class=processor,
                environment_factory=ResizeTool,
            )
        self.trainer.model.train()

    @staticmethod
    def _prompt(question: str) -> list[dict[str, str]]:
        preamble = _PROMPTS.system.partition("\n\n")[0]
        return [{"role": "system", "content": preamble}, {"role": "user", "content": _PROMPTS.question(question)}]

    def sync_weights(self) -> None:
        self.trainer.vllm_generation.sync_weights()

    def roll_out(self, row: Mapping[str, Any], plan: Plan) -> float:
        """Seconds of a group on new weights, from its messages to its completions and their tokens. Raises
        RuntimeError unless its turns are those of the plan.
        """
        self.llm.start(plan)
        self.trainer._last_loaded_step = -1
        full = row["image"]
        low = full.resize((full.width // 2, full.height // 2))
        one = {"prompt": self._prompt(row["question"]), "image": low, "full": full}
        with suppress(_Generated):
            self.trainer._generate_and_score_completions([one] * len(plan.turns))
        sampled = tuple(sum(mask) for mask in self.trainer.found[2])
        if sampled != tuple(map(sum, plan.turns)):
            raise RuntimeError(f"planned rollouts of {plan.turns} tokens, got {sampled}")
        return self.trainer.seconds


class _Timed(GRPOTrainer):
    def _generate(self, prompts: list[Any]) -> Any:
        began = time.perf_counter()
        self.found = super()._generate(prompts)
        self.seconds = time.perf_counter() - began
        raise _Generated
