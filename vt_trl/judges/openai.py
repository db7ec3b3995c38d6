"""A judge behind an OpenAI-compatible endpoint or Azure, through the official client.

Key, base URL, endpoint and API version come from the environment as that client reads them (``OPENAI_API_KEY``,
``OPENAI_BASE_URL``; ``AZURE_OPENAI_API_KEY``, ``AZURE_OPENAI_ENDPOINT``, ``OPENAI_API_VERSION``); a recipe ends up in
checkpoints and logs and is no place for a key. Whatever the server does, a case ends in right, wrong or failed.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vt_trl.errors import ConfigError
from vt_trl.judges.base import Case, Judge, Judgement
from vt_trl.judges.pacing import GiveUp, Pace, TryAgain, retry_after
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
from vt_trl.judges.redact import redacted

logger = logging.getLogger(__name__)

_TRANSIENT = {408, 409, 425, 429}  # and all from 500
_SPENT = {"insufficient_quota", "billing_hard_limit_reached"}  # a 429 that no waiting mends
_FILTERED = {"content_filter", "content_policy_violation"}
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
        if api not in ("openai", "azure"):
            raise ConfigError(f"judge_args.api is {api!r}; it must be openai or azure.")
        if "api_key" in (request_args or {}):
            raise ConfigError("judge_args.request_args holds a key; put it into the environment (OPENAI_API_KEY).")
        self.model, self.api, self.base_url = model, api, base_url
        self.structured, self.timeout = structured, timeout
        self.temperature, self.max_reply_tokens = temperature, max_reply_tokens
        self.request_args = dict(request_args or {})
        self.rubric = rubric
        self.limits = Limits(max_prediction_chars, max_question_chars, max_gold_chars)
        self._pace = Pace(concurrency, requests_per_minute, tokens_per_minute, timeout, max_attempts, max_wait)
        self._client: Any = None
        self._secrets: list[str] = []

    def open(self) -> None:
        """Build the client. Raises ConfigError without the openai package or without a key."""
        if self._client is not None:
            return
        try:
            import openai
        except ImportError as error:
            raise ConfigError(
                "judge is openai, but the openai package is missing: pip install 'vt-trl[judge]'."
            ) from error
        kind = openai.AsyncAzureOpenAI if self.api == "azure" else openai.AsyncOpenAI
        target = {"base_url": self.base_url} if self.base_url and self.api == "openai" else {}
        target |= {"azure_endpoint": self.base_url} if self.base_url and self.api == "azure" else {}
        try:
            # Retries are ours: the client would not count them, nor share a Retry-After between requests.
            self._client = kind(max_retries=0, timeout=self.timeout, **target)
        except (openai.OpenAIError, ValueError) as error:
            keys = "AZURE_OPENAI_API_KEY, AZURE_OPENAI_ENDPOINT and OPENAI_API_VERSION"
            needed = keys if self.api == "azure" else "OPENAI_API_KEY (any text for a local server without one)"
            raise ConfigError(f"judge is openai, but its client does not start. Set {needed}.") from error
        tokens = (self._client.api_key, self._client.base_url.password, getattr(self._client, "_azure_ad_token", None))
        self._secrets = [text for text in tokens if text]

    def fingerprint(self) -> dict[str, Any]:
        where = str(self._client.base_url) if self._client is not None else str(self.base_url)
        return {
            "name": self.name,
            "model": self.model,
            "endpoint": hashlib.blake2b(where.encode(), digest_size=8).hexdigest(),
            "prompt": PROMPT_VERSION,
            "rubric": self.rubric,
            "structured": self.structured,
            "temperature": self.temperature,
            "max_reply_tokens": self.max_reply_tokens,
            "request_args": self.request_args,
            "limits": [self.limits.prediction, self.limits.question, self.limits.gold],
        }

    def counts(self) -> Counter[str]:
        return self._pace.counts

    async def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        self.open()
        return list(await asyncio.gather(*map(self._judge, cases)))

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

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
            return await self._pace.run(lambda: self._attempt(case, text), tokens)
        except (TryAgain, GiveUp) as error:
            return Judgement.failed(str(error))

    async def _attempt(self, case: Case, text: str) -> Judgement:
        structured = self.structured
        try:
            async with asyncio.timeout(self.timeout):  # the client's own limit is per chunk, and a drip has many
                completion = await self._client.chat.completions.create(**self._request(text, structured))
        except Exception as error:
            raise self._meaning(error, structured) from None  # the original holds the request, and that the key
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

    def _meaning(self, error: Exception, structured: bool) -> Exception:
        """What an exception of the client means for this case: try again or give up."""
        import openai

        said = redacted(str(error), self._secrets)
        if isinstance(error, (TimeoutError, openai.APITimeoutError)):
            return TryAgain(f"no reply within {self.timeout} s")
        if isinstance(error, openai.APIStatusError):
            status, code = error.status_code, str(error.code or "")
            if code in _FILTERED:
                return GiveUp("refused by the content filter")
            if code in _SPENT:
                return GiveUp(f"HTTP {status}: {said}")
            if status in (400, 422) and structured and ("response_format" in said or "json_schema" in said):
                if self.structured:
                    logger.warning(f"{self.model} refuses structured output; it is asked for plain text from now on.")
                self.structured = False
                return TryAgain("structured output refused", after=0.0)
            if status in _TRANSIENT or status >= 500:
                return TryAgain(
                    f"HTTP {status}: {said}", after=retry_after(error.response.headers), shared=status == 429
                )
            return GiveUp(f"HTTP {status}: {said}")
        if isinstance(error, openai.APIConnectionError):
            return TryAgain(f"connection: {said} ({redacted(repr(error.__cause__), self._secrets)})")
        if isinstance(error, (openai.APIResponseValidationError, ValueError)):
            return TryAgain(f"no chat completion: {said}")
        return GiveUp(f"{type(error).__name__}: {said}")

    def _read(self, completion: Any, case: Case, structured: bool) -> Judgement:
        choices = getattr(completion, "choices", None)
        if not isinstance(choices, list) or not choices:
            raise TryAgain(f"no chat completion: {redacted(str(completion), self._secrets)}")
        verdicts = set()
        for choice in choices:
            message = getattr(choice, "message", None)
            if getattr(message, "refusal", None):
                raise GiveUp("the judge refused")
            if getattr(choice, "finish_reason", None) == "content_filter":
                raise GiveUp("refused by the content filter")
            text = getattr(message, "content", None)
            if not isinstance(text, str):
                raise TryAgain("a reply without text")
            try:
                verdicts.add(read_json_reply(text, case) if structured else read_plain_reply(text, case))
            except Unreadable as error:
                raise TryAgain(f"unreadable reply, {redacted(str(error), self._secrets)}") from None
        if len(verdicts) > 1:
            raise TryAgain("choices that contradict each other")
        return Judgement.of(verdicts.pop())
