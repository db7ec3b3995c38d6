"""Replies of a model to messages: behind an OpenAI-compatible endpoint or on this machine, each asked for once.

A step makes :class:`Ask` objects and gets :class:`Said` ones, or a text that says why there is none. Replies are kept
on disk as the judges keep verdicts. An ask's ``sample`` is part of what it is known by, so that several samples of one
prompt are several replies, drawn from random streams of their own, and never one reply several times.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from vt_trl.dialogue import chat_messages
from vt_trl.errors import ConfigError
from vt_trl.images import content_id
from vt_trl.judges.background import BackgroundLoop
from vt_trl.judges.cache import JsonCache, default_folder
from vt_trl.judges.endpoint import Endpoint
from vt_trl.judges.pacing import GiveUp, TryAgain
from vt_trl.rollout import turn_seed
from vt_trl.types import Message

_PIXELS_PER_TOKEN = 750  # what a picture is taken to cost, for limits of tokens per minute
_CHARACTERS_PER_TOKEN = 3


@dataclass(frozen=True)
class Ask:
    """One reply that is wanted. ``id`` (of the row) and ``sample`` choose its random stream."""

    id: str
    messages: tuple[Message, ...]
    sample: int = 0

    def key(self, fingerprint: str) -> str:
        """A hash of all that the reply depends on (32 hex digits)."""
        said = [[one.role, *(p.text if hasattr(p, "text") else content_id(p.image) for p in one.parts)]
                for one in self.messages]  # fmt: skip
        text = json.dumps([fingerprint, self.id, self.sample, said])
        return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Said:
    """A reply. ``cut``: the token limit ended it. Tokens are 0 where the server does not count them."""

    text: str
    cut: bool = False
    prompt_tokens: int = 0
    tokens: int = 0


class Speaker(Protocol):
    """Whoever replies."""

    def say(self, asks: Sequence[Ask]) -> list[Said | str]:
        """Replies in the order of ``asks``, or why there is none."""

    def fingerprint(self) -> dict[str, Any]:
        """What its replies depend on (JSON values), without a key or an address, which a restart may change."""

    def identity(self) -> dict[str, Any]:
        """The same and who is behind it: what a kept reply is known by (JSON values)."""

    def close(self) -> None:
        """Give back connections and memory; it may be asked again afterwards."""


class EndpointSpeaker:
    """A model behind a chat-completions endpoint; pictures travel as lossless ``data:`` URLs.

    Args:
        model: its name there.
        who: who asks, for messages: ``the writer is openai``; ``option``: where its settings come from.
        temperature: None leaves it to the server.
        max_tokens: of a reply.
        request_args: more fields of a request.
        seed: each ask has a ``seed`` of its own in its request, made of this one; None: the server draws as it likes.
        seeds: false for a server that refuses such a field and draws anew for every request.
        settings: of :class:`~vt_trl.judges.endpoint.Endpoint`.
    """

    def __init__(
        self,
        model: str,
        who: str,
        option: str,
        temperature: float | None,
        max_tokens: int,
        request_args: dict[str, Any] | None = None,
        seed: int | None = None,
        seeds: bool = True,
        **settings: Any,
    ):
        if "api_key" in {**settings, **(request_args or {})}:
            raise ConfigError("the endpoint's settings hold a key; put it into the environment (OPENAI_API_KEY).")
        try:
            self.endpoint = Endpoint(user=who, **settings)
        except TypeError as error:
            raise ConfigError(f"{option} do not fit: {error}.") from error
        self.model, self.temperature, self.max_tokens = model, temperature, max_tokens
        self.seed, self.seeds = seed, seeds
        self.request_args = dict(request_args or {})
        self.endpoint.open()
        self._loop: BackgroundLoop | None = None

    def fingerprint(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "request_args": self.request_args,
        } | ({} if self.seed is None else {"seed": self.seed})

    def identity(self) -> dict[str, Any]:
        return self.fingerprint() | {"endpoint": self.endpoint.digest}

    def say(self, asks: Sequence[Ask]) -> list[Said | str]:
        async def one(ask: Ask) -> Said | str:
            try:
                return await self.reply(ask.messages, self.seed, ask.id, ask.sample)
            except (TryAgain, GiveUp) as error:
                return str(error)

        async def everyone() -> list[Said | str]:
            return await asyncio.gather(*map(one, asks))

        return self.wait_for(everyone())

    def wait_for(self, work: Any) -> Any:
        """The result of a coroutine, run in this speaker's own loop."""
        self.endpoint.open()  # again, where it was closed
        self._loop = self._loop or BackgroundLoop(f"vt_trl {self.model}")
        return self._loop.submit(work).result()

    async def reply(
        self, messages: Sequence[Message], seed: int | None = None, id: str = "", sample: int = 0, turn: int = 0
    ) -> Said:
        """One reply; raises the last TryAgain, or GiveUp. With ``seed`` the others choose the request's own seed."""
        request = {"model": self.model, "messages": chat_messages(messages)}
        if "max_completion_tokens" not in self.request_args:  # newer models refuse the old name
            request["max_tokens"] = self.max_tokens
        if self.temperature is not None:
            request["temperature"] = self.temperature
        if seed is not None and self.seeds:
            request["seed"] = turn_seed(seed, id, sample, (turn,)) & 0x7FFFFFFF  # all servers take so many bits
        if self.request_args:
            request["extra_body"] = self.request_args
        letters = sum(len(one.text) for one in messages)
        pixels = sum(image.width * image.height for one in messages for image in one.images)
        cost = letters // _CHARACTERS_PER_TOKEN + pixels // _PIXELS_PER_TOKEN + self.max_tokens

        async def attempt() -> Said:
            completion = await self.endpoint.complete(request)
            text, reason = self.endpoint.choices(completion, thinks=True)[0]
            usage = getattr(completion, "usage", None)
            counts = [getattr(usage, name, None) or 0 for name in ("prompt_tokens", "completion_tokens")]
            return Said(text.strip(), reason == "length", *counts)

        return await self.endpoint.run(attempt, cost)

    def close(self) -> None:
        if self._loop is not None:
            self._loop.submit(self.endpoint.close()).result()
            self._loop.stop()
            self._loop = None


