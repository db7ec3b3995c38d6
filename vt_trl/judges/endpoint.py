"""A chat-completions endpoint through the official client: paced, retried, and with keys kept out of every text.

Key, base URL, endpoint and API version come from the environment as that client reads them (``OPENAI_API_KEY``,
``OPENAI_BASE_URL``; ``AZURE_OPENAI_API_KEY``, ``AZURE_OPENAI_ENDPOINT``, ``OPENAI_API_VERSION``); a recipe ends up in
checkpoints and logs and is no place for a key.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from vt_trl.errors import ConfigError
from vt_trl.judges.pacing import GiveUp, Pace, TryAgain, retry_after
from vt_trl.redact import redacted

T = TypeVar("T")
_TRANSIENT = {408, 409, 425, 429}  # and all from 500
_SPENT = {"insufficient_quota", "billing_hard_limit_reached"}  # a 429 that no waiting mends
_THOUGHTS = ("reasoning_content", "reasoning")  # where servers put what a model thinks
_FILTERED = {"content_filter", "content_policy_violation"}


class Endpoint:
    """A client of one endpoint; for the arguments see :class:`vt_trl.judges.openai.OpenAIJudge`.

    ``user``: who asks and how to install what it needs, for messages: ``judge is openai``.
    """

    def __init__(
        self,
        api: str = "openai",
        base_url: str | None = None,
        concurrency: int = 64,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        timeout: float = 60.0,
        max_attempts: int = 6,
        max_wait: float = 60.0,
        user: str = "judge is openai",
    ):
        if api not in ("openai", "azure"):
            raise ConfigError(f"api is {api!r}; it must be openai or azure.")
        self.api, self.base_url, self.timeout, self.user = api, base_url, timeout, user
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
                f"{self.user}, but the openai package is missing: pip install 'vt-trl[judge]'."
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
            raise ConfigError(f"{self.user}, but its client does not start. Set {needed}.") from error
        tokens = (self._client.api_key, self._client.base_url.password, getattr(self._client, "_azure_ad_token", None))
        self._secrets = [text for text in tokens if text]

    @property
    def digest(self) -> str:
        """Stands for the address, which may hold a password."""
        where = str(self._client.base_url) if self._client is not None else str(self.base_url)
        return hashlib.blake2b(where.encode(), digest_size=8).hexdigest()

    def counts(self) -> Counter[str]:
        return self._pace.counts

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def run(self, attempt: Callable[[], Awaitable[T]], tokens: int) -> T:
        """The result of ``attempt`` within the limits; raises the last TryAgain, or GiveUp."""
        return await self._pace.run(attempt, tokens)

    async def complete(self, request: dict[str, Any]) -> Any:
        """One request. What the client raises becomes :meth:`meaning`."""
        try:
            async with asyncio.timeout(self.timeout):  # the client's own limit is per chunk, and a drip has many
                return await self._client.chat.completions.create(**request)
        except Exception as error:
            raise self.meaning(error) from None  # the original holds the request, and that the key

    def redacted(self, text: str) -> str:
        return redacted(text, self._secrets)

    def meaning(self, error: Exception) -> Exception:
        """What an exception of the client means: try again or give up."""
        import openai

        said = self.redacted(str(error))
        if isinstance(error, (TimeoutError, openai.APITimeoutError)):
            return TryAgain(f"no reply within {self.timeout} s")
        if isinstance(error, openai.APIStatusError):
            status, code = error.status_code, str(error.code or "")
            if code in _FILTERED:
                return GiveUp("refused by the content filter")
            if code in _SPENT:
                return GiveUp(f"HTTP {status}: {said}")
            if status in (400, 422) and ("response_format" in said or "json_schema" in said):
                return RefusedFormat(f"HTTP {status}: {said}")
            if status in _TRANSIENT or status >= 500:
                return TryAgain(
                    f"HTTP {status}: {said}", after=retry_after(error.response.headers), shared=status == 429
                )
            return GiveUp(f"HTTP {status}: {said}")
        if isinstance(error, openai.APIConnectionError):
            return TryAgain(f"connection: {said} ({self.redacted(repr(error.__cause__))})")
        if isinstance(error, (openai.APIResponseValidationError, ValueError)):
            return TryAgain(f"no chat completion: {said}")
        return GiveUp(f"{type(error).__name__}: {said}")

    def choices(self, completion: Any, thinks: bool = False) -> list[tuple[str, str]]:
        """``(text, finish_reason)`` of each choice. Raises TryAgain or GiveUp when there is none to read.

        ``thinks``: reasoning that the server keeps in a field of its own stands in think tags before the text.
        """
        choices = getattr(completion, "choices", None)
        if not isinstance(choices, list) or not choices:
            raise TryAgain(f"no chat completion: {self.redacted(str(completion))}")
        found = []
        for choice in choices:
            message = getattr(choice, "message", None)
            if getattr(message, "refusal", None):
                raise GiveUp("the model refused")
            if getattr(choice, "finish_reason", None) == "content_filter":
                raise GiveUp("refused by the content filter")
            text = getattr(message, "content", None)
            thoughts = [getattr(message, name, None) for name in _THOUGHTS]
            thought = next((one for one in thoughts if one), None)
            if thinks and isinstance(thought, str):
                text = f"<think>{thought}</think>{text or ''}"
            if not isinstance(text, str):
                raise TryAgain("a reply without text")
            found.append((text, str(choice.finish_reason)))
        return found


class RefusedFormat(GiveUp):
    """A server that knows no structured output."""
