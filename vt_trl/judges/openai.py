"""A judge behind an OpenAI-compatible endpoint or Azure, through the official client.

The client, its limits and its key: :mod:`vt_trl.judges.endpoint`. Whatever the server does, a case ends in right,
wrong or failed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vt_trl.errors import ConfigError
from vt_trl.judges.base import Case, Judge, Judgement
from vt_trl.judges.endpoint import Endpoint, RefusedFormat
from vt_trl.judges.pacing import GiveUp, TryAgain
from vt_trl.judges.prompt import (
    JSON_REPLY,
    PLAIN_REPLY,
    PROMPT_VERSION,
    RUBRIC,
    SCHEMA,
    Limits,
    Unreadable,
    case_with_code,
    read_json_reply,
    read_plain_reply,
)

logger = logging.getLogger(__name__)

_RESPONSE_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA},
}


class OpenAIJudge(Judge):
    """Asks a chat-completions endpoint for one verdict per case.

    Args:
        model: name at the endpoint; on Azure the deployment.
        api: ``openai`` (and everything compatible) or ``azure``.
        base_url: overrides the environment's; for a local server, say.
        concurrency, requests_per_minute, tokens_per_minute: limits of the whole job, shared out among its processes.
        timeout: seconds until a request is given up, a dripping reply included.
        max_attempts: requests per case at most.
        max_wait: longest pause in seconds between two attempts; a server that asks for more has failed.
        structured: ask for a JSON schema. A server that refuses it is asked for a line of text from then on.
        temperature: None leaves it to the server.
        max_reply_tokens: of the reply; raise it for a model that thinks first.
        request_args: more fields of the request body, e.g. ``{chat_template_kwargs: {enable_thinking: false}}``.
        rubric: replaces the text that says what is right (:data:`vt_trl.judges.prompt.RUBRIC`).
        max_prediction_chars, max_question_chars, max_gold_chars: see :class:`vt_trl.judges.prompt.Limits`.
    """

    name = "openai"
    remote = True

    def __init__(
        self,
        model: str = "gpt-4o",
        api: str = "openai",
        base_url: str | None = None,
        concurrency: int = 64,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        timeout: float = 60.0,
        max_attempts: int = 6,
        max_wait: float = 60.0,
        structured: bool = True,
        temperature: float | None = 0.0,
        max_reply_tokens: int = 64,
        request_args: dict[str, Any] | None = None,
        rubric: str = RUBRIC,
        max_prediction_chars: int = Limits.prediction,
        max_question_chars: int = Limits.question,
        max_gold_chars: int = Limits.gold,
    ):
        if "api_key" in (request_args or {}):
            raise ConfigError("judge_args.request_args holds a key; put it into the environment (OPENAI_API_KEY).")
        self.model, self.structured = model, structured
        self.temperature, self.max_reply_tokens = temperature, max_reply_tokens
        self.request_args = dict(request_args or {})
        self.rubric = rubric
        self.limits = Limits(max_prediction_chars, max_question_chars, max_gold_chars)
        self._endpoint = Endpoint(
            api, base_url, concurrency, requests_per_minute, tokens_per_minute, timeout, max_attempts, max_wait
        )

    def open(self) -> None:
        """Build the client. Raises ConfigError without the openai package or without a key."""
        self._endpoint.open()

    def fingerprint(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": self.model,
            "endpoint": self._endpoint.digest,
            "prompt": PROMPT_VERSION,
            "rubric": self.rubric,
            "structured": self.structured,
            "temperature": self.temperature,
            "max_reply_tokens": self.max_reply_tokens,
            "request_args": self.request_args,
            "limits": [self.limits.prediction, self.limits.question, self.limits.gold],
        }

    def counts(self) -> Counter[str]:
        return self._endpoint.counts()

    async def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        self.open()
        return list(await asyncio.gather(*map(self._judge, cases)))

    async def close(self) -> None:
        await self._endpoint.close()

    def without_asking(self, case: Case) -> Judgement | None:
        """The judgement of a case that no server needs to see; None for all others."""
        return self.limits.check(case)

    def text(self, case: Case) -> str:
        """What the server reads of a case, its code included. A subclass that asks something else overrides it."""
        return case_with_code(case)

    async def _judge(self, case: Case) -> Judgement:
        early = self.without_asking(case)
        if early is not None:
            return early
        text = self.text(case)
        tokens = (len(self.rubric.encode()) + len(text.encode())) // 3 + self.max_reply_tokens
        try:
            return await self._endpoint.run(lambda: self._attempt(case, text), tokens)
        except (TryAgain, GiveUp) as error:
            return Judgement.failed(str(error))

    async def _attempt(self, case: Case, text: str) -> Judgement:
        structured = self.structured
        try:
            completion = await self._endpoint.complete(self._request(text, structured))
        except RefusedFormat:
            if not structured:
                raise
            if self.structured:
                logger.warning(f"{self.model} refuses structured output; it is asked for plain text from now on.")
            self.structured = False
            raise TryAgain("structured output refused", after=0.0) from None
        return self._read(completion, case, structured)

    def _request(self, text: str, structured: bool) -> dict[str, Any]:
        format_words = JSON_REPLY if structured else PLAIN_REPLY
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": f"{self.rubric}\n{format_words}"},
                {"role": "user", "content": text},
            ],
            "max_tokens": self.max_reply_tokens,
        }
        if structured:
            request["response_format"] = _RESPONSE_FORMAT
        if self.temperature is not None:
            request["temperature"] = self.temperature
        if self.request_args:
            if "max_completion_tokens" in self.request_args:  # newer models refuse the old name
                del request["max_tokens"]
            request["extra_body"] = self.request_args
        return request

    def _read(self, completion: Any, case: Case, structured: bool) -> Judgement:
        verdicts = set()
        for text, _ in self._endpoint.choices(completion):
            try:
                verdicts.add(read_json_reply(text, case) if structured else read_plain_reply(text, case))
            except Unreadable as error:
                raise TryAgain(f"unreadable reply, {self._endpoint.redacted(str(error))}") from None
        if len(verdicts) > 1:
            raise TryAgain("choices that contradict each other")
        return Judgement.of(verdicts.pop())
