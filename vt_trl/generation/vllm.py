"""Turns sampled by vLLM without a barrier: one sample's next turn starts while the first turns of others still run.

The engine with its weights and its sleep is in :mod:`vt_trl.generation.vllm_engine`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

from vt_trl.generation.base import Request, Sample, SamplingSettings
from vt_trl.generation.vllm_common import ImageIds, sampling_fields
from vt_trl.generation.vllm_engine import ColocatedEngine
from vt_trl.packing import placeholder_runs

__all__ = ["ColocatedEngine", "VLLMBackend"]


class VLLMBackend:
    """Samples turns with a :class:`ColocatedEngine`; implements :class:`vt_trl.generation.base.Backend`.

    Args:
        image_token_id: the placeholder, once per visual token in ``Request.token_ids``.
        eos_token_ids: what ends a turn, and nothing else does; part of the returned ids.
        banned_ids: never sampled, by a bias of :data:`~vt_trl.generation.vllm_common.BAN` on their logits.
        weights_version: changes when the training weights have (the global step); they are pushed only then.
    """

    def __init__(
        self,
        engine: ColocatedEngine,
        *,
        image_token_id: int,
        eos_token_ids: Sequence[int],
        banned_ids: Sequence[int],
        weights_version: Callable[[], int],
    ):
        self.engine = engine
        self.group = engine.group
        self.image_token_id = image_token_id
        self.eos_token_ids = list(eos_token_ids)
        self.banned_ids = list(banned_ids)
        self.weights_version = weights_version
        self._pushed: int | None = None
        self._settings = SamplingSettings()
        self._phase = ExitStack()
        self._names = count()  # vLLM's own request ids; the caller may reuse a sample's id for its next turn
        self._running: dict[str, Request] = {}
        self._ready: deque[Sample] = deque()
        self._image_id = ImageIds()

    def begin(self, settings: SamplingSettings) -> None:
        self._phase.close()  # what an interrupted phase may have left
        self._abort()
        version = self.weights_version()
        self.engine.wake(stale=version != self._pushed)
        self._pushed, self._settings = version, settings
        self._phase.enter_context(self.group.same_random_numbers())

    def submit(self, request: Request) -> None:
        """Raises RuntimeError when there are not as many pictures as placeholder runs, or vLLM refuses the request."""
        runs = placeholder_runs(request.token_ids, self.image_token_id)
        with self._aborting(f"taking request {request.request_id} of {len(request.token_ids)} tokens"):
            if len(runs) != len(request.images):
                raise RuntimeError(f"{len(runs)} runs of image placeholders for {len(request.images)} images")
            prompt: dict[str, Any] = {"prompt_token_ids": collapse_runs(request.token_ids, self.image_token_id)}
            if request.images:
                prompt["multi_modal_data"] = {"image": list(request.images)}
                prompt["multi_modal_uuids"] = {"image": [self._image_id(image) for image in request.images]}
            name = str(next(self._names))
            self.engine.llm.llm_engine.add_request(name, prompt, self._sampling_params(request))
            self._running[name] = request

    def completed(self) -> Iterator[Sample]:
        """Raises RuntimeError when the engine fails or saw other image tokens than we did; nothing is left running."""
        core = self.engine.llm.llm_engine
        while self._running or self._ready:
            while self._ready:
                yield self._ready.popleft()  # the caller may submit here
            with self._aborting(f"sampling {len(self._running)} turns"):
                if self._running and not core.has_unfinished_requests():
                    raise RuntimeError(f"requests {[r.request_id for r in self._running.values()]} vanished")
                outputs = core.step() if self._running else []
                self._ready.extend(self._sample(output) for output in outputs if output.finished)

    def end(self) -> None:
        self._phase.close()
        self._abort()
        self._image_id.clear()
        self.engine.sleep()

    def _sampling_params(self, request: Request) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        fields = sampling_fields(self._settings, request, self.eos_token_ids, self.banned_ids)
        return SamplingParams(**fields, output_kind=RequestOutputKind.FINAL_ONLY)

    def _sample(self, output: Any) -> Sample:
        """vLLM's output as ours, after checking that it saw the very tokens that training will see."""
        request, completion = self._running.pop(output.request_id), output.outputs[0]
        if tuple(output.prompt_token_ids) != tuple(request.token_ids):
            ours, theirs = (
                placeholder_runs(ids, self.image_token_id) for ids in (request.token_ids, output.prompt_token_ids)
            )
            raise RuntimeError(
                f"request {request.request_id}: its images take {ours} placeholder tokens here and {theirs} in vLLM "
                f"({len(request.token_ids)} and {len(output.prompt_token_ids)} tokens in all): vLLM saw pictures "
                "that training would not. Give both image processors the same size limits (mm_processor_kwargs)."
            )
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"request {request.request_id}: vLLM gave it up ({completion.finish_reason})")
        ids = tuple(completion.token_ids)
        values = [entry[token].logprob for token, entry in zip(ids, completion.logprobs, strict=True)]
        logprobs = tuple(None if math.isnan(value) else value for value in values)
        return Sample(request.request_id, ids, logprobs, completion.finish_reason == "stop")

    @contextmanager
    def _aborting(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._abort()
            raise RuntimeError(f"vLLM failed while {doing}, and all turns were aborted: {error}") from error

    def _abort(self) -> None:
        names, self._running = list(self._running), {}
        self._ready.clear()
        if names:
            self.engine.llm.llm_engine.abort_request(names)


def collapse_runs(token_ids: Sequence[int], image_token_id: int) -> list[int]:
    """One placeholder per image, as vLLM wants it. Images that touch stay apart: end and start tokens lie between."""
    return [
        token
        for index, token in enumerate(token_ids)
        if token != image_token_id or index == 0 or token_ids[index - 1] != image_token_id
    ]
