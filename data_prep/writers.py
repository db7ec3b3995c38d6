"""Who writes traces: a model behind an OpenAI-compatible endpoint, or a checkpoint on this machine.

Both play the environment of training and give back finished episodes, so that a trace's status and faults are what a
rollout's would be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from vt_trl.dialogue import Dialogue, chat_messages, refuse_inline
from vt_trl.envs import Environment
from vt_trl.errors import ConfigError, DataError
from vt_trl.generation.base import SamplingSettings
from vt_trl.judges.background import BackgroundLoop
from vt_trl.judges.endpoint import Endpoint
from vt_trl.judges.pacing import GiveUp, TryAgain
from vt_trl.rollout import RolloutRunner
from vt_trl.types import Done, Observation, Rollout, TextPart

HINTS = {  # by a row's needs_full; shown to the writer only
    True: "For this picture call the tool first: say in a sentence or two what cannot be made out, and call it.",
    False: "What you see is enough for this question: reason briefly and answer without calling the tool.",
}
_PIXELS_PER_TOKEN = 750  # what a picture is taken to cost, for limits of tokens per minute


class Steered(Environment):
    """Another environment with a hint for rows that say whether they need the full picture."""

    def __init__(self, inner: Environment):
        self.inner = inner
        self.max_turns, self.max_image_pixels = inner.max_turns, inner.max_image_pixels
        self.stop_texts, self.any_pictures = inner.stop_texts, inner.any_pictures

    @property
    def max_images(self) -> int:
        return self.inner.max_images

    def goes_on(self, text: str) -> bool:
        return self.inner.goes_on(text)

    def reset(self, row: Mapping[str, Any]) -> Observation:
        first = self.inner.reset(row)
        hint = HINTS.get(row.get("needs_full"))
        if hint is None:
            return first
        *before, task = first.messages
        return replace(first, messages=(*before, replace(task, parts=(*task.parts, TextPart(f"\n\n{hint}")))))

    def step(self, reply: str, truncated: bool = False) -> Observation | Done:
        return self.inner.step(reply, truncated)

    def fork(self) -> Environment:
        return Steered(self.inner.fork())


class Writer(Protocol):
    """Writes one try per row."""

    def write(self, rows: Sequence[dict[str, Any]], attempt: int) -> list[Rollout | str]:
        """Finished episodes of decoded rows in their order, or why there is none."""

    def fingerprint(self) -> dict[str, Any]:
        """What its traces depend on (JSON values), without a key or an address, which a restart may change."""

    def close(self) -> None:
        """Give back connections and memory."""


class EndpointWriter:
    """A model behind a chat-completions endpoint; pictures travel as lossless ``data:`` URLs.

    ``settings`` are those of :class:`~vt_trl.judges.endpoint.Endpoint` and ``request_args``, more fields of a request.
    """

    def __init__(
        self,
        model: str,
        environment: Callable[[], Environment],
        temperature: float | None,
        max_turn_tokens: int,
        request_args: dict[str, Any] | None = None,
        **settings: Any,
    ):
        if "api_key" in {**settings, **(request_args or {})}:
            raise ConfigError("the endpoint's settings hold a key; put it into the environment (OPENAI_API_KEY).")
        try:
            self.endpoint = Endpoint(user="the writer is openai", **settings)
        except TypeError as error:
            raise ConfigError(f"--endpoint-args do not fit: {error}.") from error
        refuse_inline(environment())
        self.model, self.environment, self.temperature = model, environment, temperature
        self.max_turn_tokens, self.request_args = max_turn_tokens, dict(request_args or {})
        self.endpoint.open()
        self._loop = BackgroundLoop("vt_trl writer")

    def fingerprint(self) -> dict[str, Any]:
        return {
            "writer": "openai",
            "model": self.model,
            "temperature": self.temperature,
            "max_turn_tokens": self.max_turn_tokens,
            "request_args": self.request_args,
        }

    def write(self, rows: Sequence[dict[str, Any]], attempt: int) -> list[Rollout | str]:
        async def all_rows() -> list[Rollout | str]:
            return await asyncio.gather(*map(self._episode, rows))

        return self._loop.submit(all_rows()).result()

    def close(self) -> None:
        self._loop.submit(self.endpoint.close()).result()
        self._loop.stop()

    async def _episode(self, row: dict[str, Any]) -> Rollout | str:
        dialogue = Dialogue(self.environment(), row)
        try:
            while dialogue.end is None:
                dialogue.say(*await self._reply(dialogue))
        except (TryAgain, GiveUp) as error:
            return str(error)
        return dialogue.rollout()

    async def _reply(self, dialogue: Dialogue) -> tuple[str, bool]:
        """The next reply, and whether the token limit cut it."""
        request = {"model": self.model, "messages": chat_messages(dialogue.messages)}
        if "max_completion_tokens" not in self.request_args:
            request["max_tokens"] = self.max_turn_tokens
        if self.temperature is not None:
            request["temperature"] = self.temperature
        if self.request_args:
            request["extra_body"] = self.request_args
        letters = sum(len(one.text) for one in dialogue.messages)
        pixels = sum(image.width * image.height for image in dialogue.images)
        cost = letters // 3 + pixels // _PIXELS_PER_TOKEN + self.max_turn_tokens

        async def attempt() -> tuple[str, str]:
            return self.endpoint.choices(await self.endpoint.complete(request))[0]

        text, reason = await self.endpoint.run(attempt, cost)
        return text.strip(), reason == "length"


class LocalWriter:
    """A checkpoint on this machine, through the rollout loop of training."""

    def __init__(self, runner: RolloutRunner, settings: SamplingSettings, about: Mapping[str, Any]):
        self.runner, self.settings, self.about = runner, settings, dict(about)

    def fingerprint(self) -> dict[str, Any]:
        return self.about

    def write(self, rows: Sequence[dict[str, Any]], attempt: int) -> list[Rollout | str]:
        self.runner.encoder.features.clear()
        refused: dict[int, str] = {}
        seed = None if self.settings.seed is None else self.settings.seed + attempt
        numbered = [{**row, "place": place} for place, row in enumerate(rows)]

        def refuse(row: dict[str, Any], error: DataError) -> None:
            refused[row["place"]] = error.reason

        found = iter(self.runner.run(numbered, 1, replace(self.settings, seed=seed), on_refused=refuse))
        return [refused[place] if place in refused else next(found) for place in range(len(rows))]

    def close(self) -> None:
        """The process ends soon."""