class Remembering:
    """A speaker that asks ``inner`` only for what no run has asked for before. Failures are never kept."""

    def __init__(self, inner: Speaker):
        self.inner, self.from_disk = inner, 0
        self._cache = JsonCache(default_folder("replies"), "reply")
        self._known = json.dumps(inner.identity(), sort_keys=True)

    def fingerprint(self) -> dict[str, Any]:
        return self.inner.fingerprint()

    def say(self, asks: Sequence[Ask]) -> list[Said | str]:
        self._cache.open()
        keys = [ask.key(self._known) for ask in asks]
        found: dict[str, Said | str | None] = {key: self._read(key) for key in keys}
        missing = {key: ask for key, ask in zip(keys, asks, strict=True) if found[key] is None}
        self.from_disk += len(found) - len(missing)
        if missing:
            for key, said in zip(missing, self.inner.say(list(missing.values())), strict=True):
                found[key] = said
                if isinstance(said, Said):
                    self._cache.set(key, asdict(said))
        return [found[key] for key in keys]

    def _read(self, key: str) -> Said | None:
        stored = self._cache.get(key)
        try:
            return None if stored is None else Said(**stored)
        except TypeError as error:  # not written by us
            self._cache.ignore(error)
            return None

    def close(self) -> None:
        self._cache.close()
        self.inner.close()


@dataclass(frozen=True)
class Prices:
    """Money per million tokens, in whatever currency."""

    prompt: float
    completion: float

    @classmethod
    def of(cls, given: Any, option: str) -> Prices | None:
        """Prices from a setting; None where there are none. Raises ConfigError for what is no price."""
        if given is None:
            return None
        good = isinstance(given, Mapping) and set(given) == {"prompt", "completion"}
        if not good or not all(type(one) in (int, float) and one >= 0 for one in given.values()):
            raise ConfigError(
                f"{option}: prices is {given!r}; give money per million tokens, as in "
                f'{{"prompt": 0.15, "completion": 0.6}}.'
            )
        return cls(**given)

    def cost(self, prompt_tokens: int, tokens: int) -> float:
        return (prompt_tokens * self.prompt + tokens * self.completion) / 1e6


def count_tokens(counts: Counter[str], role: str, said: Said) -> None:
    """Add what a reply cost, also where an earlier run has paid for it."""
    counts.update({f"{role}/replies": 1, f"{role}/prompt_tokens": said.prompt_tokens, f"{role}/tokens": said.tokens})


def spent(counts: Mapping[str, int], role: str, model: str, prices: Prices | None) -> dict[str, Any]:
    """``{model, replies, prompt_tokens, tokens}`` of a role, and ``cost`` where prices are given."""
    numbers = {what: counts.get(f"{role}/{what}", 0) for what in ("replies", "prompt_tokens", "tokens")}
    money = {} if prices is None else {"cost": prices.cost(numbers["prompt_tokens"], numbers["tokens"])}
    return {"model": model, **numbers, **money}


@dataclass(frozen=True)
class Role:
    """A speaker and what it is called in counts and reports."""

    name: str
    speaker: Remembering
    model: str
    prices: Prices | None = None
    local: bool = False


def make_role(
    name: str,
    kind: str,
    model: str,
    settings: Mapping[str, Any],
    *,
    temperature: float | None,
    max_tokens: int,
    seed: int | None = None,
    max_pixels: int | None = None,
) -> Role:
    """The speaker of an option triple ``--NAME``, ``--NAME-model``, ``--NAME-args``; see docs/data.md.

    ``seed``: of the samples; None where there is one reply per prompt. ``max_pixels``: of the pictures it is shown.
    ``temperature: null`` among the settings leaves it to the server. Raises ConfigError for what does not fit.
    """
    option = f"--{name}-args"
    settings = dict(settings)
    prices = Prices.of(settings.pop("prices", None), option)
    if settings.pop("temperature", ...) is None:
        temperature = None
    if kind == "openai":
        speaker: Speaker = EndpointSpeaker(
            model, f"the {name} is openai", option, temperature, max_tokens, seed=seed, **settings
        )
    else:
        from data_prep.local_speaking import LocalSpeaker

        speaker = LocalSpeaker(model, option, temperature or 0.0, max_tokens, seed or 0, max_pixels, settings)
    return Role(name, Remembering(speaker), model, prices, local=kind == "local")
