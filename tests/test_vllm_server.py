"""Turns from a vLLM server: a stand-in for what can go wrong, and the real one against a transformers forward."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from conftest import picture
from hypothesis import given
from hypothesis import strategies as st
from vllm_serving import STARTED_WITHIN, vllm_server

from vt_trl.errors import ConfigError, EngineOutage
from vt_trl.generation.base import Request, SamplingSettings
from vt_trl.generation.vllm_server import ServerBackend, ServerEngine, merged_features
from vt_trl.packing import placeholder_runs, placeholder_spans

PAD = 7
GOOD = {"model_config": {"logprobs_mode": "processed_logprobs"}}


class Quiet(ServerEngine):
    """A server without a NCCL group: what would be sent is noted."""

    def _connect(self):
        self.sent = 0

    def _send_weights(self):
        self.sent += 1


class StandIn:
    """Answers as vLLM's endpoints do; ``trouble`` may return a status instead, by path and number of calls."""

    def __init__(self):
        self.calls: list[tuple[str, dict]] = []
        self.trouble = lambda path, count: None
        self.config = GOOD
        self.hold = threading.Event()
        self.hold.set()
        self.visual_tokens = 4

    def answer(self, path: str, body: dict) -> tuple[int, dict]:
        path = path.partition("?")[0]
        self.calls.append((path, body))
        status = self.trouble(path, sum(one == path for one, _ in self.calls))
        if status:
            return status, {"error": "as asked"}
        if path == "/server_info":
            return 200, {"vllm_config": self.config}
        if path == "/v1/models":
            return 200, {"data": [{"id": "served"}]}
        if path == "/v1/chat/completions/render":
            url = body["messages"][0]["content"][0]["image_url"]["url"]
            return 200, {"features": features(hashlib.md5(url.encode()).hexdigest(), self.visual_tokens)}
        if path == "/inference/v1/generate":
            if body["token_ids"][-1] == 99:  # a slow one
                self.hold.wait(20)
            entries = [{"token": f"token_id:{token}", "logprob": -0.5, "top_logprobs": []} for token in (5, 2)]
            choice = {"token_ids": [5, 2], "logprobs": {"content": entries}, "finish_reason": "stop"}
            return 200, {"choices": [choice]}
        return 200, {}

    def count(self, path: str) -> int:
        return sum(one == path for one, _ in self.calls)


def features(name: str, length: int) -> dict:
    return {
        "mm_hashes": {"image": [name]},
        "mm_placeholders": {"image": [{"offset": 1, "length": length}]},
        "kwargs_data": {"image": ["data of " + name]},
        "mm_metadata": None,
    }


