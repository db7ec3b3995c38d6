"""Generation with transformers: no extra engine, any device. It works in rounds: all submitted turns, then their next.

Slower than vLLM by far; it is for CPUs, tests, evaluation of small sets, and machines without vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from vt_trl.errors import ConfigError
from vt_trl.features import ImageFeatures
from vt_trl.generation.base import Request, Sample, SamplingSettings


class _BanAndRecord(LogitsProcessor):
    """Bans tokens and keeps the log-probability of each sampled one, at the memory of a single (B, V) tensor.

    transformers calls it before it draws; what was drawn is seen at the next call, so gathering lags one step. The
    recorded distribution is softmax(logits / temperature) over the allowed tokens, as the trainer's forward has it;
    top-p, top-k and min-p are not part of it.
    """

    def __init__(self, banned_ids: Sequence[int], temperature: float):
        self.banned = torch.tensor(list(banned_ids), dtype=torch.long)
        self.temperature = temperature
        self.steps: list[torch.Tensor] = []  # (B,) per step
        self._previous: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.gather(input_ids)
        scores = scores.float()
        if len(self.banned):
            scores = scores.index_fill(1, self.banned.to(scores.device), -torch.inf)
        self._previous = scores
        return scores

    def gather(self, input_ids: torch.LongTensor) -> None:
        """Note the log-probability of the last token of ``input_ids`` (B, L) under the scores it was drawn from."""
        if self._previous is not None:
            scores = self._previous / self.temperature
            drawn = scores.gather(1, input_ids[:, -1:])[:, 0]
            self.steps.append(drawn - scores.logsumexp(-1))
            self._previous = None


class _DrawByRow(LogitsProcessor):
    """Draws each row's token itself, from that row's own stream, and leaves no other token to choose.

    One number per row and step, turned into a token by the inverse of the cumulated probabilities. A row's tokens thus
    do not depend on its neighbours, but for the last bits of the logits.
    """

    def __init__(self, seeds: Sequence[int], temperature: float):
        self.streams = [np.random.default_rng(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        cumulated = (scores.double() / self.temperature).softmax(dim=-1).cumsum(dim=-1)  # (B, V)
        draws = torch.tensor([[stream.random()] for stream in self.streams], dtype=torch.double, device=scores.device)
        total = cumulated[:, -1:]
        point = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
        drawn = torch.searchsorted(cumulated, point, right=True)  # (B, 1): the first token that reaches above it
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


class _StopAtText(StoppingCriteria):
    """Ends each row at its own stop texts (ASCII). Only the newest tokens are decoded, one per letter at most."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[Sequence[str]], prompt_length: int):
        self.decode, self.stops, self.prompt_length = decode, stops, prompt_length
        self.reach = [max(map(len, texts), default=0) for texts in stops]
        self.ends: list[int | None] = [None] * len(stops)  # tokens up to the stop text, per row

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        drawn = input_ids[:, self.prompt_length :]
        for row, texts in enumerate(self.stops):
            if texts and self.ends[row] is None:
                newest = self.decode(drawn[row, -self.reach[row] :].tolist())
                if any(text in newest for text in texts):
                    self.ends[row] = drawn.shape[1]
        ended = [end is not None for end in self.ends]
        return torch.tensor(ended, device=input_ids.device)


