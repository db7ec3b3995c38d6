"""Parts of ``python -m benchmarks.rollout``: turns of planned lengths, a barrier, model, engine and pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from vt_trl.envs import ResizeEnv
from vt_trl.generation.base import Backend, Request, Sample, SamplingSettings
from vt_trl.generation.standalone import Checkpoint, open_parts
from vt_trl.prompts import Prompts
from vt_trl.rollout import Limits
from vt_trl.types import Rollout

CALL = '<tool_call>\n{"name": "resize_image", "arguments": {"action": "resize"}}\n</tool_call>'
ANSWER = "<answer>7</answer>"
SIDE = 448  # pixels of the full picture: 16 x 16 visual tokens, and 8 x 8 at half of each side


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths of turns in tokens; ``sigma`` is that of the logarithm.

    What falls below ``shortest`` (an ending has to fit in) or above ``longest`` is set to it.
    """

    median: float
    sigma: float
    longest: int
    shortest: int = 16

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        drawn = self.median * np.exp(self.sigma * rng.standard_normal(count))
        return np.clip(drawn.round(), self.shortest, self.longest).astype(int).tolist()


@dataclass(frozen=True)
class Plan:
    """The length of every turn of every rollout, by its number; who has a second turn asks for the larger picture."""

    turns: tuple[tuple[int, ...], ...]

    @classmethod
    def draw(cls, rollouts: int, share: float, lengths: Lengths, rng: np.random.Generator) -> Plan:
        """``share`` of the rollouts, rounded, ask."""
        asking = set(rng.permutation(rollouts)[: round(share * rollouts)].tolist())
        return cls(tuple(tuple(lengths.draw(2 if one in asking else 1, rng)) for one in range(rollouts)))

    @property
    def sampled(self) -> int:
        """Tokens of all turns together."""
        return sum(map(sum, self.turns))

    @property
    def steps(self) -> tuple[int, int]:
        """Decoding steps without a barrier, when nobody has to wait for a place, and with one after each round."""
        rounds = [[turns[number] for turns in self.turns if len(turns) > number] for number in (0, 1)]
        return max(map(sum, self.turns)), sum(max(one, default=0) for one in rounds)


class RoundByRound:
    """A backend with a barrier: turns wait until all that run have ended, and then start together."""

    def __init__(self, backend: Backend):
        self.backend = backend
        self._waiting: list[Request] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def submit(self, request: Request) -> None:
        self._waiting.append(request)

    def completed(self) -> Iterator[Sample]:
        while self._waiting:
            ready, self._waiting = self._waiting, []
            for request in ready:
                self.backend.submit(request)
            yield from self.backend.completed()

    def end(self) -> None:
        self._waiting.clear()
        self.backend.end()


class PlannedTurns:
    """A backend whose turns have the lengths of ``plan``, and end in a call where another turn follows.

    A random model neither stops nor calls by itself. Nothing stops a turn below; its last tokens are replaced by those
    of a call, or of an answer, and the stop token.
    """

    def __init__(self, backend: Backend, tokenizer: Any):
        self.backend = backend
        self.ends = Endings(tokenizer)
        self.plan = Plan(())
        self._turn: Counter[int] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def begin(self, settings: SamplingSettings) -> None:
        self._turn.clear()
        self.backend.begin(settings)

    def submit(self, request: Request) -> None:
        length = self.plan.turns[request.request_id][self._turn[request.request_id]]
        self.backend.submit(replace(request, max_new_tokens=length))

    def completed(self) -> Iterator[Sample]:
        for sample in self.backend.completed():
            number = sample.request_id
            self._turn[number] += 1
            asks = self._turn[number] < len(self.plan.turns[number])
            yield replace(sample, token_ids=self.ends.put(sample.token_ids, asks), finished=True)


class Endings:
    """The last tokens of a turn that calls and of one that answers, stop token included."""

    def __init__(self, tokenizer: Any):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (ANSWER, CALL)]
        self.answer, self.call = ((*one, tokenizer.eos_token_id) for one in ids)

    def put(self, token_ids: Sequence[int], asks: bool) -> tuple[int, ...]:
        """``token_ids`` with its last ones replaced. Raises ValueError for a turn that is too short for them."""
        end = self.call if asks else self.answer
        if len(token_ids) < len(end):
            raise ValueError(f"a turn of {len(token_ids)} tokens has no room for an ending of {len(end)}")
        return (*token_ids[: len(token_ids) - len(end)], *end)


