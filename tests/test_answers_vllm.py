"""Evaluation, pipeline and server on vLLM: token for token what transformers writes, tool call and pictures included.

One engine for all that samples in this process, and one vLLM server for what asks a server.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from parrot import Reader, make_reader
from serving import Running, token_ids
from vllm_serving import vllm_server

from vt_trl import cli, inference
from vt_trl.commands import serve
from vt_trl.evaluation import run as evaluation
from vt_trl.generation.base import SamplingSettings
from vt_trl.generation.fixed_engine import FixedEngine
from vt_trl.pipeline import VisionThinkPipeline
from vt_trl.serving.app import Service
from vt_trl.serving.background import in_background

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

LIMITS = {"dtype": "float32", "max_turn_tokens": 40, "max_completion_length": 512, "max_model_length": 1024}


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Reader:
    return make_reader(tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="module")
def opened():
    """Backends on vLLM that were opened: at most one at a time, which serves whoever opens the next."""
    patch, kept, open_backend = pytest.MonkeyPatch(), [], inference.open_backend

    def open_once(checkpoint, *sizes):
        if not checkpoint.uses_vllm:
            return open_backend(checkpoint, *sizes)
        if not kept:
            kept.append(open_backend(checkpoint, *sizes))
        return kept[0]

    patch.setattr(inference, "open_backend", open_once)
    yield kept
    patch.undo()
    for backend in kept:
        backend.engine.close()


@pytest.fixture(scope="module")
def expected(reader) -> list:
    """The rows' rollouts on transformers: two that ask for the full picture, and two that do not."""
    pipe = VisionThinkPipeline(reader.path, environment_args=reader.environment, **LIMITS)
    results = pipe([{"image": row["image"], "question": row["question"]} for row in reader.rows], batch_size=4)
    assert [result.answer for result in results] == [row["answer"][0] for row in reader.rows]
    assert [len(result.turns) for result in results] == [2, 2, 1, 1]
    return [result.rollout for result in results]


def words(reader: Reader, backend: str, **more) -> list[str]:
    """Options that commands share."""
    options = LIMITS | {"backend": backend, "environment_args": json.dumps(reader.environment)} | more
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def evaluated(reader: Reader, out: Path, backend: str, monkeypatch) -> tuple[dict, list]:
    """Results of the command, and every rollout in the order of playing."""
    rollouts, play = [], evaluation.play_rows

    def played(*args, **named):
        done = play(*args, **named)
        rollouts.extend(done.rollouts)
        return done

    places = ["--model", f"reader={reader.path}", "--data", f"rows={reader.rows_folder}", "--out", str(out)]
    policies = ["--policies", "two-turn", "always-full", "--shard-rows", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "play_rows", played)
        assert cli.main(["evaluate", *places, *policies, *words(reader, backend)]) == 0
    return json.loads((out / "results.json").read_text()), rollouts


def test_evaluation_gives_the_tokens_and_the_numbers_of_transformers(reader, expected, opened, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(FixedEngine, "close", lambda engine: closed.append(engine))
    plain, theirs = evaluated(reader, tmp_path / "plain", "transformers", monkeypatch)
    assert not opened and not closed
    found, ours = evaluated(reader, tmp_path / "vllm", "vllm", monkeypatch)
    assert closed == [opened[0].engine]  # given up before a next model would be loaded
    facts = [[(cell | {"seconds": 0}) for cell in one["cells"]] for one in (found, plain)]
    assert facts[0] == facts[1]
    assert [cell["accuracy"] for cell in facts[0]] == [1.0, 1.0]
    assert (facts[0][0]["rows"], facts[0][0]["unreadable"], facts[0][0]["request_rate"]) == (5, 1, 0.5)
    assert len(ours) == len(theirs) == 10 and ours[4] is None  # the fifth row has no readable picture
    for one, other in zip(ours, theirs, strict=True):
        if one is not None:
            assert one.completion_ids == other.completion_ids and one.loss_mask == other.loss_mask
    assert [one.completion_ids for one in ours[:4]] == [one.completion_ids for one in expected]


def command(reader: Reader, *more: str, **options) -> Service:
    """What `vt-trl serve` would run."""
    _, parsed, _ = cli.parse(["serve", str(reader.path), "--name", "tiny", *words(reader, **options), *more])
    return serve.make_service(parsed)


def usage_of(rollout) -> dict:
    sampled = sum(rollout.loss_mask)
    read = len(rollout.prompt_ids) + len(rollout.completion_ids) - sampled
    own = {"visual_tokens": rollout.visual_tokens, "asked": rollout.asked, "turns": len(rollout.turns)}
    counts = {"prompt_tokens": read, "completion_tokens": sampled, "total_tokens": read + sampled}
    return counts | {"vt_trl": own | {"status": rollout.status.value}}


def ask_all(running: Running, rows: list[dict]) -> list:
    """Replies to all rows, asked at the same time, each twice."""
    with ThreadPoolExecutor(2 * len(rows)) as pool:
        return list(pool.map(running.ask, rows + rows))


def test_the_server_in_process_answers_like_the_rollout_loop(reader, expected, opened):
    service = command(reader, backend="vllm")
    with in_background(service) as (url, server):
        running = Running(url, service, server)
        for reply, rollout in zip(ask_all(running, reader.rows), expected * 2, strict=True):
            assert reply.choices[0].message.content == rollout.answer
            assert token_ids(reply) == [list(turn.token_ids) for turn in rollout.turns]
            assert reply.usage.model_dump(exclude_none=True) == usage_of(rollout)
        cut = running.ask(reader.rows[0], max_tokens=len(expected[0].turns[0].token_ids))
        assert (cut.choices[0].finish_reason, cut.usage.vt_trl["status"]) == ("length", "context_limit")
        drawn = running.ask(reader.rows[1], temperature=1.5, seed=3, extra_body={"vt_trl": {"turns": True, "id": "x"}})
    runner = service.engine.runner
    settings = SamplingSettings(temperature=1.5, seed=3)
    (alone,) = runner.run([reader.rows[1] | {"id": "x"}], 1, settings)
    assert token_ids(drawn) == [list(turn.token_ids) for turn in alone.turns]
    assert alone.completion_ids != expected[1].completion_ids
    assert not service.engine.healthy and service.in_flight == 0  # its thread has ended with the server


def test_a_vllm_server_upstream_gives_the_same_answers_and_counts(reader, expected, tmp_path):
    with vllm_server(reader.path, tmp_path / "log", "--max-model-len", "1024") as upstream:
        upstream.wait_for()
        service = command(reader, "--upstream", f"{upstream.url}/v1", backend="transformers")
        with in_background(service) as (url, server):
            replies = ask_all(Running(url, service, server), reader.rows)
    for reply, rollout in zip(replies, expected * 2, strict=True):
        assert reply.choices[0].message.content == rollout.answer
        assert [turn["text"] for turn in reply.vt_trl["turns"]] == [turn.text for turn in rollout.turns]
        assert reply.usage.model_dump(exclude_none=True) == usage_of(rollout)


def test_closing_a_model_ends_vllms_process(reader, opened):
    model = inference.PolicyModel(reader.path, backend="vllm", **LIMITS)
    assert model.backend is opened[0]
    engines = [one for one in psutil.Process().children(recursive=True) if "EngineCor" in one.name()]
    assert engines
    opened.clear()
    model.close()
    _, alive = psutil.wait_procs(engines, timeout=20)
    assert not alive
