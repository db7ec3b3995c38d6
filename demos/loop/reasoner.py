"""A scripted stand-in for a text reasoner such as R1 or QwQ, behind a real HTTP server on this machine.

It reads no picture. It adds up the digits it finds in a description, in steps, and like its models it slips now and
then and doubts itself at length ("Wait, ..."). Its replies depend on the description and on the request's seed alone.
"""

from __future__ import annotations

import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from demos.loop.task import MODULUS, running_sums

MODEL = "scripted-reasoner"
SLIPS = 0.15  # share of replies with one wrong sum
DOUBTS = 0.5  # share of replies that go over their steps once more


def reason(description: str, rng: random.Random) -> str:
    """A reply about the digits of a description; without any, it says so and gives no answer."""
    digits = "".join(re.findall(r"\d", description))
    if len(digits) < 2:
        return "<think>The description names no digits to add.</think>"
    steps = running_sums(digits)
    if rng.random() < SLIPS:
        sums = [place for place, sign in enumerate(steps) if sign == "="]
        place = rng.choice(sums) + 1
        steps = f"{steps[:place]}{(int(steps[place]) + rng.choice((1, MODULUS - 1))) % MODULUS}{steps[place + 1 :]}"
        steps = continued(steps)
    doubt = f"\nWait, let me go over it again. {steps}" if rng.random() < DOUBTS else ""
    return f"<think>{steps}{doubt}</think><answer>{steps[-1]}</answer>"


def continued(steps: str) -> str:
    """The steps with every sum after the first wrong one made from it, as somebody who slipped goes on."""
    first, *rest = steps.split("+")
    total, text, slipped = int(first), first, False
    for part in rest:
        digit, _, said = part.partition("=")
        right = (total + int(digit)) % MODULUS
        total = right if slipped else int(said)
        slipped |= total != right
        text += f"+{digit}={total}"
    return text


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        asked = body["messages"][-1]["content"]
        description = json.loads(asked)["description"]
        text = reason(description, random.Random(f"{body.get('seed')}:{description}"))
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": len(asked) // 4, "completion_tokens": len(text) // 4}
        usage["total_tokens"] = sum(usage.values())
        reply = {"id": "0", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice]}
        data = json.dumps(reply | {"usage": usage}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Thousands of requests are no news."""


class ReasonerServer:
    """``with ReasonerServer() as server``: chat completions at ``server.base_url``, on loopback only."""

    def __enter__(self) -> ReasonerServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
