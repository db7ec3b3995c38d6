"""A judge as a reward: a plain callable with TRL's signature, and more when vt_trl's trainer calls it.

With the trainer, a remote judge starts on a rollout the moment it ends (:meth:`JudgeReward.start`) and is waited for
only when advantages are due. With stock TRL it starts when it is called. Either way a verdict that could not be had is
None, and when too many are, the run stops with the last error.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter, deque
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from vt_trl.errors import ConfigError, JudgeOutage
from vt_trl.judges.background import BackgroundLoop
from vt_trl.judges.base import Case, Judge, Judgement, Verdict
from vt_trl.judges.cache import CachedJudge
from vt_trl.types import Rollout, RolloutStatus

_WINDOW = 512  # verdicts looked back on for the share of failures, or the whole batch when that is larger
_ENOUGH = 16  # fewer verdicts say nothing about a share
_TAGS = re.compile(r"</?answer>")


def last_answer(text: str) -> str | None:
    """The text inside the last well-formed answer tags after the reasoning; None without such tags or text."""
    said = text.rpartition("</think>")[2]
    tags = list(_TAGS.finditer(said))
    pairs = [(a, b) for a, b in zip(tags, tags[1:], strict=False) if a[0] == "<answer>" and b[0] == "</answer>"]
    return said[pairs[-1][0].end() : pairs[-1][1].start()].strip() or None if pairs else None


def make_judge_reward(judge: Judge, **settings: Any) -> JudgeReward:
    """The reward of ``judge``: an ``async`` callable when the judge waits on a network, else a plain one."""
    return (AsyncJudgeReward if judge.remote else JudgeReward)(judge, **settings)


class JudgeReward:
    """1.0 for a right answer, 0.0 for a wrong or missing one, None where the judge failed.

    Args:
        judge: asked about each distinct case once.
        lenient: without answer tags judge the whole last reply outside its think block, instead of calling it wrong.
        cache_dir: keep verdicts there for other runs; None: in memory only.
        max_failed: share of failed verdicts, among the last 512, above which JudgeOutage stops the run.
    """

    def __init__(
        self, judge: Judge, lenient: bool = False, cache_dir: str | Path | None = None, max_failed: float = 0.1
    ):
        if not 0 <= max_failed <= 1:
            raise ConfigError(f"judge_max_failed is {max_failed}; it is a share, from 0 to 1.")
        self.judge = CachedJudge(judge, Path(cache_dir) if cache_dir is not None else None)
        self.lenient, self.max_failed = lenient, max_failed
        self.__name__ = f"{judge.name}_judge"  # what TRL calls the reward in its logs
        self._loop: BackgroundLoop | None = None
        self._started: list[Future[Any]] = []
        self._outcomes: deque[bool] = deque(maxlen=_WINDOW)  # True: failed
        self._logged: Counter[str] = Counter()

    def open(self) -> None:
        """Load or connect the judge now, so that what cannot work is said before a step is paid for."""
        self.judge.open()

    def start(self, rollout: Rollout) -> None:
        """Begin to judge a rollout that has just ended, if that takes nothing away from this machine."""
        case = self._case_of(rollout)
        if self.judge.remote and case is not None:
            self._started.append(self._submit(self.judge.judge([case])))

    def __call__(
        self, completions: list[list[dict[str, Any]]], answer: list[Any], **columns: Any
    ) -> list[float | None]:
        """Scores in the order of ``completions``.

        ``answer``: one or several accepted answers per row; ``question``: the row's question, or the last user
        message of ``prompts``; ``rollout``: from vt_trl's trainer. Raises JudgeOutage.
        """
        cases = self._cases(completions, answer, **columns)
        began = time.perf_counter()
        judgements = self._submit(self._judge(cases)).result()
        return self._scores(cases, judgements, time.perf_counter() - began, columns)

    def judgements(self, cases: Sequence[Case]) -> list[Judgement]:
        """Judgements of cases, for tools that want the verdict and its reason."""
        return self._submit(self.judge.judge(cases)).result()

    def judged(self, rollouts: Sequence[Rollout]) -> list[Judgement]:
        """Judgements of finished rollouts, waited for; an episode without an answer is wrong. Raises JudgeOutage."""
        cases = [self._case_of(rollout) for rollout in rollouts]
        judgements = self._submit(self._judge(cases)).result()
        self._scores(cases, judgements, 0.0, {})
        return judgements

    def close(self) -> None:
        """Give back connections, memory and the thread."""
        if self._loop is not None:
            self._loop.submit(self.judge.close()).result()
            self._loop.stop()
            self._loop = None

    def _submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        if self._loop is None:
            self.open()
            self._loop = BackgroundLoop()
        return self._loop.submit(coroutine)

    async def _judge(self, cases: Sequence[Case | None]) -> list[Judgement]:
        asked = [case for case in cases if case is not None]
        judgements = iter(await self.judge.judge(asked))
        return [Judgement.of(False, "no answer") if case is None else next(judgements) for case in cases]

    def _cases(
        self,
        completions: list[list[dict[str, Any]]],
        answer: list[Any],
        question: list[str] | None = None,
        rollout: list[Rollout] | None = None,
        prompts: list[Any] | None = None,
        **columns: Any,
    ) -> list[Case | None]:
        if rollout is not None:
            return [self._case_of(one) for one in rollout]
        if question is None and prompts is None:
            raise ConfigError("the judge needs the column question, or prompts; the data set has neither.")
        questions = question if question is not None else [_last_user_text(prompt) for prompt in prompts]
        given = [self._reading(_last_reply(messages)) for messages in completions]
        return [
            None if text is None else Case.of(asked, golds, text)
            for asked, golds, text in zip(questions, answer, given, strict=True)
        ]

    def _case_of(self, rollout: Rollout) -> Case | None:
        text = rollout.answer
        if text is None and rollout.status is RolloutStatus.NO_ANSWER:
            text = self._reading(rollout.turns[-1].text)
        return None if text is None else Case.of(rollout.row["question"], rollout.row["answer"], text)

    def _reading(self, reply: str) -> str | None:
        """What is judged of a reply."""
        if not self.lenient or "<answer>" in reply:
            return last_answer(reply)
        return reply.rpartition("</think>")[2].strip() or None

    def _scores(
        self,
        cases: Sequence[Case | None],
        judgements: list[Judgement],
        waited: float,
        columns: Mapping[str, Any],
    ) -> list[float | None]:
        self._raise_broken()
        self.judge.forget_failures()
        failed = [j for case, j in zip(cases, judgements, strict=True) if case and j.verdict is Verdict.FAILED]
        judged = sum(case is not None for case in cases)
        self._guard(judged, failed)
        log_metric, log_extra = columns.get("log_metric"), columns.get("log_extra")
        if log_extra is not None:
            log_extra("verdict", [judgement.verdict.value for judgement in judgements])
            log_extra("verdict_reason", [judgement.detail for judgement in judgements])
        if log_metric is not None:
            for name, value in self._numbers(judged, len(failed), waited).items():
                log_metric(name, value)
        return [judgement.score for judgement in judgements]

    def _raise_broken(self) -> None:
        """An exception in what was started early is a fault of the judge's code; it must not go unseen."""
        started, self._started = self._started, []
        for future in started:
            if future.done() and not future.cancelled() and future.exception() is not None:
                raise future.exception()

    def _guard(self, judged: int, failed: list[Judgement]) -> None:
        """Stop a run that is about to train on noise."""
        self._outcomes.extend([False] * (judged - len(failed)) + [True] * len(failed))
        size, bad = len(self._outcomes), sum(self._outcomes)
        if judged > size:  # a batch larger than the window is its own window
            size, bad = judged, len(failed)
        if failed and size >= _ENOUGH and bad / size > self.max_failed:
            raise JudgeOutage(
                f"{bad} of the last {size} verdicts of the judge {self.judge.name!r} failed, more than "
                f"judge_max_failed ({self.max_failed:.0%}) allows. The last error: {failed[-1].detail}. No failed "
                f"verdict was scored: their groups were dropped. Mend the judge and resume, or raise judge_max_failed."
            )

    def _numbers(self, judged: int, failed: int, waited: float) -> dict[str, float]:
        """What changed since the last call, for the logs; ``judge/requests`` and the like only where they exist.

        ``judge/cases``: rollouts with an answer; ``judge/asked``: how many of them the judge itself had to see.
        """
        total = self.judge.counts()
        since = total - self._logged
        self._logged = total
        numbers = {f"judge/{name}": float(since[name]) for name in total}
        own = {"cases": float(judged), "failed": failed / max(judged, 1), "wait_seconds": waited}
        return numbers | {f"judge/{name}": value for name, value in own.items()}


class AsyncJudgeReward(JudgeReward):
    """The same for a judge behind a network: TRL runs it side by side with other ``async`` rewards."""

    async def __call__(  # type: ignore[override]
        self, completions: list[list[dict[str, Any]]], answer: list[Any], **columns: Any
    ) -> list[float | None]:
        cases = self._cases(completions, answer, **columns)
        began = time.perf_counter()
        judgements = await asyncio.wrap_future(self._submit(self._judge(cases)))
        return self._scores(cases, judgements, time.perf_counter() - began, columns)


def _last_reply(messages: list[dict[str, Any]] | str) -> str:
    if isinstance(messages, str):
        return messages
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    return str(replies[-1]) if replies else ""


def _last_user_text(prompt: list[dict[str, Any]] | str) -> str:
    if isinstance(prompt, str):
        return prompt
    content = next((m["content"] for m in reversed(prompt) if m["role"] == "user"), "")
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text")