def phrases() -> list[str]:
    """The words of prompts and replies: as tokens they are some 300, as bytes 2000."""
    prompts = Prompts()
    words = " ".join([prompts.system, prompts.task, prompts.before_image, prompts.after_image, CALL, ANSWER]).split()
    return sorted({f" {word}" for word in words} | set(words))


class World:
    """A Qwen2.5-VL of random weights in training, its colocated vLLM engine, and rollouts on it.

    ``checkpoint``: of a tokenizer that has :func:`phrases`; ``seats``: sequences at a time. On a GPU in bfloat16 and
    with sleep between phases.
    """

    def __init__(self, checkpoint: Path, seats: int, context: int = 4096):
        from accelerate import Accelerator
        from transformers import AutoModelForImageTextToText

        from vt_trl.generation.vllm import ColocatedEngine, VLLMBackend

        self.gpu = torch.cuda.is_available()
        self.folder = checkpoint
        dtype = torch.bfloat16 if self.gpu else torch.float32
        self.model = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=dtype)
        self.model.to("cuda" if self.gpu else "cpu")
        self.parts = open_parts(Checkpoint(str(self.folder), backend="transformers"))
        self.seats, self.context, self.version = seats, context, 0
        self.engine = ColocatedEngine(
            model=self.model,
            accelerator=Accelerator(cpu=not self.gpu),
            processing_class=self.parts.processor,
            max_images=2,
            max_model_length=context,
            max_num_seqs=seats,
            gpu_memory_utilization=0.3,
            enable_sleep_mode=self.gpu,
        )
        tokenizer = self.parts.tokenizer
        tags = [token for token in range(len(tokenizer)) if set("<>") & set(tokenizer.decode([token]))]
        self.banned = sorted({*self.parts.banned_ids, *self.parts.stop_ids, *tags})  # a stray tag is no plan of ours
        backend = VLLMBackend(
            self.engine,
            image_token_id=self.parts.image_token_id,
            eos_token_ids=[],
            banned_ids=self.banned,
            weights_version=lambda: self.version,
        )
        self.backends = {"free": PlannedTurns(backend, tokenizer)}
        self.backends["rounds"] = PlannedTurns(RoundByRound(backend), tokenizer)

    def row(self, seed: int, width: int = SIDE, height: int = SIDE) -> dict[str, Any]:
        """A picture of its own, of noise."""
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        return {"id": f"row-{seed}", "image": Image.fromarray(pixels), "question": "Which is it?", "answer": ["7"]}

    def roll_out(
        self, variant: str, row: Mapping[str, Any], plan: Plan, settings: SamplingSettings | None = None
    ) -> list[Rollout]:
        """A group on new weights, by the training loop: ``free`` or with a barrier after each of its ``rounds``."""
        self.version += 1
        self.backends[variant].plan = plan
        limits = Limits(self.context, self.context, self.context)
        runner = self.parts.runner(self.backends[variant], lambda: ResizeEnv(min_pixels=3136), limits)
        self.parts.features.clear()
        return runner.run([dict(row)], len(plan.turns), settings or SamplingSettings())

    def counting(self) -> AbstractContextManager[Any]:
        """A mock around the engine's ``step``; its ``call_count`` is the number of steps within the context."""
        core = self.engine.llm.llm_engine
        return patch.object(core, "step", side_effect=core.step)


def check(rollouts: Sequence[Rollout], plan: Plan) -> None:
    """Raises RuntimeError unless the rollouts are those of the plan."""
    turns = tuple(tuple(len(turn.token_ids) for turn in rollout.turns) for rollout in rollouts)
    pictures = [len(rollout.images) for rollout in rollouts]
    if turns != plan.turns or pictures != list(map(len, plan.turns)):
        raise RuntimeError(f"planned turns of {plan.turns} tokens, got {turns} with {pictures} pictures")