@contextmanager
def _own_generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Keep the checkpoint's own generation settings out.

    transformers fills what a call leaves open from the model's settings: fields at their default value in some
    versions, fields at None (min_p, say) in 5.23. Qwen2.5-VL's say temperature 1e-6, so sampling could turn greedy.
    """
    owners = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    kept = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = config
        yield
    finally:
        for owner, original in zip(owners, kept, strict=True):
            owner.generation_config = original


class HFBackend:
    """Backend on ``model.generate``.

    Args:
        model_context: opens a context that yields the model to generate with (gathered parameters, checkpointing off).
            It is open from ``begin`` to ``end``: gathering is a collective, and processes differ in their rounds.
        features: preprocessed pictures, shared with the packer.
        pad_id, stop_ids, banned_ids, image_token_id: token ids.
        max_batch: sequences per ``generate`` call; bounds memory.
        tokenizer: finds stop texts; not needed where no request has any.
    """

    def __init__(
        self,
        model_context: Callable[[], AbstractContextManager[Any]],
        features: ImageFeatures,
        *,
        pad_id: int,
        stop_ids: Sequence[int],
        banned_ids: Sequence[int],
        image_token_id: int,
        max_batch: int = 64,
        tokenizer: Any = None,
    ):
        self.tokenizer = tokenizer
        self.model_context = model_context
        self.features = features
        self.pad_id = pad_id
        self.stop_ids = list(stop_ids)
        self.banned_ids = list(banned_ids)
        self.image_token_id = image_token_id
        self.max_batch = max_batch
        self._pending: list[Request] = []
        self._settings = SamplingSettings()
        self._open = ExitStack()
        self._model: Any = None

    @classmethod
    def for_model(cls, model: Any, features: ImageFeatures, **kwargs: Any) -> HFBackend:
        """A backend on a plain model, outside any trainer."""
        return cls(lambda: nullcontext(model), features, **kwargs)

    def begin(self, settings: SamplingSettings) -> None:
        if settings.seed is not None and (settings.top_p, settings.top_k, settings.min_p or 0.0) != (1.0, 0, 0.0):
            raise ConfigError(
                f"seed is {settings.seed} and top_p, top_k or min_p cut the distribution: with transformers a seeded "
                "turn is drawn from the whole of it. Leave them at 1.0, 0 and None, or use vLLM."
            )
        self.end()  # what an interrupted phase may have left
        self._settings = settings
        self._model = self._open.enter_context(self.model_context())

    def submit(self, request: Request) -> None:
        """Raises ValueError for stop texts without a tokenizer to find them with."""
        if request.stop and self.tokenizer is None:
            raise ValueError(f"request {request.request_id} has stop texts, and the backend was given no tokenizer.")
        self._pending.append(request)

    def end(self) -> None:
        self._pending.clear()
        self._model = None
        self._open.close()

    def completed(self) -> Iterator[Sample]:
        while self._pending:
            requests, self._pending = self._pending, []
            # Neighbours in length share a batch, so that padding stays small.
            requests.sort(key=lambda request: (request.max_new_tokens, len(request.token_ids)))
            for start in range(0, len(requests), self.max_batch):
                # Handed over batch by batch: a judge can begin on the first while the others are generated.
                yield from self._generate(self._model, requests[start : start + self.max_batch])

    @torch.no_grad()
    def _generate(self, model: Any, requests: list[Request]) -> list[Sample]:
        inputs = self._collate(requests, model.device)
        recorder = _BanAndRecord(self.banned_ids, self._settings.temperature or 1.0)
        processors = LogitsProcessorList([recorder])
        seeds = self._seeds(requests)
        if seeds:
            processors.append(_DrawByRow(seeds, self._settings.temperature))
        stop = _StopAtText(self._decode, [request.stop for request in requests], inputs["input_ids"].shape[1])
        config = self._generation_config(max(request.max_new_tokens for request in requests), drawn=bool(seeds))
        with _own_generation_config(model, config):
            # The class's method: FSDP2 wraps the instance's so that weights are given up after each call. Not synced:
            # weights are whole here, and processes that sample different numbers of turns would wait for each other.
            output = type(model).generate(
                model,
                **inputs,
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([stop] if any(stop.stops) else []),
                synced_gpus=False,
            )
        recorder.gather(output)
        drawn = output[:, inputs["input_ids"].shape[1] :]  # (B, T)
        logprobs = torch.stack(recorder.steps, dim=1)  # (B, T)
        return [
            self._sample(request, ids, logps, end)
            for request, ids, logps, end in zip(requests, drawn.tolist(), logprobs.tolist(), stop.ends, strict=True)
        ]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _seeds(self, requests: list[Request]) -> list[int]:
        """The seed of each row; empty where nothing is drawn or one random state serves all."""
        seeds = [request.seed for request in requests if request.seed is not None]
        if not seeds or self._settings.greedy:
            return []
        if len(seeds) < len(requests):
            raise ValueError("Some requests of a batch have a seed and some have none; give one to all or to none.")
        return seeds

    def _sample(self, request: Request, ids: list[int], logprobs: list[float], text_end: int | None) -> Sample:
        """Cut a row of the batch at its stop token or stop text (tokens up to it), or at its own token limit."""
        stops = (index for index, token in enumerate(ids) if token in self.stop_ids)
        end = min(next(stops, len(ids)) + 1, len(ids) + 1 if text_end is None else text_end)
        kept = min(end, request.max_new_tokens)
        finished = end <= min(len(ids), request.max_new_tokens)
        return Sample(request.request_id, tuple(ids[:kept]), tuple(logprobs[:kept]), finished)

    def _collate(self, requests: list[Request], device: torch.device) -> dict[str, torch.Tensor]:
        """Left-padded ids (B, L), their mask, which of them are visual, and the pictures in order."""
        longest = max(len(request.token_ids) for request in requests)
        ids = torch.full((len(requests), longest), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.token_ids) :] = torch.tensor(request.token_ids)
            mask[row, longest - len(request.token_ids) :] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        images = [image for request in requests for image in request.images]
        if images:
            inputs |= {"mm_token_type_ids": (ids == self.image_token_id).int(), **self.features.batch(images)}
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def _generation_config(self, max_new_tokens: int, drawn: bool = False) -> GenerationConfig:
        """``drawn``: a logits processor has drawn already, and what is left is to take the only token."""
        settings = self._settings
        sampling: dict[str, Any] = {"do_sample": False}
        if not (settings.greedy or drawn):
            sampling = {
                "do_sample": True,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "top_k": settings.top_k,
                "min_p": settings.min_p,
            }
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            pad_token_id=self.pad_id,
            eos_token_id=self.stop_ids,
            repetition_penalty=settings.repetition_penalty,
            disable_compile=True,
            **sampling,
        )
