"""A real HTTP server on loopback that imitates a chat-completions endpoint, for an honest judge and for every bad one.

HTTP is spoken by hand, so that a reply can be late, dripping or torn, which no mocked transport can show::

    with JudgeServer(per_case({"dog": [too_many(0), cut(10)], "cat": "no idea"})) as server:
        ...  # talk to server.base_url: "dog" succeeds at the third attempt, "cat" gets prose, the rest is honest
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any

_CHAT_PATH = re.compile(r"/v1/chat/completions|/openai/deployments/[^/?]+/chat/completions\?(?:.*&)?api-version=.+")
_PAGE = b"<!DOCTYPE html><html><body><h1>502 Bad Gateway</h1><p>upstream is away</p></body></html>"
_BREAK_WITH_RST = struct.pack("ii", 1, 0)


@dataclass(frozen=True, eq=False)
class Received:
    """One chat request as it came in, with the case that its last user message holds."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    case: dict[str, Any] | None
    code: str | None
    number: int
    attempt: int  # how many requests about the same case came before
    other: Received | None = field(default=None, repr=False)  # the latest one about a different case
    time: float = field(default_factory=time.monotonic)

    @property
    def honest(self) -> str:
        """What a perfect judge says."""
        case = self.case or {}
        answer = str(case.get("answer_to_grade", "")).strip().casefold()
        right = answer in [str(gold).casefold() for gold in case.get("accepted_answers", [])]
        return self.says("right" if right else "wrong", self.code)

    def says(self, verdict: str, code: str | None) -> str:
        """A verdict in the form that the request asks for."""
        if self.body.get("response_format"):
            return json.dumps({"code": code, "verdict": verdict})
        return f"{code} {verdict}" if code else verdict


@dataclass(frozen=True)
class Reply:
    """Status, headers and body, before they are put on the wire."""

    body: bytes
    status: int = 200
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()

    def head(self) -> bytes:
        reason = HTTPStatus(self.status).phrase if self.status in list(HTTPStatus) else "Unknown"
        always = (("content-type", self.content_type), ("content-length", len(self.body)))
        lines = [f"{name}: {value}" for name, value in always + self.headers]
        return "\r\n".join([f"HTTP/1.1 {self.status} {reason}", *lines, "", ""]).encode()


@dataclass(frozen=True)
class Behaviour:
    """What is answered and how it travels. ``dataclasses.replace`` combines: a late 500, a dripping page."""

    reply: Callable[[Received], Reply] = lambda me: _completion(me, me.honest)
    wait: float = 0.0  # seconds before the first byte
    pause: float = 0.0  # seconds before each byte
    cut: int | None = None  # bytes of the body after which the connection breaks, below 0: before the headers
    reset: bool = True  # break with RST rather than FIN


Play = Behaviour | str | list | None
"""A behaviour, a content, a list with one of these for each attempt at a case, or None for an honest answer."""
Script = Callable[[Received], Play]


def _completion(me: Received, *texts: str | None, finish_reason: str = "stop", refusal: str | None = None) -> Reply:
    messages = [{"role": "assistant", "content": text, "refusal": refusal} for text in texts]
    tokens = len(str(me.body["messages"])) // 4
    data = {
        "id": f"chatcmpl-{me.number}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": me.body.get("model", "judge"),
        "choices": [{"index": i, "message": m, "finish_reason": finish_reason} for i, m in enumerate(messages)],
        "usage": {"prompt_tokens": tokens, "completion_tokens": 20, "total_tokens": tokens + 20},
    }
    return Reply(json.dumps(data).encode())


def _error(http_status: int, message: str, **more: Any) -> Reply:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None} | more
    return Reply(json.dumps({"error": error}).encode(), http_status)


def _choices(*texts: str | None, finish_reason: str = "stop", refusal: str | None = None) -> Behaviour:
    return Behaviour(lambda me: _completion(me, *texts, finish_reason=finish_reason, refusal=refusal))


def content(text: str, finish_reason: str = "stop") -> Behaviour:
    return _choices(text, finish_reason=finish_reason)


def refusal(text: str) -> Behaviour:
    return _choices(None, refusal=text)


two_choices = empty_choices = _choices
null_content = partial(_choices, None)
content_filter = partial(_choices, None, finish_reason="content_filter")


