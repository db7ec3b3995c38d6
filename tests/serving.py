"""A server with a tiny model, and requests to it, for the tests of `vt-trl serve`."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import openai
from PIL import Image

from vt_trl.generation.base import SamplingSettings
from vt_trl.rollout import RolloutRunner
from vt_trl.serving.app import Service
from vt_trl.serving.background import in_background
from vt_trl.serving.engine import LocalEngine
from vt_trl.serving.limits import ServeLimits
from vt_trl.serving.pictures import Pictures

GREEDY = SamplingSettings(temperature=0.0)


@dataclass
class Running:
    """A running server: its address, the service behind it, and uvicorn."""

    url: str
    service: Service
    server: Any

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def ask(self, row: dict[str, Any], **settings: Any) -> Any:
        """A completion, or the list of a stream's chunks."""
        settings = {"model": "tiny", "extra_body": {"vt_trl": {"turns": True}}} | settings
        with self.client() as client:
            reply = client.chat.completions.create(messages=messages(row), **settings)
            return list(reply) if settings.get("stream") else reply


@contextmanager
def serving(
    engine: Any, limits: ServeLimits | None = None, api_key: str | None = None, **pictures: Any
) -> Iterator[Running]:
    limits = limits or ServeLimits(requests=64, seconds=60)
    engine = LocalEngine(engine, GREEDY, 8) if isinstance(engine, RolloutRunner) else engine
    service = Service(engine, "tiny", limits, Pictures(limits, **pictures), api_key)
    with in_background(service) as (url, server):
        yield Running(url, service, server)


def data_url(image: Image.Image | bytes) -> str:
    if not isinstance(image, bytes):
        stream = BytesIO()
        image.save(stream, "PNG")
        image = stream.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


def messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    return with_parts(picture_part(data_url(row["image"])), {"type": "text", "text": row["question"]})


def picture_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def with_parts(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def token_ids(reply: Any) -> list[list[int]]:
    """Of each turn."""
    return [turn["token_ids"] for turn in reply.vt_trl["turns"]]
