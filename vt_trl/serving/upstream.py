"""Who plays the episodes: a model behind a chat-completions server (vLLM), which is asked once per turn."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

from vt_trl.dialogue import Dialogue, chat_messages, refuse_inline
from vt_trl.envs import Environment
from vt_trl.errors import ConfigError
from vt_trl.features import ImageFeatures
from vt_trl.generation.base import SamplingSettings
from vt_trl.inference import PolicyModel
from vt_trl.judges.pacing import retry_after
from vt_trl.redact import redacted
from vt_trl.serving.engine import Play, Started
from vt_trl.serving.errors import ApiError, bad_request
from vt_trl.serving.replies import Answer

KEY = "VT_TRL_UPSTREAM_API_KEY"


class UpstreamEngine:
    """Plays by chat completions with pictures as PNG ``data:`` URLs.

    Args:
        url: of the server, with its ``/v1``. Its key, if it wants one, is in ``VT_TRL_UPSTREAM_API_KEY``.
        model: its name there.
        checkpoint: the same model here, without its weights: its processor counts visual tokens, and knows the
            control tokens that the server's chat template would take for such in a question. Questions with one of
            them are refused.
    """

    def __init__(
        self,
        url: str,
        model: str,
        environment: Callable[[], Environment],
        checkpoint: PolicyModel,
        seconds: float = 300.0,
    ):
        try:
            import openai
        except ImportError as error:
            raise ConfigError("--upstream needs the openai package: pip install 'vt-trl[serve]'.") from error
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--upstream is {url!r}; give a URL such as http://127.0.0.1:8000/v1.")
        example = environment()
        refuse_inline(example)
        self.openai, self.model, self.environment, self.sampling = openai, model, environment, checkpoint.sampling
        self.processor = checkpoint.parts.processor
        self.turn_tokens = checkpoint.limits.turn
        self.most_tokens, self.most_pictures = self.turn_tokens * example.max_turns, example.max_pictures
        self._key = os.environ.get(KEY) or "none"
        self._client = openai.AsyncOpenAI(base_url=url, api_key=self._key, timeout=seconds, max_retries=1)
        added = self.processor.tokenizer.added_tokens_decoder.values()
        self._control = sorted(token.content for token in added if token.special)
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Nothing to load: the server has the model."""

    @property
    def healthy(self) -> bool:
        return True

    def play(self, row: dict[str, Any], settings: SamplingSettings, max_tokens: int | None) -> Play:
        play = Play()
        task = asyncio.ensure_future(self._run(play, row, settings, max_tokens))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        play.on_close = task.cancel
        return play

    async def close(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._client.close()

    async def _run(self, play: Play, row: dict[str, Any], settings: SamplingSettings, max_tokens: int | None) -> None:
        try:
            await self._episode(play, row, settings, max_tokens or self.most_tokens)
        except Exception as error:
            play.tell(self._meaning(error))

    async def _episode(self, play: Play, row: dict[str, Any], settings: SamplingSettings, tokens: int) -> None:
        if any(token in row["question"] for token in self._control):
            raise bad_request("The question holds a control token of the model; take it out.", "bad_question")
        dialogue = await asyncio.to_thread(Dialogue, self.environment(), row)
        features = ImageFeatures(self.processor.image_processor)
        visual, counted, read, written = 0, 0, 0, 0
        play.tell(Started())
        while dialogue.end is None:
            new = dialogue.images[counted:]
            visual += await asyncio.to_thread(lambda new=new: sum(map(features.visual_tokens, new)))
            counted += len(new)
            messages = await asyncio.to_thread(chat_messages, dialogue.messages)
            room = min(self.turn_tokens, tokens - written)
            text, cut, prompt, sampled = await self._turn(messages, settings, room)
            read, written = prompt - written, written + sampled  # a turn's prompt holds the turns before it
            dialogue.say(text, truncated=cut)
            play.tell(dialogue.turns[-1])
            if dialogue.end is None and written >= tokens:
                dialogue.stop("no token is left for another turn")
        rollout = dialogue.rollout()
        rollout.visual_tokens = visual
        play.tell(Answer(rollout, read, written))

    async def _turn(
        self, messages: list[dict[str, Any]], settings: SamplingSettings, room: int
    ) -> tuple[str, bool, int, int]:
        """Text, whether it was cut, and the tokens of prompt and reply."""
        reply = await self._client.chat.completions.create(
            model=self.model,
            messages=messages,
            max_tokens=room,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            # Or the server would take these from the checkpoint's settings for chatting.
            extra_body={"top_k": 0, "min_p": 0.0, "repetition_penalty": self.sampling.repetition_penalty},
        )
        if not reply.choices or not isinstance(reply.choices[0].message.content, str) or reply.usage is None:
            raise ApiError(502, "The model server sent no usable reply.", "upstream_error")
        choice = reply.choices[0]
        cut = choice.finish_reason == "length"
        return choice.message.content, cut, reply.usage.prompt_tokens, reply.usage.completion_tokens

    def _meaning(self, error: Exception) -> Exception:
        """What our client is told of an error of theirs; never an address or a key."""
        openai = self.openai
        if isinstance(error, openai.APITimeoutError):
            return ApiError(504, "The model server did not answer in time.", "timeout")
        if isinstance(error, openai.RateLimitError):
            after = retry_after(error.response.headers)
            return ApiError(429, "The model server is busy.", "busy", retry_after=max(1, round(after or 1)))
        if isinstance(error, openai.APIStatusError):
            said = redacted(str(error), [self._key])
            return ApiError(502, f"The model server refused a turn: {said}", "upstream_error")
        if isinstance(error, openai.APIError):
            return ApiError(502, "The model server cannot be reached.", "upstream_error")
        return error