@pytest.fixture
def server():
    stand_in = StandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.reply({})

        def do_POST(self):
            size = int(self.headers.get("content-length") or 0)
            self.reply(json.loads(self.rfile.read(size) or b"{}"))

        def reply(self, body):
            status, answer = stand_in.answer(self.path, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    stand_in.url = f"http://127.0.0.1:{http.server_port}"
    yield stand_in
    stand_in.hold.set()
    http.shutdown()


def engine(url: str, kind=Quiet, timeout: float = 5.0, limits=None) -> ServerEngine:
    size = SimpleNamespace(size=limits or {})
    return kind(
        model=SimpleNamespace(name_or_path="policy"),
        accelerator=Accelerator(cpu=True),
        processing_class=SimpleNamespace(image_processor=size),
        mode="server",
        server_base_url=url,
        server_timeout=timeout,
    )


@contextmanager
def sampling(server: StandIn, **options):
    backend = ServerBackend(
        engine(server.url), image_token_id=PAD, eos_token_ids=[2], banned_ids=[8], weights_version=lambda: 3, **options
    )
    backend.begin(SamplingSettings(temperature=0.7))
    try:
        yield backend
    finally:
        backend.end()


def test_a_turn_is_sampled_with_its_pictures_and_the_settings_of_the_run(server):
    one, two = picture(1, (56, 56)), picture(2, (56, 56))
    ids = (1, PAD, PAD, PAD, PAD, 3, PAD, PAD, PAD, PAD, 4)
    with sampling(server) as backend:
        backend.submit(Request(11, ids, (one, two), 9))
        backend.submit(Request(12, ids, (one, one.copy()), 9))
        samples = {sample.request_id: sample for sample in backend.completed()}
    assert sorted(samples) == [11, 12]
    assert (samples[11].token_ids, samples[11].logprobs, samples[11].finished) == ((5, 2), (-0.5, -0.5), True)
    bodies = [body for path, body in server.calls if path == "/inference/v1/generate"]
    sent = next(body for body in bodies if len(set(body["features"]["mm_hashes"]["image"])) == 2)
    assert sent["features"]["mm_placeholders"]["image"] == [{"offset": 1, "length": 4}, {"offset": 6, "length": 4}]
    settings = sent["sampling_params"]
    assert (settings["temperature"], settings["max_tokens"], settings["stop_token_ids"]) == (0.7, 9, [2])
    assert settings["logit_bias"] == {"8": -100.0} and settings["ignore_eos"] and settings["logprobs"] == 0
    assert server.count("/v1/chat/completions/render") == 2  # by content: equal pictures are prepared once


def test_a_second_turn_starts_while_another_first_turn_still_runs(server):
    server.hold.clear()
    order = []
    with sampling(server) as backend:
        backend.submit(Request(0, (1, 99), (), 4))  # slow
        backend.submit(Request(1, (1, 3), (), 4))
        for sample in backend.completed():
            order.append(sample.request_id)
            if sample.request_id == 1:
                backend.submit(Request(2, (1, 3, 5, 2), (), 4))
            if sample.request_id == 2:
                server.hold.set()
    assert order == [1, 2, 0]


def test_a_busy_server_is_asked_again_and_a_dead_one_stops_the_run(server, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    server.trouble = lambda path, count: 503 if path == "/inference/v1/generate" and count < 3 else None
    with sampling(server) as backend:
        backend.submit(Request(0, (1, 3), (), 4))
        assert len(list(backend.completed())) == 1
    server.trouble = lambda path, count: 503 if path == "/inference/v1/generate" else None
    with sampling(server, attempts=2) as backend:
        backend.submit(Request(0, (1, 3), (), 4))
        with pytest.raises(EngineOutage, match="after 2 tries: status 503.*resume_from_checkpoint"):
            list(backend.completed())
        assert list(backend.completed()) == []  # the rest was given up


def test_weights_are_sent_when_they_have_changed_and_caches_forget_the_old(server):
    one = engine(server.url)
    version = [0]
    backend = ServerBackend(
        one, image_token_id=PAD, eos_token_ids=[2], banned_ids=[], weights_version=lambda: version[0]
    )
    for step in (0, 0, 1):
        version[0] = step
        backend.begin(SamplingSettings())
        backend.end()
    assert one.sent == 2
    for cache in ("mm", "encoder", "prefix"):
        assert server.count(f"/reset_{cache}_cache") == 2


def test_a_server_that_would_disagree_with_training_is_refused(server):
    server.config = {"model_config": {"logprobs_mode": "raw_logprobs"}}
    with pytest.raises(ConfigError, match="'raw_logprobs'.*--logprobs-mode processed_logprobs"):
        engine(server.url)
    server.config = {"model_config": GOOD["model_config"] | {"mm_processor_kwargs": {"size": {"longest_edge": 1}}}}
    limits = {"shortest_edge": 3136, "longest_edge": 200704}
    with pytest.raises(ConfigError, match='--mm-processor-kwargs .*"longest_edge": 200704'):
        engine(server.url, limits=limits)
    server.trouble = lambda path, count: 404 if path == "/server_info" else None
    with pytest.raises(ConfigError, match="has no /server_info.*VLLM_SERVER_DEV_MODE=1 vllm serve policy"):
        engine(server.url)


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EngineOutage, match=f"No vLLM server answered at {url} within vllm_server_timeout"):
        engine(url, timeout=0.1)


def test_another_number_of_visual_tokens_is_an_error(server):
    server.visual_tokens = 5
    with sampling(server) as backend:
        backend.submit(Request(0, (1, PAD, PAD, PAD, PAD, 3), (picture(1, (56, 56)),), 4))
        with pytest.raises(RuntimeError, match=r"take \[4\] placeholder tokens here and \[5\] in vLLM"):
            list(backend.completed())


@given(st.lists(st.sampled_from([PAD, 1, 2]), max_size=30))
def test_spans_are_the_runs_of_placeholders(ids):
    spans = placeholder_spans(ids, PAD)
    assert sorted(index for start, end in spans for index in range(start, end)) == [
        index for index, token in enumerate(ids) if token == PAD
    ]
    assert all(end < after for (_, end), (after, _) in zip(spans, spans[1:], strict=False))  # apart by a token
    assert placeholder_runs(ids, PAD) == [end - start for start, end in spans]
    merged = merged_features([features(str(n), end - start) for n, (start, end) in enumerate(spans)], spans, 0)
    assert [one["offset"] for one in merged["mm_placeholders"]["image"]] == [start for start, _ in spans]


@pytest.fixture(scope="module")
def real(checkpoints, tmp_path_factory):
    """vLLM's own server with a tiny Qwen2.5-VL."""
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--enable-scale-out", "--logprobs-mode", "processed_logprobs", "--max-model-len", "2048"]
    with vllm_server(checkpoints["qwen2_5_vl"], log, *options) as server:
        yield server.url, server.process, log


@pytest.mark.vllm
def test_the_real_server_samples_what_training_scores(real, checkpoints):
    """Two turns with pictures; log-probabilities of the server and of a transformers forward agree in float32."""
    from vllm_world import World

    url, process, log = real

    class Served(World):
        def new_engine(self):
            one = Quiet(
                model=self.model,
                accelerator=Accelerator(cpu=True),
                processing_class=self.processor,
                mode="server",
                server_base_url=url,
                server_timeout=STARTED_WITHIN,
            )
            return one

        def new_backend(self, eos=None, banned=()):
            return ServerBackend(
                self.engine,
                image_token_id=self.image_id,
                eos_token_ids=[self.eos],
                banned_ids=self.banned,
                weights_version=lambda: self.version,
            )

    started = time.monotonic()
    try:
        world = Served(checkpoints["qwen2_5_vl"])
    except EngineOutage:
        pytest.fail(f"no server after {time.monotonic() - started:.0f} s:\n{log.read_text()[-3000:]}")
    pairs = world.episodes()
    assert world.engine.sent == 1
    assert world.worst(pairs) < 1e-4
    greedy = SamplingSettings(temperature=0.0)
    request = Request(0, world.prompt(world.small), (world.small,), 12)
    ((_, whole),) = world.run([request], greedy)
    ids, decode = whole.token_ids, world.tokenizer.decode
    stop = decode(ids[3:5])
    end = next(end for end in range(1, len(ids) + 1) if stop in decode(ids[:end]))
    ((_, stopped),) = world.run([replace(request, stop=(stop,))], greedy)
    assert stopped.token_ids == ids[:end] and stopped.finished and end < len(ids) == 12
    assert process.poll() is None
