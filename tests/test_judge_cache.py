"""Verdicts on disk: what is kept, under which key, and what happens when the disk does not work."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import threading
from pathlib import Path

from diskcache import Cache
from test_judge_reward import Scripted

from vt_trl.judges import OpenAIJudge, make_judge
from vt_trl.judges.base import Case, Judgement, Verdict
from vt_trl.judges.cache import CachedJudge, default_folder


def judge_once(judge: CachedJudge, *cases: Case) -> list[Judgement]:
    judge.open()

    async def go():
        try:
            return await judge.judge(cases)
        finally:
            await judge.close()

    return asyncio.run(go())


CASE = Case.of("q", "x", "x")


def test_verdicts_are_kept_on_disk_for_other_runs_but_failures_are_not(tmp_path):
    first, second = Scripted(broken=["?"]), Scripted()
    bad = Case.of("q", "x", "?")
    assert [j.verdict for j in judge_once(CachedJudge(first, tmp_path), CASE, bad)] == [Verdict.RIGHT, Verdict.FAILED]
    assert [j.verdict for j in judge_once(CachedJudge(second, tmp_path), CASE, bad)] == [Verdict.RIGHT, Verdict.WRONG]
    assert second.asked == [bad]


def test_another_model_prompt_or_setting_has_its_own_verdicts(tmp_path):
    class Other(Scripted):
        def fingerprint(self):
            return super().fingerprint() | {"prompt": 2}

    judge_once(CachedJudge(Scripted(), tmp_path), CASE)
    other = Other()
    judge_once(CachedJudge(other, tmp_path), CASE)
    assert other.asked == [CASE]
    prints = [
        OpenAIJudge(),
        OpenAIJudge(model="gpt-4o-mini"),
        OpenAIJudge(base_url="http://127.0.0.1:1/v1"),
        OpenAIJudge(rubric="Be kind."),
        OpenAIJudge(temperature=1.0),
        make_judge("local"),
        make_judge("local", {"threshold": 0.7}),
        make_judge("cascade"),
        make_judge("cascade", {"llm": "local"}),
    ]
    assert len({json.dumps(judge.fingerprint(), sort_keys=True) for judge in prints}) == len(prints)


def test_the_disk_holds_json_only_and_never_unpickles(tmp_path):
    judge_once(CachedJudge(Scripted(), tmp_path), CASE)
    with sqlite3.connect(tmp_path / "cache.db") as database:
        modes = {mode for (mode,) in database.execute("SELECT mode FROM Cache")}
        assert modes and 4 not in modes  # diskcache's mode of a pickle
        database.execute("UPDATE Cache SET mode = 4")
    again = Scripted()
    assert judge_once(CachedJudge(again, tmp_path), CASE)[0].verdict is Verdict.RIGHT
    assert again.asked == [CASE]


def test_a_disk_that_does_not_work_costs_the_cache_not_the_run(tmp_path, caplog, monkeypatch):
    file = tmp_path / "file"
    file.write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        assert judge_once(CachedJudge(Scripted(), file), CASE)[0].verdict is Verdict.RIGHT
    assert "stay in memory" in caplog.text

    def full(*args, **kwargs):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Cache, "set", full)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert judge_once(CachedJudge(Scripted(), tmp_path / "new"), CASE)[0].verdict is Verdict.RIGHT
    assert "disk is full" in caplog.text


def test_two_processes_can_share_the_disk(tmp_path):
    errors = []

    def work(number: int) -> None:
        try:
            judge_once(CachedJudge(Scripted(), tmp_path), *(Case.of("q", "x", f"{number % 2} {n}") for n in range(50)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_the_default_cache_lies_outside_every_output_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "vt_trl" / "judge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder().is_relative_to(Path.home())
