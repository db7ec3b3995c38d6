"""How fast a remote judge is asked: concurrency, requests and tokens per minute, bounded retries, Retry-After."""

from __future__ import annotations

import asyncio
import email.utils
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from aiolimiter import AsyncLimiter
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from vt_trl.errors import ConfigError

T = TypeVar("T")
_FIRST_PAUSE = 0.5  # seconds; doubled each time, and drawn at random below that
_BURST = 11  # of a minute's requests one in so many may come at once: burst and flow together stay within the limit


class TryAgain(Exception):
    """An attempt that may succeed later. ``after``: seconds the server asked for; ``shared``: of everybody."""

    def __init__(self, detail: str, after: float | None = None, shared: bool = False):
        super().__init__(detail)
        self.after, self.shared = after, shared


class GiveUp(Exception):
    """An attempt that would fail again."""


def processes() -> int:
    """Processes of this job, as the launcher says."""
    return max(1, int(os.environ.get("WORLD_SIZE") or 1))


class Pace:
    """Runs attempts within the limits, again and again until one succeeds or ``max_attempts`` are spent.

    Limits are those of the whole job; each process keeps to its share. ``counts``: ``requests``, ``retries``,
    ``rate_limited``. Belongs to one event loop.
    """

    def __init__(
        self,
        concurrency: int,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        timeout: float,
        max_attempts: int,
        max_wait: float,
    ):
        for name, value in {"concurrency": concurrency, "timeout": timeout, "max_attempts": max_attempts}.items():
            if value <= 0:
                raise ConfigError(f"judge_args.{name} is {value}; it must be above 0.")
        for name, value in {
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
        }.items():
            if value is not None and value < 1:
                raise ConfigError(f"judge_args.{name} is {value}; it must be 1 or more, or left out for no limit.")
        share = processes()
        self.counts: Counter[str] = Counter()
        self.max_attempts, self.max_wait = max_attempts, max_wait
        self._slots = asyncio.Semaphore(max(1, concurrency // share))
        self._requests = _limiter(requests_per_minute, share)
        self._tokens = _limiter(tokens_per_minute, share)
        self._closed_until = 0.0  # when a server that said 429 to one may be asked again by all
        self._backoff = wait_random_exponential(multiplier=_FIRST_PAUSE, max=max_wait)

    async def run(self, attempt: Callable[[], Awaitable[T]], tokens: int) -> T:
        """The result of ``attempt``; ``tokens`` is what one request costs. Raises the last TryAgain, or GiveUp."""
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.max_attempts),
            wait=self._pause,
            retry=retry_if_exception_type(TryAgain),
            before_sleep=self._count_retry,
            reraise=True,
        )
        return await retrying(self._one, attempt, tokens)

    async def _one(self, attempt: Callable[[], Awaitable[T]], tokens: int) -> T:
        async with self._slots:
            while (wait := self._closed_until - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            await _acquire(self._requests, 1)
            await _acquire(self._tokens, tokens)
            self.counts["requests"] += 1
            try:
                return await attempt()
            except TryAgain as again:
                if again.after is not None and again.after > self.max_wait:
                    raise GiveUp(f"{again}; it asked to wait {again.after:.0f} s") from None
                raise

    def _pause(self, state: RetryCallState) -> float:
        again = state.outcome.exception()
        drawn = self._backoff(state)
        if again.after is None:
            return drawn
        if again.shared:
            self.counts["rate_limited"] += 1
            self._closed_until = max(self._closed_until, time.monotonic() + again.after)
        return again.after + min(drawn, again.after * 0.1)  # jitter on top: never before the server allows it

    def _count_retry(self, state: RetryCallState) -> None:
        self.counts["retries"] += 1


def _limiter(per_minute: float | None, share: int) -> AsyncLimiter | None:
    if per_minute is None:
        return None
    allowed = per_minute / share
    burst = max(1.0, allowed / _BURST)
    return AsyncLimiter(burst, 60 * burst / (allowed - burst) if allowed > burst else 60 / allowed)


async def _acquire(limiter: AsyncLimiter | None, amount: float) -> None:
    """Take ``amount`` from the limiter, in pieces when it never holds as much at once."""
    while limiter is not None and amount > 0:
        piece = min(amount, limiter.max_rate)
        await limiter.acquire(piece)
        amount -= piece


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a reply asks to wait: ``retry-after-ms``, or ``retry-after`` in seconds or as a date."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after")
        if value is None:
            return None
        if value.strip().replace(".", "", 1).isdigit():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
