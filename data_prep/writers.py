"""Who writes traces: a model behind an OpenAI-compatible endpoint, or a checkpoint on this machine.

Both play the environment of training and give back finished episodes, so that a trace's status and faults are what a
rollout's would be.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from data_prep.speaking import EndpointSpeaker, Said, count_tokens
from vt_trl.dialogue import Dialogue, refuse_inline
from vt_trl.envs import Environment
from vt_trl.errors import DataError
from vt_trl.generation.base import SamplingSettings
from vt_trl.generation.standalone import close_engine
from vt_trl.judges.pacing import GiveUp, TryAgain
from vt_trl.rollout import RolloutRunner
from vt_trl.types import Done, Observation, Rollout, TextPart

HINTS = {  # by a row's needs_full; shown to the writer only
    True: "For this picture call the tool first: say in a sentence or two what cannot be made out, and call it.",
    False: "What you see is enough for this question: reason briefly and answer without calling the tool.",
}


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
    """Writes tries at rows. ``counts``: what it has counted since somebody cleared them, such as tokens."""

    counts: Counter[str]

    def write(self, rows: Sequence[dict[str, Any]], attempt: int, samples: int = 1) -> list[list[Rollout | str]]:
        """``samples`` finished episodes of each decoded row, drawn each for itself, or why there is none."""

    def fingerprint(self) -> dict[str, Any]:
        """What its traces depend on (JSON values), without a key or an address, which a restart may change."""

    def close(self) -> None:
        """Give back connections and memory."""


class EndpointWriter:
    """A model behind a chat-completions endpoint plays the environment.

    ``speaker``: replies turn by turn. With several samples each has a ``seed`` of its own, from ``seed``.
    """

    def __init__(self, speaker: EndpointSpeaker, environment: Callable[[], Environment], seed: int = 0):
        refuse_inline(environment())
        self.speaker, self.environment, self.seed = speaker, environment, seed
        self.counts: Counter[str] = Counter()

    def fingerprint(self) -> dict[str, Any]:
        return {"writer": "openai", **self.speaker.fingerprint()}

    def write(self, rows: Sequence[dict[str, Any]], attempt: int, samples: int = 1) -> list[list[Rollout | str]]:
        async def all_rows() -> list[Rollout | str]:
            seeds = [None] if samples == 1 else [self.seed * 1000 + attempt] * samples
            tries = [self._episode(row, sample, seed) for row in rows for sample, seed in enumerate(seeds)]
            return await asyncio.gather(*tries)

        return grouped(self.speaker.wait_for(all_rows()), samples)

    def close(self) -> None:
        self.speaker.close()

    async def _episode(self, row: dict[str, Any], sample: int, seed: int | None) -> Rollout | str:
        dialogue = Dialogue(self.environment(), row)
        try:
            while dialogue.end is None:
                id, turn = str(row.get("id")), len(dialogue.turns)
                said = await self.speaker.reply(dialogue.messages, seed, id, sample, turn)
                count_tokens(self.counts, "writer", said)
                dialogue.say(said.text, said.cut)
        except (TryAgain, GiveUp) as error:
            return str(error)
        return dialogue.rollout()


class LocalWriter:
    """A checkpoint on this machine, through the rollout loop of training; ``load`` is called at the first row."""

    def __init__(self, load: Callable[[], RolloutRunner], settings: SamplingSettings, about: Mapping[str, Any]):
        self.load, self.settings, self.about = load, settings, dict(about)
        self.counts: Counter[str] = Counter()
        self._runner: RolloutRunner | None = None

    def fingerprint(self) -> dict[str, Any]:
        return self.about

    def write(self, rows: Sequence[dict[str, Any]], attempt: int, samples: int = 1) -> list[list[Rollout | str]]:
        self._runner = self._runner or self.load()
        self._runner.encoder.features.clear()
        refused: dict[int, str] = {}
        seed = None if self.settings.seed is None else self.settings.seed + attempt
        numbered = [{**row, "place": place} for place, row in enumerate(rows)]

        def refuse(row: dict[str, Any], error: DataError) -> None:
            refused[row["place"]] = error.reason

        # The members of a group have streams of their own, so that samples differ.
        found = iter(self._runner.run(numbered, samples, replace(self.settings, seed=seed), on_refused=refuse))
        groups: list[list[Rollout | str]] = []
        for place in range(len(rows)):
            refusal = refused.get(place)
            groups.append([refusal or next(found) for _ in range(samples)])
        for rollout in (one for group in groups for one in group if not isinstance(one, str)):
            tokens = sum(len(turn.token_ids) for turn in rollout.turns)
            count_tokens(self.counts, "writer", Said("", False, len(rollout.prompt_ids), tokens))
        return groups

    def close(self) -> None:
        """Give the weights up, so that the next model has room; vLLM's process ends."""
        runner, self._runner = self._runner, None
        close_engine(getattr(runner, "backend", None))


def grouped(tries: Sequence[Rollout | str], samples: int) -> list[list[Rollout | str]]:
    """Tries of rows side by side, ``samples`` to each row."""
    return [list(tries[at : at + samples]) for at in range(0, len(tries), samples)]
