"""Replies of a checkpoint on this machine: a vision-language model through the rollout loop, or a text-only model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.speaking import Ask, Said
from data_prep.work import model_print
from vt_trl.envs import Environment
from vt_trl.errors import ConfigError, DataError
from vt_trl.generation.base import SamplingSettings
from vt_trl.generation.standalone import close_engine
from vt_trl.rollout import turn_seed
from vt_trl.types import Done, Observation, RolloutStatus

_SETTINGS = ("backend", "device", "dtype", "gpu_memory_utilization", "max_batch", "revision")


class SaysOnce(Environment):
    """Shows the ``messages`` of its row and ends with the reply, whatever it is."""

    any_pictures = True

    def __init__(self, max_pixels: int | None = None):
        self.max_image_pixels = max_pixels

    def reset(self, row: Mapping[str, Any]) -> Observation:
        return Observation(tuple(row["messages"]))

    def step(self, reply: str, truncated: bool = False) -> Done:
        return Done(RolloutStatus.TRUNCATED if truncated else RolloutStatus.ANSWERED, answer=reply)


class LocalSpeaker:
    """A checkpoint, loaded when it is first asked. ``settings``: of :class:`~vt_trl.generation.standalone.Checkpoint`,
    and for a text-only model ``context`` (tokens) and ``chat_template`` (settings of its template).

    ``max_pixels``: of a picture it is shown; None for texts alone. Messages are a system text and a user's.
    """

    def __init__(
        self,
        model: str,
        option: str,
        temperature: float,
        max_tokens: int,
        seed: int,
        max_pixels: int | None,
        settings: Mapping[str, Any],
    ):
        from vt_trl.generation.standalone import Checkpoint
        from vt_trl.generation.text import text_checkpoint

        settings = dict(settings)
        self.template, self.context = settings.pop("chat_template", {}), settings.pop("context", 16_384)
        unknown = sorted(set(settings) - set(_SETTINGS))
        if unknown or not isinstance(self.template, dict):
            wrong = unknown[0] if unknown else "chat_template"
            raise ConfigError(
                f"{option}: {wrong} does not fit a local model; it takes {', '.join(_SETTINGS)}, context (tokens) "
                f"and chat_template (a mapping)."
            )
        self.checkpoint = Checkpoint(model, **settings)
        self.temperature, self.max_tokens, self.seed, self.max_pixels = temperature, max_tokens, seed, max_pixels
        self.text_only = text_checkpoint(self.checkpoint)
        if self.text_only and max_pixels is not None:
            raise ConfigError(
                f"{model!r} is no vision-language model of a family that is known here, so it cannot see a picture. "
                f"Name a Qwen2.5-VL or Qwen3-VL, or serve it and use an endpoint."
            )
        self._open: Any = None

    def fingerprint(self) -> dict[str, Any]:
        return {
            "model": model_print(self.checkpoint.model),
            "revision": self.checkpoint.revision,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "dtype": self.checkpoint.torch_dtype,
            "chat_template": self.template,
        }

    def identity(self) -> dict[str, Any]:
        return self.fingerprint()

    def say(self, asks: Sequence[Ask]) -> list[Said | str]:
        self._open = self._open or self._load()
        settings = SamplingSettings(temperature=self.temperature, seed=self.seed)
        return self._texts(asks, settings) if self.text_only else self._episodes(asks, settings)

    def close(self) -> None:
        """Give the weights up, so that the next model has room; vLLM's process ends."""
        model, self._open = self._open, None
        close_engine(getattr(model, "backend", None))

    def _load(self) -> Any:
        from vt_trl.generation.standalone import open_runner
        from vt_trl.generation.text import TextModel
        from vt_trl.rollout import Limits

        if self.text_only:
            return TextModel(self.checkpoint, self.max_tokens, self.context, **self.template)
        return open_runner(
            self.checkpoint, lambda: SaysOnce(self.max_pixels), Limits(self.max_tokens, self.max_tokens)
        )

    def _texts(self, asks: Sequence[Ask], settings: SamplingSettings) -> list[Said | str]:
        prompts = [(ask.messages[0].text, ask.messages[-1].text) for ask in asks]
        seeds = [turn_seed(self.seed, ask.id, ask.sample, ()) for ask in asks]
        said = self._open.sample(prompts, seeds, settings)
        return [one if isinstance(one, str) else Said(one.text.strip(), one.cut, one.prompt_tokens, one.tokens)
                for one in said]  # fmt: skip

    def _episodes(self, asks: Sequence[Ask], settings: SamplingSettings) -> list[Said | str]:
        self._open.encoder.features.clear()
        replies: list[Said | str] = [""] * len(asks)

        def refuse(row: dict[str, Any], error: DataError) -> None:
            replies[row["place"]] = error.reason

        rows = [
            {"id": f"{ask.id}#{ask.sample}", "messages": ask.messages, "place": place}
            for place, ask in enumerate(asks)
        ]
        for rollout in self._open.run(rows, 1, settings, on_refused=refuse):
            turn = rollout.turns[0]
            replies[rollout.row["place"]] = Said(
                turn.text.strip(), not turn.finished, len(rollout.prompt_ids), len(turn.token_ids)
            )
        return replies
