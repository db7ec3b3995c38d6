"""What a rollout needs from a generation backend: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn. ``temperature == 0`` means greedy, in every turn.

    Without ``seed`` all turns draw from the backend's own random state, one after the other. With it each turn has a
    stream of its own (:attr:`Request.seed`), so that what a row gets does not depend on its neighbours.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True)
class Request:
    """One turn to sample: the whole context so far and its pictures in the order of their placeholder runs.

    ``token_ids`` (L,) holds one placeholder token per visual token, already expanded. ``stop``: texts that end
    sampling as soon as one is written, on top of the stop tokens; the token that completes it is kept whole.
    """

    request_id: int
    token_ids: tuple[int, ...]
    images: tuple[Image.Image, ...]
    max_new_tokens: int
    seed: int | None = None  # of the draws of this turn; None: the backend's own random state
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A sampled turn. ``token_ids`` (T,) as sampled, with the stop token; ``logprobs`` (T,) of that distribution.

    Where a stop text ended it, the last token is the one that completed the text.
    """

    request_id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    finished: bool  # False: cut at max_new_tokens


class Backend(Protocol):
    """A turn is submitted and later completed, in any order.

    A backend that can only work in rounds runs everything submitted so far on the first ``completed()`` call;
    one that can do better lets a sample's next turn start while others still run. No backend may sample the model
    family's vision placeholders.
    """

    def begin(self, settings: SamplingSettings) -> None:
        """Called before the first request of a rollout phase: wake up, push weights, reset caches."""

    def submit(self, request: Request) -> None: ...

    def completed(self) -> Iterator[Sample]:
        """Yield finished samples until nothing is left; ``submit`` may be called between two of them."""

    def end(self) -> None:
        """Called after the last sample of a rollout phase: sleep, free memory."""


@dataclass
class ScriptedBackend:
    """A backend that plays back fixed token ids, for tests and for ``vt-trl play``: ``script(request) -> Sample``."""

    script: object
    _pending: list[Request] = field(default_factory=list)

    def begin(self, settings: SamplingSettings) -> None:
        self.settings = settings

    def submit(self, request: Request) -> None:
        self._pending.append(request)

    def completed(self) -> Iterator[Sample]:
        while self._pending:
            yield self.script(self._pending.pop(0))

    def end(self) -> None:
        self._pending.clear()
