"""`vt-trl serve`, driven by the official client: the tokens of the rollout loop, streams, and every refusal."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from conftest import make_rows, picture
from helpers import SHORT_PROMPTS, AsksFirst, Script, answer, png
from serving import GREEDY, Running, data_url, messages, picture_part, serving, token_ids, with_parts
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.serve import make_restless
from vt_trl.envs import ResizeEnv
from vt_trl.generation.base import SamplingSettings, ScriptedBackend
from vt_trl.generation.standalone import make_runner
from vt_trl.rollout import Limits, RolloutRunner
from vt_trl.serving.limits import ServeLimits

TEXT = {"type": "text", "text": "What is it?"}
ENVIRONMENT = {"prompts": SHORT_PROMPTS, "min_pixels": 3136}
ROWS = make_rows(6)


def asks_first() -> AsksFirst:
    return AsksFirst(**ENVIRONMENT)


@pytest.fixture(scope="module")
def runner(checkpoint) -> RolloutRunner:
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    return make_runner(make_restless(model), processor, asks_first, Limits(6, 256))


@pytest.fixture(scope="module")
def expected(runner):
    return [runner.run([row], 1, GREEDY)[0] for row in ROWS]


@pytest.fixture(scope="module")
def running(runner, expected):  # `expected` first: the model is the server's from here on
    limits = ServeLimits(image_bytes=100_000, image_pixels=300_000, body_bytes=200_000, question_chars=500)
    with serving(runner, limits) as server:
        yield server


def turn_ids(rollout) -> list[list[int]]:
    return [list(turn.token_ids) for turn in rollout.turns]


def test_an_answer_has_the_tokens_of_the_rollout_loop(running, expected):
    reply = running.ask(ROWS[0])
    rollout = expected[0]
    assert token_ids(reply) == turn_ids(rollout) and len(turn_ids(rollout)) == 2
    assert reply.choices[0].message.content == rollout.answer and reply.choices[0].finish_reason == "stop"
    sampled = sum(len(turn.token_ids) for turn in rollout.turns)
    usage = reply.usage
    assert usage.completion_tokens == sampled
    assert usage.total_tokens == len(rollout.prompt_ids) + len(rollout.completion_ids)
    assert usage.prompt_tokens == usage.total_tokens - sampled
    # 112 x 112 px are 16 visual tokens of 28 x 28 px, and a quarter of them at half of each side.
    assert usage.vt_trl == {"visual_tokens": 20, "asked": True, "turns": 2, "status": "answered"}


def test_many_at_once_get_their_own_answers(running, expected):
    assert len({str(turn_ids(rollout)) for rollout in expected}) == len(ROWS)  # or a mix-up would not be seen
    order = [0, 1, 2, 3, 4, 5] * 3
    with ThreadPoolExecutor(len(order)) as pool:
        replies = list(pool.map(lambda number: running.ask(ROWS[number]), order))
    assert [token_ids(reply) for reply in replies] == [turn_ids(expected[number]) for number in order]
    assert running.service.in_flight == 0


def test_a_seed_draws_what_the_rollout_loop_draws(runner, expected):
    drawn = runner.run([ROWS[1]], 1, SamplingSettings(temperature=1.0, seed=7))[0]
    assert turn_ids(drawn) != turn_ids(expected[1])
    with serving(runner) as server, ThreadPoolExecutor(3) as pool:
        body = {"vt_trl": {"turns": True, "id": ROWS[1]["id"]}}
        seeded = pool.submit(server.ask, ROWS[1], temperature=1.0, seed=7, extra_body=body)
        greedy = pool.submit(server.ask, ROWS[1])  # other settings at the same time
        refused = pool.submit(server.ask, ROWS[1], temperature=1.0, seed=7, top_p=0.5)
        assert token_ids(seeded.result()) == turn_ids(drawn)
        assert token_ids(greedy.result()) == turn_ids(expected[1])
        with pytest.raises(openai.BadRequestError, match="seed is 7 and top_p"):
            refused.result()


def test_stream(running, expected):
    chunks = running.ask(ROWS[2], stream=True, stream_options={"include_usage": True})
    assert [chunk.object for chunk in chunks] == ["chat.completion.chunk"] * 6
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.vt_trl["turn"]["token_ids"] for chunk in chunks[1:3]] == turn_ids(expected[2])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == expected[2].answer and chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.vt_trl["asked"] is True
    plain = running.ask(ROWS[2], stream=True, extra_body={})
    assert len(plain) == 3 and not any(hasattr(chunk, "vt_trl") or chunk.usage for chunk in plain)


def test_max_tokens_counts_all_turns(running, expected):
    first, second = (len(ids) for ids in turn_ids(expected[3]))
    reply = running.ask(ROWS[3], max_tokens=first + 1)
    assert reply.usage.completion_tokens == first + 1 < first + second
    assert token_ids(reply)[1] == turn_ids(expected[3])[1][:1]
    reply = running.ask(ROWS[3], max_completion_tokens=first)  # nothing is left for the turn with the picture
    assert (reply.choices[0].finish_reason, reply.usage.vt_trl["status"]) == ("length", "context_limit")
    assert reply.usage.vt_trl["turns"] == 1
    with pytest.raises(openai.BadRequestError, match="max_tokens is 13, and this server allows 12") as error:
        running.ask(ROWS[3], max_tokens=13)
    assert error.value.code == "too_many_tokens" and error.value.param == "max_tokens"


def test_models_and_health(running):
    with running.client() as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
    health = httpx.get(running.url.replace("/v1", "/health"))
    assert (health.status_code, health.json()) == (200, {"status": "ok", "requests": 0})
    missing = httpx.get(running.url + "/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "unknown_route"


def _bomb() -> str:
    return data_url(png((0, 0, 0), (1000, 1000)))  # a few kB as a file, above the limit of 300,000 pixels


URL = data_url(picture())
BAD = {
    "no image": (with_parts(TEXT), "no_image", "0 images"),
    "text alone": ([{"role": "user", "content": "hello"}], "no_image", "0 images"),
    "two images": (with_parts(picture_part(URL), picture_part(URL), TEXT), "too_many_images", "2 images"),
    "no question": (with_parts(picture_part(URL)), "no_question", "no question"),
    "long question": (
        with_parts(picture_part(URL), {"type": "text", "text": "x" * 501}),
        "question_too_long",
        "more than 500",
    ),
    "two markers": (
        with_parts(picture_part(URL), {"type": "text", "text": "<image> and <image>"}),
        "bad_question",
        "2 image markers",
    ),
    "not base64": (with_parts(picture_part("data:image/png;base64,%%%"), TEXT), "bad_url", "no valid base64"),
    "no picture": (with_parts(picture_part(data_url(b"hello")), TEXT), "invalid_image", "none of the formats"),
    "no image type": (with_parts(picture_part("data:text/html;base64,aGk="), TEXT), "bad_url", "must begin"),
    "too many bytes": (
        with_parts(picture_part(data_url(bytes(100_001))), TEXT),
        "image_too_large",
        "more than 100000 bytes",
    ),
    "too many pixels": (with_parts(picture_part(_bomb()), TEXT), "invalid_image", "declares 1000 x 1000"),
    "too long a shape": (
        with_parts(picture_part(data_url(png((0, 0, 0), (1000, 2)))), TEXT),
        "unusable_request",
        "aspect ratio",
    ),
    "a system text": (
        [{"role": "system", "content": "Be rude."}, *with_parts(picture_part(URL), TEXT)],
        "unsupported_messages",
        "one user message",
    ),
    "a file": (with_parts(picture_part("/etc/passwd"), TEXT), "remote_image_refused", "fetches no images"),
    "a file URL": (with_parts(picture_part("file:///etc/passwd"), TEXT), "remote_image_refused", "fetches no images"),
    "remote": (
        with_parts(picture_part("http://127.0.0.1:9/x.png"), TEXT),
        "remote_image_refused",
        "fetches no images",
    ),
    "audio": (with_parts({"type": "input_audio"}, TEXT), "invalid_request", "messages.0.content"),
}


@pytest.mark.parametrize(("said", "code", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_bad_messages(running, said, code, message, stream):
    with running.client() as client, pytest.raises(openai.BadRequestError, match=message) as error:
        client.chat.completions.create(model="tiny", messages=said, stream=stream)
    assert error.value.code == code and error.value.type == "invalid_request_error"
    assert running.service.in_flight == 0


@pytest.mark.parametrize(
    ("settings", "code", "param"),
    [
        ({"model": "gpt-4o"}, "model_not_found", "model"),
        ({"n": 2}, "invalid_request", "n"),
        ({"temperature": 3.0}, "invalid_request", "temperature"),
        ({"max_tokens": 0}, "invalid_request", "max_tokens"),
        ({"stop": ["x"]}, "unsupported_parameter", "stop"),
        ({"extra_body": {"vt_trl": {"turn": True}}}, "unsupported_parameter", "vt_trl.turn"),
    ],
)
def test_bad_settings(running, settings, code, param):
    with pytest.raises(openai.BadRequestError) as error:
        running.ask(ROWS[0], **settings)
    assert (error.value.code, error.value.param) == (code, param)


def test_bodies(running):
    url, json = running.url + "/chat/completions", {"Content-Type": "application/json"}
    large = httpx.post(url, content=b"x" * 200_001, headers=json)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
    chunked = httpx.post(url, content=iter([b"x" * 100_000] * 3), headers=json)  # without a length
    assert chunked.status_code == 413
    assert httpx.post(url, content=b"{}").status_code == 415  # what a page elsewhere could send
    broken = httpx.post(url, content=b"{", headers=json)
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_request")


def test_key(runner):
    with serving(runner, api_key="right-key") as server:
        for key in ("wrong-key", "right-key-and-more", "right"):
            with server.client(key) as client, pytest.raises(openai.AuthenticationError) as error:
                client.chat.completions.create(model="tiny", messages=messages(ROWS[0]))
            assert error.value.code == "invalid_api_key" and "right-key" not in str(error.value)
        with server.client("right-key") as client:
            assert client.chat.completions.create(model="tiny", messages=messages(ROWS[0])).choices
        assert httpx.get(server.url + "/models").status_code == 401
        assert httpx.get(server.url.replace("/v1", "/health")).status_code == 200


class Slow:
    """A scripted policy whose first sample waits until it is let go."""

    def __init__(self, runner: RolloutRunner):
        self.go, self.asked = threading.Event(), threading.Event()
        self.script = Script(runner.encoder.tokenizer, lambda member, turn: answer("7"))
        environment = lambda: ResizeEnv(**ENVIRONMENT)  # noqa: E731
        backend = ScriptedBackend(self._sample)
        self.runner = RolloutRunner(environment, backend, runner.encoder, runner.stop_ids, Limits(64, 256))

    def _sample(self, request):
        self.asked.set()
        self.go.wait(30)
        return self.script(request)


@pytest.fixture
def slow(runner):
    made = Slow(runner)
    yield made
    made.go.set()


def test_too_many_requests(slow):
    with serving(slow.runner, ServeLimits(requests=1)) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.ask, ROWS[0])
        assert slow.asked.wait(30)
        with pytest.raises(openai.RateLimitError) as error:
            server.ask(ROWS[1])
        assert error.value.response.headers["retry-after"] == "1" and error.value.code == "busy"
        slow.go.set()
        assert first.result().choices[0].message.content == "7"
        assert server.ask(ROWS[1]).choices[0].message.content == "7"


def test_timeouts(slow):
    with serving(slow.runner, ServeLimits(seconds=0.3)) as server:
        with pytest.raises(openai.InternalServerError) as error:
            server.ask(ROWS[0])
        assert (error.value.status_code, error.value.code) == (504, "timeout")
        slow.go.set()
        until(lambda: server.service.in_flight == 0)
        slow.go.clear()
        slow.asked.clear()
        with pytest.raises(openai.APIError, match="no answer within 0.3 s"):  # the status was 200 by then
            server.ask(ROWS[0], stream=True)
        assert slow.asked.is_set()
        slow.go.set()
        until(lambda: server.service.in_flight == 0)


def test_who_hangs_up_is_sampled_no_further(slow):
    slow.runner.environment = asks_first
    with serving(slow.runner) as server:
        with server.client() as client, pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).chat.completions.create(model="tiny", messages=messages(ROWS[0]))
        until(lambda: server.service.in_flight == 0)
        slow.go.set()
        assert server.ask(ROWS[1]).usage.vt_trl["turns"] == 2
        assert len(slow.script.requests) == 3  # one of the first request, two of the second


def test_a_shutdown_lets_requests_finish(slow):
    with serving(slow.runner) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.ask, ROWS[0])
        assert slow.asked.wait(30)
        server.server.should_exit = True
        time.sleep(0.3)
        assert not first.done()
        slow.go.set()
        assert first.result().choices[0].message.content == "7"
    assert not server.service.engine.healthy  # its thread has ended


def test_a_broken_backend_fails_its_requests_and_serves_the_next(slow):
    slow.go.set()
    working, slow.script = slow.script, None  # calling None raises
    with serving(slow.runner) as server:
        with pytest.raises(openai.InternalServerError) as error:
            server.ask(ROWS[0])
        assert error.value.code == "internal_error" and "NoneType" not in str(error.value)
        slow.script = working
        assert server.ask(ROWS[0]).choices[0].message.content == "7"


def until(holds, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_nothing_is_kept_of_a_request(running: Running):
    running.ask(ROWS[0])
    engine = running.service.engine
    until(lambda: len(engine.runner.encoder.features) == 0 and not engine._waiting)
