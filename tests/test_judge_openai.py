"""The OpenAI judge against a real HTTP server on loopback that misbehaves as it is told."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import time

import pytest

from benchmarks.judge_server import (
    JudgeServer,
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
from vt_trl.errors import ConfigError
from vt_trl.judges.base import Case, Judgement, Verdict
from vt_trl.judges.openai import OpenAIJudge
from vt_trl.judges.pacing import retry_after
from vt_trl.redact import redacted

pytest.importorskip("openai")
KEY = "sk-vt-trl-5ecret-5ecret"
RIGHT = Case.of("Which animal?", ["dog", "hound"], "Dog")
WRONG = Case.of("Which animal?", ["dog", "hound"], "cat")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch):
    for name in ("OPENAI_BASE_URL", "AZURE_OPENAI_ENDPOINT", "OPENAI_API_VERSION", "WORLD_SIZE", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_VERSION", "2024-10-21")


def ask(server: JudgeServer, *cases: Case, **settings) -> tuple[list[Judgement], OpenAIJudge]:
    """Judgements of ``cases``, all at once, with short pauses."""
    settings = {"max_wait": 0.05, "timeout": 5.0, "base_url": server.base_url} | settings
    judge = OpenAIJudge(**settings)

    async def go() -> list[Judgement]:
        try:
            return await judge.judge(cases)
        finally:
            await judge.close()

    return asyncio.run(go()), judge


def test_asks_for_structured_output_with_rubric_first_and_prediction_last():
    with JudgeServer() as server:
        (right, wrong), judge = ask(server, RIGHT, WRONG)
    assert (right.verdict, wrong.verdict) == (Verdict.RIGHT, Verdict.WRONG)
    assert judge.counts() == {"requests": 2}
    for request in server.requests:
        assert request.body["model"] == "gpt-4o" and request.body["temperature"] == 0
        assert request.body["response_format"]["json_schema"]["strict"] is True
        assert request.headers["authorization"] == f"Bearer {KEY}"
        system, user = (message["content"] for message in request.body["messages"])
        assert judge.rubric in system and request.case["answer_to_grade"] in user.split("accepted_answers")[1]


def test_base_url_and_key_come_from_the_environment(monkeypatch):
    with JudgeServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        (right,), _ = ask(server, RIGHT, base_url=None)
    assert right.verdict is Verdict.RIGHT


def test_azure(monkeypatch):
    with JudgeServer() as server:
        monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", server.azure_endpoint)
        (right, wrong), _ = ask(server, RIGHT, WRONG, api="azure", base_url=None, model="my-deployment")
    assert (right.verdict, wrong.verdict) == (Verdict.RIGHT, Verdict.WRONG)
    path = server.requests[0].path
    assert path == "/openai/deployments/my-deployment/chat/completions?api-version=2024-10-21"
    assert server.requests[0].headers["api-key"] == KEY


def test_without_a_key_nothing_starts(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        OpenAIJudge().open()


TRANSIENT = {
    "429": too_many(),
    "429 with Retry-After": too_many(retry_after=0.02),
    "429 with a date": too_many(retry_after=email.utils.formatdate(usegmt=True)),
    "500": server_error(),
    "503": status(503),
    "408": status(408),
    "cut before the head": cut(None),
    "cut in the body": cut(30),
    "closed in the body": cut(30, reset=False),
    "HTML": html(),
    "HTML called JSON": html("application/json"),
    "empty choices": empty_choices(),
    "no content": null_content(),
    "prose": content("I think that this answer is right."),
    "wrong schema": content('{"score": 1}'),
    "score": content("Score: 0, not 10"),
    "empty": content(""),
    "cut off": content('{"code": "', finish_reason="length"),
    "another code": content('{"code": "00000000", "verdict": "right"}'),
    "contradicting choices": two_choices('{"verdict": "right"}', '{"verdict": "wrong"}'),
    "100 kB": huge(100_000),
}


@pytest.mark.parametrize("behaviour", TRANSIENT.values(), ids=TRANSIENT.keys())
def test_what_passes_is_retried(behaviour):
    with JudgeServer(sequence(behaviour, behaviour)) as server:
        (right,), judge = ask(server, RIGHT)
    assert right.verdict is Verdict.RIGHT
    assert judge.counts()["requests"] == len(server.requests) == 3
    assert judge.counts()["retries"] == 2


@pytest.mark.parametrize("behaviour", TRANSIENT.values(), ids=TRANSIENT.keys())
def test_what_stays_fails_after_the_last_attempt(behaviour):
    with JudgeServer(behaviour) as server:
        (failed,), judge = ask(server, RIGHT, max_attempts=3)
    assert failed.verdict is Verdict.FAILED and failed.detail
    assert len(server.requests) == judge.counts()["requests"] == 3


FINAL = {
    "401": unauthorised(),
    "404": status(404),
    "400": status(400),
    "quota": status(429, body={"error": {"message": "no more", "code": "insufficient_quota"}}),
    "refusal": refusal("I would rather not."),
    "content filter": content_filter(),
    "content filter as an error": content_filter_400(),
    "a long Retry-After": too_many(retry_after=3600),
}


@pytest.mark.parametrize("behaviour", FINAL.values(), ids=FINAL.keys())
def test_what_would_fail_again_is_not_retried(behaviour):
    with JudgeServer(behaviour) as server:
        (failed,), _ = ask(server, RIGHT)
    assert failed.verdict is Verdict.FAILED
    assert len(server.requests) == 1


@pytest.mark.parametrize("behaviour", [hang(30), drip(0.05)], ids=["hang", "drip"])
def test_a_server_that_does_not_come_to_an_end_is_given_up(behaviour):
    with JudgeServer(behaviour) as server:
        began = time.monotonic()
        (failed,), _ = ask(server, RIGHT, timeout=0.3, max_attempts=2)
        assert time.monotonic() - began < 5
    assert failed.verdict is Verdict.FAILED and "0.3 s" in failed.detail
    assert len(server.requests) == 2


def test_retry_after_is_honoured_by_all():
    cases = [Case.of("q", "g", f"answer {n}") for n in range(6)]
    with JudgeServer(sequence(too_many(retry_after=0.6))) as server:
        judgements, judge = ask(server, *cases, concurrency=1, max_wait=5)
    assert all(one.verdict is Verdict.WRONG for one in judgements)
    first, second = server.requests[0].time, server.requests[1].time
    assert second - first >= 0.6  # the other five had to wait as well
    assert judge.counts()["rate_limited"] == 1


def test_retry_after_forms():
    assert retry_after({"retry-after": "3"}) == 3
    assert retry_after({"retry-after-ms": "250"}) == 0.25
    assert retry_after({"retry-after": email.utils.formatdate(time.time() + 100, usegmt=True)}) == pytest.approx(
        100, abs=2
    )
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


def test_plain_text_when_structured_output_is_refused(caplog):
    cases = [Case.of("q", "yes it is", "yes it is" if n % 2 else f"no {n}") for n in range(20)]
    script = lambda received: no_structured_output() if "response_format" in received.body else None  # noqa: E731
    with caplog.at_level(logging.WARNING), JudgeServer(script) as server:
        judgements, judge = ask(server, *cases)
    assert [one.verdict for one in judgements] == [Verdict.WRONG, Verdict.RIGHT] * 10
    assert judge.structured is False
    assert sum("plain text" in record.message for record in caplog.records) == 1
    assert "response_format" not in server.requests[-1].body


def test_a_mixed_up_reply_is_nobodys():
    """The server answers every first request with the verdict of the case before."""
    cases = [Case.of(f"q{n}", "x", "x" if n % 2 else "y") for n in range(40)]
    with JudgeServer(lambda received: other_case() if received.attempt == 0 and received.other else None) as server:
        judgements, judge = ask(server, *cases, concurrency=8)
    assert [one.verdict for one in judgements] == [Verdict.WRONG, Verdict.RIGHT] * 20
    assert judge.counts()["retries"] >= 35


def test_200_concurrent_requests_with_random_failures():
    """1% of requests fail at random: every verdict arrives, and at its own case."""
    cases = [Case.of(f"question {n}", "yes", "yes" if n % 3 == 0 else f"no {n}") for n in range(2000)]
    with JudgeServer(random_failures(0.01, seed=3), latency=0.05) as server:
        judgements, judge = ask(server, *cases, concurrency=200, timeout=30)
    expected = [Verdict.RIGHT if n % 3 == 0 else Verdict.WRONG for n in range(2000)]
    assert [one.verdict for one in judgements] == expected
    assert server.in_flight_max > 100
    counts = judge.counts()
    print(f"sent {counts['requests']}, retried {counts['retries']}, failed 0")
    assert counts["requests"] == 2000 + counts["retries"] and 5 <= counts["retries"] <= 60


def test_concurrency_is_kept():
    cases = [Case.of("q", "g", str(n)) for n in range(40)]
    with JudgeServer(latency=0.05) as server:
        ask(server, *cases, concurrency=5)
    assert server.in_flight_max <= 5


def test_rate_limits_are_kept():
    """At 600 a minute, an eleventh of which may burst, the last of 64 requests cannot come within 0.8 seconds."""
    cases = [Case.of("q", "g", str(n)) for n in range(64)]
    with JudgeServer() as server:
        began = time.monotonic()
        ask(server, *cases, requests_per_minute=600)
        assert max(request.time for request in server.requests) - began >= 0.8
        ask(server, *cases[:1], tokens_per_minute=100_000)
        before = len(server.requests)
        judgements, _ = ask(server, *cases[:40], tokens_per_minute=150_000)
    tokens = 150_000 / 11 / 420  # how many of these prompts are in a burst
    assert all(one.verdict is Verdict.WRONG for one in judgements)
    assert len(server.requests) - before == 40 > tokens


def test_limits_are_shared_out_among_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    cases = [Case.of("q", "g", str(n)) for n in range(20)]
    with JudgeServer(latency=0.05) as server:
        ask(server, *cases, concurrency=8)
    assert server.in_flight_max <= 2


def test_failed_cases_leave_others_alone():
    plays = {"broken": server_error(), "refused": refusal("no"), "slow": hang(30)}
    cases = [Case.of("q", "x", word) for word in ("x", "broken", "y", "refused", "slow", "x ")]
    with JudgeServer(per_case(plays)) as server:
        judgements, _ = ask(server, *cases, timeout=0.5, max_attempts=2)
    assert [one.verdict.value for one in judgements] == ["right", "failed", "wrong", "failed", "failed", "right"]


def test_the_key_is_nowhere(caplog, capsys):
    """Even when the server sends it back: not in details, logs, settings, exceptions."""
    with caplog.at_level(logging.DEBUG), JudgeServer(unauthorised()) as server:
        (failed,), judge = ask(server, RIGHT)
        (azure,), _ = ask(server, RIGHT, api="azure", base_url=server.azure_endpoint)
    printed = capsys.readouterr()
    assert "401" in failed.detail and "401" in azure.detail
    assert any(KEY in request.headers.get("authorization", "") for request in server.requests)
    assert any(KEY in request.headers.get("api-key", "") for request in server.requests)
    everything = [failed.detail, azure.detail, repr(judge.fingerprint()), printed.out, printed.err, caplog.text]
    assert not any(KEY[5:] in text for text in everything)


def test_redaction():
    assert KEY not in redacted(f"Incorrect API key provided: {KEY}. Bearer {KEY}", [KEY])
    assert "abcdefgh1234" not in redacted("key sk-abcdefgh1234, hf_abcdefgh1234, Authorization: Bearer abcdefgh1234")
    assert "pass" not in redacted("http://user:password@host/v1")
    assert redacted("HTTP 500:\n  oops") == "HTTP 500: oops"
    assert len(redacted("x" * 1000)) == 300


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api": "anthropic"}, "openai or azure"),
        ({"concurrency": 0}, "concurrency"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"timeout": -1}, "timeout"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"request_args": {"api_key": KEY}}, "environment"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        OpenAIJudge(**settings)
    assert KEY not in str(error.value)


def test_empty_and_endless_answers_are_not_sent():
    cases = [Case.of("q", "g", " "), Case.of("q", "g", "x" * 100_000), Case.of("q" * 30_000, "g", "x")]
    with JudgeServer() as server:
        judgements, _ = ask(server, *cases)
    assert [one.verdict.value for one in judgements] == ["wrong", "wrong", "failed"]
    assert not server.requests
