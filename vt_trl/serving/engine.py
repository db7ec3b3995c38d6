"""Who plays the episodes: here the model in this process. One thread samples for everybody who waits."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from vt_trl.chat import Encoded
from vt_trl.errors import ConfigError, DataError
from vt_trl.generation.base import SamplingSettings
from vt_trl.rollout import RolloutRunner
from vt_trl.serving.errors import ApiError, bad_request
from vt_trl.serving.guests import Guest, GuestRunner
from vt_trl.serving.replies import Answer
from vt_trl.types import Rollout, Turn

logger = logging.getLogger(__name__)


class Started:
    """The episode has started: its row is fine."""


Event = Started | Turn | Answer


class Play:
    """One episode as it goes on: Started, each Turn, and last the Answer; or an error, which is raised.

    Made inside a running event loop; ``tell`` may be called from any thread. ``close`` gives the rest up.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self.on_close: Callable[[], Any] = lambda: None

    def tell(self, event: Event | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed, and nobody listens
            logger.debug("a request ended after the server")

    async def next(self) -> Event:
        """Raises ApiError when the episode cannot go on."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise as_api_error(event)
        return event

    def close(self) -> None:
        self.on_close()


def as_api_error(error: Exception) -> ApiError:
    """What a client is told; of an error of our own no more than that there was one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DataError):
        return bad_request(f"{error.reason}.", "unusable_request")
    if isinstance(error, ConfigError):
        return bad_request(str(error), "unsupported_parameter", None)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "The server failed on this request; its log says why.", "internal_error")


class Engine(Protocol):
    """Plays rows. ``most_tokens``: sampled tokens of one answer at most; ``most_pictures``: of one question."""

    most_tokens: int
    most_pictures: int

    def start(self) -> None: ...

    def play(self, row: dict[str, Any], settings: SamplingSettings, max_tokens: int | None) -> Play: ...

    @property
    def healthy(self) -> bool: ...

    async def close(self) -> None:
        """Finish what is under way, then end."""


@dataclass(eq=False)
class _Waiting:
    guest: Guest
    settings: SamplingSettings
    play: Play


class LocalEngine:
    """Plays on a rollout loop of this process, in its own thread.

    Requests join those under way at their next turn, ``max_batch`` at a time, in the order of their arrival. Sampling
    settings are a backend's for everything under way, so a request with other settings waits until those have ended,
    and those behind it wait too: nobody is overtaken. What a request cannot set is as in ``sampling``.
    """

    def __init__(self, runner: RolloutRunner, sampling: SamplingSettings, max_batch: int = 32):
        self.sampling = sampling
        self.runner = GuestRunner.of(runner)
        self.max_batch = max_batch
        example = runner.environment()
        self.most_tokens, self.most_pictures = runner.limits.turn * example.max_turns, example.max_pictures
        self._waiting: deque[_Waiting] = deque()
        self._active: set[_Waiting] = set()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="vt-trl-serve", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive()

    def play(self, row: dict[str, Any], settings: SamplingSettings, max_tokens: int | None) -> Play:
        play = Play()
        guest = Guest(row, lambda event: None, sampled=max_tokens)
        settings = replace(settings, repetition_penalty=self.sampling.repetition_penalty)
        entry = _Waiting(guest, settings, play)
        guest.tell = lambda event: self._told(entry, event)
        play.on_close = lambda: self._give_up(entry)
        with self._wake:
            self._waiting.append(entry)
            self._wake.notify()
        return play

    async def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def _give_up(self, entry: _Waiting) -> None:
        entry.guest.given_up = True
        with self._wake:
            if entry in self._waiting:  # its picture need not be kept until its turn comes
                self._waiting.remove(entry)

    def _told(self, entry: _Waiting, event: Encoded | Turn | Rollout | Exception) -> None:
        if isinstance(event, Rollout | Exception):
            self._active.discard(entry)
        if isinstance(event, Rollout):
            sampled = sum(event.loss_mask)
            read = len(event.prompt_ids) + len(event.completion_ids) - sampled
            event = Answer(event, read, sampled)
        entry.play.tell(Started() if isinstance(event, Encoded) else event)

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                settings = self._waiting[0].settings
            self._run(settings)

    def _run(self, settings: SamplingSettings) -> None:
        self._active.clear()
        try:
            self.runner.play(lambda: self._arrivals(settings), settings)
        except Exception as error:  # the next requests may do better
            if not self._active:  # refused before anybody could join
                list(self._arrivals(settings))
            for entry in self._active:
                entry.play.tell(error)

    def _arrivals(self, settings: SamplingSettings) -> Iterable[Guest]:
        """Those at the head of the queue who can join what runs with these settings."""
        self._active = {entry for entry in self._active if not entry.guest.given_up}
        found = []
        with self._wake:
            while self._waiting and len(self._active) < self.max_batch and self._waiting[0].settings == settings:
                entry = self._waiting.popleft()
                self._active.add(entry)
                found.append(entry.guest)
        return found
