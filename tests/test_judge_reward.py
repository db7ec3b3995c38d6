"""A judge as a reward: asked once per distinct case, started early, never scored 0 for a failure."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Sequence

import pytest

from benchmarks.judge_server import JudgeServer, server_error
from vt_trl.errors import ConfigError, JudgeOutage
from vt_trl.judges import CascadeJudge, OpenAIJudge, make_judge, make_judge_reward
from vt_trl.judges.base import Case, Judge, Judgement
from vt_trl.types import Rollout, RolloutStatus, Turn


class Scripted(Judge):
    """Right when prediction and gold are equal; counts what it is asked; ``broken`` predictions fail."""

    name = "scripted"

    def __init__(self, broken: Sequence[str] = (), remote: bool = False, wait: float = 0.0):
        self.broken, self.remote, self.wait = set(broken), remote, wait
        self.asked: list[Case] = []

    async def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        self.asked += cases
        await asyncio.sleep(self.wait)
        return [
            Judgement.failed("the server is down")
            if c.prediction in self.broken
            else Judgement.of(c.prediction in c.golds)
            for c in cases
        ]


def rollout(text: str | None, gold: str = "x", status: RolloutStatus | None = None, reply: str = "") -> Rollout:
    status = status or (RolloutStatus.ANSWERED if text is not None else RolloutStatus.TRUNCATED)
    return Rollout(
        row={"question": "q", "answer": [gold]},
        prompt_ids=[],
        completion_ids=[],
        loss_mask=[],
        logprobs=[],
        images=[],
        messages=[],
        prompt_messages=0,
        turns=[Turn(reply, (), (), True)],
        status=status,
        answer=text,
    )


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def score(reward, rollouts: list[Rollout], **columns) -> list[float | None]:
    scores = reward(
        prompts=[[]] * len(rollouts),
        completions=[said("")] * len(rollouts),
        completion_ids=[[]] * len(rollouts),
        answer=[one.row["answer"] for one in rollouts],
        question=["q"] * len(rollouts),
        rollout=rollouts,
        **columns,
    )
    if not inspect.isawaitable(scores):
        return scores

    async def wait() -> list[float | None]:
        return await scores

    return asyncio.run(wait())


@pytest.fixture
def make(request) -> Callable:
    def build(judge: Judge, **settings):
        reward = make_judge_reward(judge, **settings)
        request.addfinalizer(reward.close)
        return reward

    return build


@pytest.mark.parametrize("remote", [False, True])
def test_right_wrong_failed_and_no_answer(make, remote):
    reward = make(Scripted(broken=["?"], remote=remote), max_failed=1.0)
    assert inspect.iscoroutinefunction(type(reward).__call__) is remote
    assert score(reward, [rollout("x"), rollout("y"), rollout("?"), rollout(None)]) == [1.0, 0.0, None, 0.0]


def test_distinct_cases_are_asked_once_per_run(make):
    judge = Scripted()
    reward = make(judge)
    assert score(reward, [rollout("x"), rollout(" x"), rollout("y"), rollout("x", gold="y")]) == [1, 1, 0, 0]
    assert score(reward, [rollout("y"), rollout("x")]) == [0, 1]
    assert len(judge.asked) == 3


def test_what_is_under_way_is_waited_for_not_asked_again(make):
    judge = Scripted(remote=True, wait=0.2)
    reward = make(judge)
    rollouts = [rollout("x"), rollout("y"), rollout("x")]
    for one in rollouts:
        reward.start(one)
    assert score(reward, rollouts) == [1, 0, 1]
    assert len(judge.asked) == 2


def test_scoring_starts_when_a_rollout_ends(make):
    judge = Scripted(remote=True)
    reward = make(judge)
    reward.start(rollout("x"))
    deadline = time.monotonic() + 5
    while not judge.asked and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(judge.asked) == 1  # before anybody called the reward


def test_a_local_judge_does_not_start_while_the_policy_generates(make):
    judge = Scripted(remote=False)
    reward = make(judge)
    reward.start(rollout("x"))
    time.sleep(0.05)
    assert not judge.asked


def test_failures_are_asked_again_in_the_next_step_and_once_in_this_one(make):
    judge = Scripted(broken=["?"], remote=True)
    reward = make(judge, max_failed=1.0)
    batch = [rollout("?"), rollout("?")]
    for one in batch:
        reward.start(one)
    assert score(reward, batch) == [None, None]
    assert len(judge.asked) == 1
    judge.broken.clear()
    assert score(reward, batch) == [0, 0]
    assert len(judge.asked) == 2


def test_too_many_failures_stop_the_run_with_the_last_error(make):
    reward = make(Scripted(broken=["?"]), max_failed=0.25)
    good = [rollout("x")] * 3
    for _ in range(4):
        assert score(reward, [*good, rollout("?")])[3] is None  # a quarter is allowed
    with pytest.raises(JudgeOutage, match="6 of the last 20 .* the server is down"):
        score(reward, [*good[:2], rollout("?"), rollout("?")])


def test_a_few_verdicts_say_nothing_about_a_share(make):
    reward = make(Scripted(broken=["?"]), max_failed=0.1)
    assert score(reward, [rollout("?")] * 4) == [None] * 4


def test_numbers_for_the_logs(make):
    reward, seen = make(Scripted(broken=["?"]), max_failed=1.0), {}
    log = lambda name, value: seen.__setitem__(name, value)  # noqa: E731
    score(reward, [rollout("x"), rollout("x"), rollout("?"), rollout(None)], log_metric=log)
    assert seen["judge/cases"] == 3 and seen["judge/asked"] == 2 and seen["judge/failed"] == pytest.approx(1 / 3)
    assert seen["judge/wait_seconds"] >= 0
    score(reward, [rollout("x")], log_metric=log)
    assert seen["judge/cases"] == 1 and seen["judge/asked"] == 0


@pytest.mark.parametrize(
    ("reply", "strict", "lenient"),
    [
        ("<think>a</think><answer>x</answer>", 1, 1),
        ("<answer>y</answer> or <answer>x</answer>", 1, 1),
        ("<think>a</think>x", 0, 1),
        ("x", 0, 1),
        ("<answer>x", 0, 0),
        ("", 0, 0),
    ],
)
def test_stock_trl_gives_messages_and_the_last_answer_counts(make, reply, strict, lenient):
    for setting, expected in ((False, strict), (True, lenient)):
        reward = make(Scripted(), lenient=setting)
        assert reward(completions=[said(reply)], answer=["x"], question=["q"]) == [expected]
        prompts = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}]]
        assert reward(completions=[said(reply)], answer=["x"], prompts=prompts) == [expected]


def test_without_question_or_prompts_there_is_nothing_to_judge(make):
    with pytest.raises(ConfigError, match="question"):
        make(Scripted())(completions=[said("x")], answer=["x"])


def test_several_answers_are_judged_by_the_last(make):
    """The environment calls it no answer (and the format reward is lost); the text in the last tags is judged."""
    judge = Scripted()
    reply = "<answer>y</answer><answer>x</answer>"
    assert score(make(judge), [rollout(None, status=RolloutStatus.NO_ANSWER, reply=reply)]) == [1.0]
    assert score(make(judge), [rollout(None, status=RolloutStatus.TRUNCATED, reply=reply)]) == [0.0]


def test_a_bug_in_a_judge_is_an_error_not_a_score(make):
    class Broken(Judge):
        remote = True

        async def judge(self, cases):
            raise KeyError("bug")

    class TooFew(Judge):
        async def judge(self, cases):
            return []

    reward = make(Broken())
    reward.start(rollout("x"))
    with pytest.raises(KeyError, match="bug"):
        score(reward, [rollout("x")])
    with pytest.raises(RuntimeError, match="0 judgements for 1 cases"):
        score(make(TooFew()), [rollout("x")])


def test_a_cascade_asks_the_llm_only_what_the_rule_leaves_open(make):
    rule, llm = Scripted(broken=["open"]), Scripted()
    judge = CascadeJudge(rule, llm)
    reward = make(judge)
    assert score(reward, [rollout("x"), rollout("y"), rollout("open"), rollout("open", gold="open")]) == [1, 0, 0, 1]
    assert [case.prediction for case in llm.asked] == ["open", "open"]
    assert judge.counts()["by_rule"] == 2
    assert not judge.remote and CascadeJudge(rule, OpenAIJudge()).remote


def test_an_outage_drops_nothing_into_the_scores(make, monkeypatch):
    """A server that answers 500 to everything: every score is None, and the run stops."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with JudgeServer(server_error()) as server:
        judge = OpenAIJudge(base_url=server.base_url, max_attempts=2, max_wait=0.01)
        assert score(make(judge), [rollout(f"{n}") for n in range(8)]) == [None] * 8
        with pytest.raises(JudgeOutage, match="HTTP 500"):
            score(make(judge), [rollout(f"{n}") for n in range(16)])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("openia", {}, "Did you mean 'openai'"),
        ("openai", {"modle": "x"}, "Did you mean 'model'"),
        ("openai", {"api_key": "sk-123456789"}, "OPENAI_API_KEY"),
        ("local", {"threshold": 2}, "threshold"),
        ("local", {"backend": "tgi"}, "backend"),
        ("local", {"dtype": "int8"}, "dtype"),
        ("local", {"batch_size": 0}, "batch_size"),
        ("cascade", {"llm": "nobody"}, "nobody"),
        ("no_such_module:Judge", {}, "no_such_module"),
        ("json:JSONDecoder", {}, "subclass"),
    ],
)
def test_settings_that_cannot_work(name, settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_judge(name, settings)
    assert "sk-123456789" not in str(error.value)


def test_a_judge_of_ones_own():
    assert isinstance(make_judge("test_judge_reward:Scripted", {"broken": ["?"]}), Judge)