def status(code: int, retry_after: Any = None, body: Any = None, retry_after_ms: Any = None) -> Behaviour:
    """An error; ``retry_after`` is a number of seconds or any text, such as an HTTP date; ``body`` is JSON or text."""
    named = (("retry-after", retry_after), ("retry-after-ms", retry_after_ms))
    headers = tuple((name, str(value)) for name, value in named if value is not None)
    if body is None:
        body = {"error": {"message": f"status {code}", "type": "server_error", "param": None, "code": None}}
    text = body if isinstance(body, str) else json.dumps(body)
    return Behaviour(lambda _: Reply(text.encode(), code, headers=headers))


def too_many(retry_after: float | str | None = None) -> Behaviour:
    return status(429, retry_after, {"error": {"message": "Rate limit reached", "code": "rate_limit_exceeded"}})


server_error = partial(status, 500)


def unauthorised() -> Behaviour:
    """A 401 that repeats the key it was sent, as some servers do: none of it may reach a log."""
    message = "Incorrect API key provided: {0[authorization]}{0[api-key]}"
    none = {"authorization": "", "api-key": ""}
    return Behaviour(lambda me: _error(401, message.format(none | me.headers), code="invalid_api_key"))


def hang(seconds: float) -> Behaviour:
    """Silence for that time, then an honest answer, if anyone still listens."""
    return Behaviour(wait=seconds)


def drip(interval: float) -> Behaviour:
    """An honest answer, headers included, one byte at a time: no single read is slow, but the whole is."""
    return Behaviour(pause=interval)


def cut(after_bytes: int | None, reset: bool = True) -> Behaviour:
    """The headers and the first bytes of an honest body, then the end of the connection. None: not one byte."""
    return Behaviour(cut=-1 if after_bytes is None else after_bytes, reset=reset)


def html(content_type: str = "text/html; charset=utf-8") -> Behaviour:
    """A page of some gateway with status 200; with ``application/json`` it also lies about what it is."""
    return Behaviour(lambda _: Reply(_PAGE, content_type=content_type))


def content_filter_400() -> Behaviour:
    """Azure's way to refuse a prompt."""
    message = "The response was filtered due to the prompt triggering Azure OpenAI's content management policy."
    inner = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {"jailbreak": {"filtered": True}}}
    more = {"type": None, "param": "prompt", "code": "content_filter", "status": 400, "innererror": inner}
    return Behaviour(lambda _: _error(400, message, **more))


def no_structured_output() -> Behaviour:
    """A 400 for a request with a response format, as from a server that has none; others are answered honestly."""
    message = "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model."
    error = _error(400, message, param="response_format")
    return Behaviour(lambda me: error if "response_format" in me.body else _completion(me, me.honest))


def other_case() -> Behaviour:
    """The honest answer to the latest request about a different case; before there is one, "right" for no case."""
    return Behaviour(lambda me: _completion(me, me.other.honest if me.other else me.says("right", "00000000")))


def huge(size: int) -> Behaviour:
    """A valid completion of so many bytes."""
    return Behaviour(lambda me: _completion(me, "x" * (size - len(_completion(me, "").body))))


def sequence(*plays: Play) -> Script:
    """These for the first requests in order of arrival, whatever they ask, and honest answers afterwards."""
    return lambda received: plays[received.number] if received.number < len(plays) else None


def per_case(plays: Mapping[str, Play] | Callable[[str], Play]) -> Script:
    """What the answer to grade selects; a list there is for the attempts at that case, honest after its end."""
    choose = plays if callable(plays) else plays.get
    return lambda received: choose(received.case["answer_to_grade"]) if received.case else None


def random_failures(share: float, seed: int = 0) -> Script:
    """That share of all requests fails; which ones depends on case and attempt, not on the order of arrival."""
    failures = (server_error(), too_many(), too_many(0.01), cut(None), cut(20), cut(0, reset=False))

    def script(received: Received) -> Play:
        rng = random.Random(f"{seed} {received.attempt} {received.case}")
        return rng.choice(failures) if rng.random() < share else None

    return script


