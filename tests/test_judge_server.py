"""The judge server of the tests does on the wire what it says, or tests of judges would prove nothing."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from benchmarks.judge_server import (
    Behaviour,
    JudgeServer,
    Received,
    content,
    content_filter,
    content_filter_400,
    cut,
    drip,
    empty_choices,
    hang,
    html,
    huge,
    no_structured_output,
    null_content,
    other_case,
    per_case,
    random_failures,
    refusal,
    sequence,
    server_error,
    status,
    too_many,
    two_choices,
    unauthorised,
)
from vt_trl.judges.base import Case
from vt_trl.judges.prompt import RUBRIC, SCHEMA, case_with_code, code_of, read_json_reply, read_plain_reply

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

FORMAT = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA}}
DOG = Case.of("Which animal?", ["dog", "hound"], "Dog")
CAT = Case.of("Which animal?", "dog", "cat")


def payload(case: Case, structured: bool = True) -> dict[str, Any]:
    messages = [{"role": "system", "content": RUBRIC}, {"role": "user", "content": case_with_code(case)}]
    return {"model": "m", "messages": messages} | ({"response_format": FORMAT} if structured else {})


def talk(server: JudgeServer, dialogue: Callable[[Any], Awaitable[Any]]) -> Any:
    """What a dialogue between one HTTP client and a server that is already entered comes to."""

    async def go() -> Any:
        limits = httpx.Limits(max_connections=300)
        async with httpx.AsyncClient(trust_env=False, timeout=30, limits=limits) as client:
            return await dialogue(client)

    return asyncio.run(go())


def ask(script: Any, *cases: Case, structured: bool = True, headers: dict[str, str] | None = None) -> list[Any]:
    """Responses, or the errors in their place, to requests one after the other."""
    with JudgeServer(script) as server:

        async def dialogue(client: httpx.AsyncClient) -> list[Any]:
            replies = []
            for case in cases or (DOG,):
                try:
                    url = f"{server.base_url}/chat/completions"
                    replies.append(await client.post(url, json=payload(case, structured), headers=headers))
                except httpx.HTTPError as error:
                    replies.append(error)
            return replies

        return talk(server, dialogue)


def choice(response: httpx.Response) -> dict[str, Any]:
    return response.json()["choices"][0]


def test_an_honest_server_answers_on_one_connection_and_records_what_it_got() -> None:
    async def dialogue(client: httpx.AsyncClient) -> list[httpx.Response]:
        url = f"{server.base_url}/chat/completions"
        sent = [(DOG, True), (CAT, True), (DOG, False), (CAT, False)]
        replies = [await client.post(url, json=payload(*one), headers={"X-Test": "1"}) for one in sent]
        return [*replies, await client.get(f"{server.base_url}/models")]

    with JudgeServer() as server:
        *replies, stray = talk(server, dialogue)
    texts = [choice(reply)["message"]["content"] for reply in replies]
    assert [read_json_reply(text, case) for text, case in zip(texts[:2], (DOG, CAT), strict=True)] == [True, False]
    assert [read_plain_reply(text, case) for text, case in zip(texts[2:], (DOG, CAT), strict=True)] == [True, False]
    assert set(replies[0].json()) == {"id", "object", "created", "model", "choices", "usage"}
    assert stray.status_code == 404 and server.strays == ["GET /v1/models"]
    assert server.connections == server.in_flight_max == 1 and server.in_flight == 0
    assert [(one.number, one.attempt, one.code) for one in server.requests] == [
        (0, 0, code_of(DOG)),
        (1, 0, code_of(CAT)),
        (2, 1, code_of(DOG)),
        (3, 1, code_of(CAT)),
    ]
    first = server.requests[0]
    assert (first.path, first.headers["x-test"], first.body["model"]) == ("/v1/chat/completions", "1", "m")
    assert first.case == {
        "question": "Which animal?",
        "accepted_answers": ["dog", "hound"],
        "answer_to_grade": "Dog",
    }
    assert first.time <= server.requests[-1].time <= time.monotonic()


def test_the_openai_clients_take_it_for_real() -> None:
    async def go(server: JudgeServer) -> list[Any]:
        shared = {"max_retries": 0, "api_key": "sk-secret"}
        async with (
            openai.DefaultAsyncHttpxClient(trust_env=False) as http,
            openai.AsyncOpenAI(base_url=server.base_url, http_client=http, **shared) as plain,
            openai.AsyncAzureOpenAI(
                azure_endpoint=server.azure_endpoint, api_version="2024-10-21", http_client=http, **shared
            ) as azure,
        ):
            results = []
            for client in (plain, azure, plain, plain, plain, plain):
                try:
                    results.append(await client.chat.completions.create(**payload(DOG)))
                except openai.OpenAIError as error:
                    results.append(error)
            return results

    with JudgeServer(sequence(None, None, too_many(3), unauthorised(), cut(None), "prose")) as server:
        one, azure, many, denied, broken, prose = asyncio.run(go(server))
    assert read_json_reply(one.choices[0].message.content, DOG) and one.usage.total_tokens > 0
    assert read_json_reply(azure.choices[0].message.content, DOG)
    assert server.requests[1].path == "/openai/deployments/m/chat/completions?api-version=2024-10-21"
    assert server.requests[1].headers["api-key"] == "sk-secret"
    assert isinstance(many, openai.RateLimitError) and many.response.headers["retry-after"] == "3"
    assert isinstance(denied, openai.AuthenticationError) and "Bearer sk-secret" in str(denied)
    assert isinstance(broken, openai.APIConnectionError)
    assert prose.choices[0].message.content == "prose"


def test_errors_carry_their_status_headers_and_body() -> None:
    date = "Wed, 21 Oct 2065 07:28:00 GMT"
    script = sequence(server_error(), status(503, date), status(529, 1.5, retry_after_ms=20), status(502, body="oops"))
    plain, dated, overloaded, bad = ask(script, *[DOG] * 4)
    assert plain.status_code == 500 and "message" in plain.json()["error"] and "retry-after" not in plain.headers
    assert (dated.status_code, dated.headers["retry-after"]) == (503, date)
    assert (overloaded.headers["retry-after"], overloaded.headers["retry-after-ms"]) == ("1.5", "20")
    assert (overloaded.status_code, bad.text) == (529, "oops")


def test_odd_replies_are_what_their_names_say() -> None:
    assert choice(ask(content("Score: 0, not 10", "length"))[0]) == {
        "index": 0,
        "message": {"role": "assistant", "content": "Score: 0, not 10", "refusal": None},
        "finish_reason": "length",
    }
    page, lie = ask(sequence(html(), html("application/json")), DOG, DOG)
    assert page.status_code == lie.status_code == 200 and page.text == lie.text and "<html>" in page.text
    assert (page.headers["content-type"][:9], lie.headers["content-type"]) == ("text/html", "application/json")
    assert ask(empty_choices())[0].json()["choices"] == []
    assert choice(ask(null_content())[0])["message"]["content"] is None
    assert choice(ask(refusal("No."))[0])["message"] == {"role": "assistant", "content": None, "refusal": "No."}
    filtered = choice(ask(content_filter())[0])
    assert (filtered["finish_reason"], filtered["message"]["content"]) == ("content_filter", None)
    assert [one["message"]["content"] for one in ask(two_choices("a", "b"))[0].json()["choices"]] == ["a", "b"]
    large = ask(huge(300_000))[0]
    assert len(large.content) == 300_000 and choice(large)["finish_reason"] == "stop"
    echo = ask(unauthorised(), headers={"api-key": "k-{1}"})[0]
    assert echo.status_code == 401 and "k-{1}" in echo.text


def test_bad_requests_look_like_those_of_real_servers() -> None:
    azure = ask(content_filter_400())[0]
    assert (azure.status_code, azure.json()["error"]["code"]) == (400, "content_filter")
    refused = ask(no_structured_output())[0]
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")
    assert "not supported" in refused.json()["error"]["message"]
    assert read_plain_reply(choice(ask(no_structured_output(), structured=False)[0])["message"]["content"], DOG)


def test_a_mixed_up_reply_is_honest_about_another_case() -> None:
    script = sequence(other_case(), None, None, other_case())
    nobody, _, _, mixed = (choice(reply)["message"]["content"] for reply in ask(script, DOG, DOG, CAT, CAT))
    assert json.loads(nobody) == {"code": "00000000", "verdict": "right"}
    assert json.loads(mixed) == {"code": code_of(DOG), "verdict": "right"}


@pytest.mark.parametrize("behaviour", [cut(None), cut(0), cut(15), cut(None, reset=False), cut(15, reset=False)])
def test_a_cut_connection_is_an_error_and_the_next_request_gets_a_new_one(behaviour: Behaviour) -> None:
    broken, fine = ask(sequence(behaviour), DOG, DOG)
    assert isinstance(broken, httpx.ReadError if behaviour.reset else httpx.RemoteProtocolError)
    assert fine.status_code == 200


def test_a_cut_comes_after_the_bytes_it_promises() -> None:
    async def dialogue(client: httpx.AsyncClient) -> bytes:
        got = b""
        with pytest.raises(httpx.RemoteProtocolError):
            async with client.stream("POST", f"{server.base_url}/chat/completions", json=payload(DOG)) as response:
                async for part in response.aiter_raw():
                    got += part
        return got

    with JudgeServer(cut(15, reset=False)) as server:
        assert talk(server, dialogue) == b'{"id": "chatcmp'


def test_a_dripping_reply_takes_its_time_and_is_whole() -> None:
    start = time.monotonic()
    reply, next_one = ask(sequence(drip(0.001)), DOG, CAT)
    assert time.monotonic() - start > 0.001 * len(reply.content)
    assert read_json_reply(choice(reply)["message"]["content"], DOG) and next_one.status_code == 200


def test_a_hanging_request_ends_with_the_client_or_the_server_and_leaves_no_thread() -> None:
    async def dialogue(client: httpx.AsyncClient) -> None:
        url = f"{server.base_url}/chat/completions"
        for _ in range(3):  # given up, so never two at once
            with pytest.raises(httpx.ReadTimeout):
                await client.post(url, json=payload(DOG), timeout=0.1)
        assert server.in_flight_max == 1
        waiting = [asyncio.create_task(client.post(url, json=payload(CAT))) for _ in range(20)]
        while server.in_flight < len(waiting):
            await asyncio.sleep(0.01)
        start = time.monotonic()
        await asyncio.to_thread(server.__exit__, None, None, None)
        assert time.monotonic() - start < 2
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(error, httpx.TransportError) for error in errors)

    threads = threading.active_count()
    server = JudgeServer(hang(60)).__enter__()
    talk(server, dialogue)
    assert threading.active_count() == threads and server.in_flight == 0
    start = time.monotonic()
    assert choice(ask(hang(0.2))[0])["finish_reason"] == "stop" and time.monotonic() - start > 0.2


def test_plays_follow_the_case_and_its_attempts() -> None:
    script = per_case({"Dog": [too_many(0), None, server_error()], "cat": "no idea"})
    replies = ask(script, DOG, CAT, DOG, DOG, CAT, DOG)
    assert [reply.status_code for reply in replies] == [429, 200, 200, 500, 200, 200]
    assert choice(replies[1])["message"]["content"] == choice(replies[4])["message"]["content"] == "no idea"
    assert ask(per_case(lambda answer: status(418) if answer == "cat" else None), CAT)[0].status_code == 418


def many_at_once(server: JudgeServer, count: int) -> list[Any]:
    cases = [Case.of("Which number?", str(index), str(index + index % 2)) for index in range(count)]

    async def dialogue(client: httpx.AsyncClient) -> list[Any]:
        url = f"{server.base_url}/chat/completions"
        posts = (client.post(url, json=payload(case)) for case in cases)
        return await asyncio.gather(*posts, return_exceptions=True)

    replies = talk(server, dialogue)
    for index, reply in enumerate(replies):
        if isinstance(reply, httpx.Response) and reply.status_code == 200:
            assert read_json_reply(choice(reply)["message"]["content"], cases[index]) is (index % 2 == 0)
    return replies


def test_two_hundred_requests_at_once_are_all_answered_rightly() -> None:
    with JudgeServer(latency=0.5) as server:
        replies = many_at_once(server, 200)
    assert {reply.status_code for reply in replies} == {200} and len(server.requests) == 200
    assert 50 < server.in_flight_max <= 200


def test_random_failures_hit_their_share_and_the_same_cases_again() -> None:
    def outcomes() -> list[str]:
        with JudgeServer(random_failures(0.3, seed=1)) as server:
            replies = many_at_once(server, 100)
        return [str(getattr(reply, "status_code", type(reply).__name__)) for reply in replies]

    first = outcomes()
    assert first == outcomes()
    assert 15 < sum(one != "200" for one in first) < 45 and {"200", "429", "500", "ReadError"} <= set(first)


def test_a_broken_script_is_raised_in_the_test() -> None:
    def script(received: Received) -> None:
        raise KeyError("mistake")

    with pytest.raises(KeyError, match="mistake"):
        ask(script)
