"""The HTTP side: ``/v1/chat/completions``, ``/v1/models`` and ``/health``, as OpenAI's clients expect them."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from vt_trl.serving.engine import Engine, Event, Play, as_api_error
from vt_trl.serving.errors import ApiError
from vt_trl.serving.limits import ServeLimits
from vt_trl.serving.pictures import Pictures
from vt_trl.serving.replies import Answer, Replies, event
from vt_trl.serving.requests import Asked, read_request
from vt_trl.types import Turn

logger = logging.getLogger(__name__)

_ALIVE_EVERY = 10.0  # seconds between comments in a silent stream, which keep proxies from hanging up


class Service:
    """What the routes share. ``model``: the name clients use; ``api_key``: None lets everybody in."""

    def __init__(
        self, engine: Engine, model: str, limits: ServeLimits, pictures: Pictures, api_key: str | None = None
    ):
        self.engine, self.model, self.limits, self.pictures = engine, model, limits, pictures
        self.since = int(time.time())
        self.in_flight = 0
        self._key = None if api_key is None else api_key.encode()

    def admit(self, request: Request) -> None:
        """Raises ApiError (401) without the right key."""
        given = request.headers.get("authorization", "")
        if self._key is not None and not hmac.compare_digest(given.encode(), b"Bearer " + self._key):
            raise ApiError(401, "The API key is missing or wrong.", "invalid_api_key")

    def take_place(self, stack: ExitStack) -> None:
        """One more request in flight until the stack is closed. Raises ApiError (429) when there are too many."""
        if self.in_flight >= self.limits.requests:
            raise ApiError(429, "The server has as many requests as it takes; try again.", "busy", retry_after=1)
        self.in_flight += 1
        stack.callback(self._leave)

    def _leave(self) -> None:
        self.in_flight -= 1

    async def read_body(self, request: Request) -> bytes:
        """Raises ApiError: 408 when it drips, 413 when it is too large, 415 when it is no JSON."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "Send the request as application/json.", "unsupported_media_type")
        most = self.limits.body_bytes
        too_large = ApiError(413, f"The request has more than {most} bytes.", "request_too_large")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > 2 * most:
            raise too_large
        body, arrived = bytearray(), 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for chunk in request.stream():
                    arrived += len(chunk)
                    if arrived > 2 * most:
                        raise too_large
                    if arrived <= most:  # what is a little too large is read and dropped, so that the refusal arrives
                        body += chunk
        except TimeoutError:
            raise ApiError(408, "The request's body did not arrive in time.", "slow_request") from None
        if arrived > most:
            raise too_large
        return bytes(body)


def make_app(service: Service) -> FastAPI:
    """The application; the engine starts and ends with it."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await service.engine.close()

    # No pages that describe the API: they would load scripts from elsewhere.
    app = FastAPI(title="vt-trl", lifespan=life, openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/health")
    async def health() -> JSONResponse:
        well = service.engine.healthy
        status = {"status": "ok" if well else "engine ended", "requests": service.in_flight}
        return JSONResponse(status, status_code=200 if well else 503)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        service.admit(request)
        one = {"id": service.model, "object": "model", "created": service.since, "owned_by": "vt_trl"}
        return {"object": "list", "data": [one]}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        return await _complete(service, request)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        refusal = ApiError(error.status_code, f"{error.detail}.", "unknown_route")
        return JSONResponse(refusal.body, status_code=error.status_code, headers=error.headers)

    return app


async def _complete(service: Service, request: Request) -> Response:
    service.admit(request)
    deadline = asyncio.get_running_loop().time() + service.limits.seconds
    with ExitStack() as stack:
        service.take_place(stack)
        try:
            async with asyncio.timeout_at(deadline):
                asked, row = await _read(service, request)
        except TimeoutError:
            raise _late(service) from None
        play = service.engine.play(row, asked.settings, asked.max_tokens)
        stack.callback(play.close)
        replies = Replies(service.model)
        events = _Events(service, play, deadline)
        if not asked.stream:
            return await _whole(events, replies, asked, request)
        await events.next()  # Started, or a refusal while there is still a status to set
        # From here on the response holds the request's place, and gives it up when it ends.
        return _EventStream(_chunks(events, replies, asked), stack.pop_all())


async def _read(service: Service, request: Request) -> tuple[Asked, dict[str, Any]]:
    body = await service.read_body(request)
    engine = service.engine
    most = engine.most_tokens, engine.most_pictures
    asked = await asyncio.to_thread(read_request, body, service.model, service.limits, *most)
    return asked, asked.row([await service.pictures.read(url) for url in asked.urls])


def _late(service: Service) -> ApiError:
    return ApiError(504, f"There was no answer within {service.limits.seconds:g} s.", "timeout")


class _Events:
    """The events of an episode until a deadline; :meth:`next` raises ApiError (504) after it."""

    def __init__(self, service: Service, play: Play, deadline: float):
        self.service, self.play, self.deadline = service, play, deadline

    async def next(self) -> Event:
        try:
            async with asyncio.timeout_at(self.deadline):
                return await self.play.next()
        except TimeoutError:
            raise _late(self.service) from None


async def _whole(events: _Events, replies: Replies, asked: Asked, request: Request) -> Response:
    """The finished answer; nothing more is sampled for a client who has hung up."""

    async def finished() -> Answer:
        while not isinstance(found := await events.next(), Answer):
            pass
        return found

    answer, gone = asyncio.ensure_future(finished()), asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(replies.completion(await answer, asked.turns))
    finally:
        answer.cancel()
        gone.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """Server-sent events that free what they hold however they end, even before the first."""

    def __init__(self, chunks: AsyncIterator[bytes], held: ExitStack):
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.held = held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self.held:
            await super().__call__(scope, receive, send)


async def _chunks(events: _Events, replies: Replies, asked: Asked) -> AsyncIterator[bytes]:
    """Chunks as turns end: the answer comes when its turn has ended; earlier turns only where they were asked for."""
    yield replies.chunk({"role": "assistant", "content": ""})
    waiting: asyncio.Future[Event] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(events.next())
            done, _ = await asyncio.wait((waiting,), timeout=_ALIVE_EVERY)
            if not done:
                yield b": still at it\n\n"
                continue
            found, waiting = waiting.result(), None
            if isinstance(found, Turn) and asked.turns:
                yield replies.chunk({}, turn=found)
            if isinstance(found, Answer):
                break
        yield replies.chunk({"content": found.text})
        yield replies.chunk({}, found.finish_reason)
        if asked.include_usage:
            yield replies.usage_chunk(found)
        yield b"data: [DONE]\n\n"
    except Exception as error:  # the status is long sent
        yield event(as_api_error(error).body)
    finally:
        if waiting is not None:
            waiting.cancel()