class _Connection:
    """A client's connection, which notices while it waits that the client has left."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        writer.transport.set_write_buffer_limits(0)  # so that drain means "sent"

    async def receive(self) -> tuple[str, str, dict[str, str], bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")[:-2]
        method, path, _ = first.split(" ")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return method, path, headers, await self.reader.readexactly(int(headers.get("content-length", 0)))

    async def idle(self, seconds: float) -> None:
        """Wait, but no longer than the client does: a request that was given up is not in flight."""
        try:
            async with asyncio.timeout(seconds):
                await self.reader.read(1)
        except TimeoutError:
            return
        raise ConnectionResetError("the client left, or spoke before its turn")

    async def send(self, reply: Reply, pause: float = 0.0, cut: int | None = None, reset: bool = True) -> None:
        data = b"" if cut is not None and cut < 0 else reply.head() + reply.body[:cut]
        for part in [data[i : i + 1] for i in range(len(data))] if pause else [data]:
            if pause:
                await self.idle(pause)
            self.writer.write(part)
            await self.writer.drain()
        if cut is not None:
            if reset:
                self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _BREAK_WITH_RST)
            self.writer.transport.abort()
            raise ConnectionAbortedError("on purpose")


class JudgeServer:
    """The server, in a thread with a loop of its own. ``script``, a callable or one play for all, runs in that thread.

    ``latency`` is the mean wait before a reply, drawn between half and one and a half of it, so that replies overtake
    one another. What goes wrong in a script ends that connection and is raised when the server closes.
    """

    def __init__(self, script: Script | Play = None, latency: float = 0.0, seed: int = 0) -> None:
        self.script, self.latency = script, latency
        self.requests: list[Received] = []
        self.strays: list[str] = []  # what is no chat request, answered with 404: "GET /v1/models"
        self.errors: list[Exception] = []
        self.connections = self.in_flight = self.in_flight_max = 0
        self._attempts: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._bound: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="judge-server", daemon=True)

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        self.azure_endpoint = f"http://127.0.0.1:{self._bound.result(timeout=30)}"
        self.base_url = f"{self.azure_endpoint}/v1"
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=30)
        if kind is None and self._thread.is_alive():
            raise RuntimeError("the judge server does not stop")
        if kind is None and self.errors:
            raise self.errors[0]

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        except BaseException as error:
            return self._bound.set_exception(error)
        self._bound.set_result(server.sockets[0].getsockname()[1])
        await self._stop.wait()
        server.close()  # asyncio.run cancels what is still being handled

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = _Connection(reader, writer)
        try:
            while not self._stop.is_set():
                await self._exchange(connection)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client left, or was cut off
        except asyncio.CancelledError:
            writer.transport.abort()
        except Exception as error:
            self.errors.append(error)
        finally:
            writer.close()

    async def _exchange(self, connection: _Connection) -> None:
        method, path, headers, data = await connection.receive()
        if method != "POST" or not _CHAT_PATH.fullmatch(path):
            self.strays.append(f"{method} {path}")
            return await connection.send(_error(404, "Resource not found", code="404"))
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight_max, self.in_flight)
        try:
            received = self._record(path, headers, json.loads(data))
            play = self._decide(received)
            delay = self.latency * self._rng.uniform(0.5, 1.5) + play.wait
            if delay > 0:
                await connection.idle(delay)
            await connection.send(play.reply(received), play.pause, play.cut, play.reset)
        finally:
            self.in_flight -= 1

    def _record(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Received:
        texts = [message["content"] for message in body["messages"] if message["role"] == "user"]
        text = texts[-1] if isinstance(texts[-1], str) else "".join(part.get("text", "") for part in texts[-1])
        first, _, rest = text.partition("\n")
        case = json.loads(first) if first.startswith("{") and first.endswith("}") else None
        code = re.search(r"^code: (\S+)$", rest, re.M)
        last = self.requests[-1] if self.requests else None
        other = last if last is None or last.case != case else last.other
        attempt, self._attempts[first] = self._attempts[first], self._attempts[first] + 1
        received = Received(path, headers, body, case, code and code[1], len(self.requests), attempt, other)
        self.requests.append(received)
        return received

    def _decide(self, received: Received) -> Behaviour:
        play = self.script(received) if callable(self.script) else self.script
        if isinstance(play, list):
            play = play[received.attempt] if received.attempt < len(play) else None
        return content(play) if isinstance(play, str) else play or Behaviour()
