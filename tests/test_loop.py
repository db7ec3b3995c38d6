"""The driver of a loop: what runs, what does not run again, and what is left after a failure or a kill."""

from __future__ import annotations

import json
import os
import signal
import time

import loops
import pytest
from loops import manifest_of, result, run, stage, starts, write
from shipped import ROOT

from vt_trl import cli
from vt_trl.errors import ConfigError, StageFailed
from vt_trl.loop.manifest import Manifest, locked
from vt_trl.loop.process import _read, processes_of
from vt_trl.loop.show import show_status


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Stages are processes of their own, and find the tests' modules, too."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))


def rounds(*stages, number=2):
    return {"rounds": number, "stages": list(stages)}


@pytest.fixture
def looped(tmp_path):
    """begin -> (a, b) twice -> end; b is judged by c, and the first round is the better one."""
    stages = [
        stage("begin", text="s"),
        rounds(
            stage("a", text="a${round}", read=["${previous.b.out | begin.out}"]),
            stage("b", text="b", read=["${a.out}"]),
            stage("c", text="c", read=["${b.out}"], score="${scores[round]}"),
        ),
        stage("end", text="e", read=["${best.b.out}"]),
    ]
    best = {"stage": "c", "of": "b", "metric": "score"}
    return write(tmp_path, stages, values={"scores": [0.5, 0.25]}, best=best)


NAMES = ["begin", "r1.a", "r1.b", "r1.c", "r2.a", "r2.b", "r2.c", "end"]


def states(path, *overrides):
    return show_status(path, overrides)


def counts(folder):
    return {name: starts(folder, name) for name in NAMES}


def test_rounds_are_run_in_order_and_the_best_is_taken(looped, tmp_path):
    manifest, said = run(looped)
    assert list(manifest.stages) == NAMES
    assert result(tmp_path, "r2.b") == "sa1ba2b"
    assert result(tmp_path, "end") == "sa1be"  # of round 1, which had the higher score
    best = {"round": 1, "stage": "r1.b", "out": "stages/r1.b", "by": "c", "metric": "score", "value": 0.5}
    assert manifest.best == best | {"of_rounds": [1, 2]}
    record = manifest_of(tmp_path)["stages"]["r1.c"]
    assert record["status"] == "done" and record["metrics"] == {"score": 0.5, "share/easy": 0.25}
    assert record["seed"] == 1 and record["starts"] == 1 and record["versions"]["torch"]
    assert set(record["inputs"]["files"]) == {"<r1.b>"} and record["inputs"]["stages"] == {
        "r1.b": manifest.stages["r1.b"].fingerprint
    }
    assert "[r2.b] done" in said and set(states(looped).values()) == {"done"}


def test_what_is_done_is_not_run_again(looped, tmp_path):
    run(looped)
    _, said = run(looped)
    assert set(counts(tmp_path).values()) == {1} and said.count("done, unchanged") == len(NAMES)


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (["--b.text", "B"], ["r1.b", "r1.c", "r2.a", "r2.b", "r2.c", "end"]),
        (["--scores", "0.5", "0.125"], ["r2.c", "end"]),
        (["--end.text", "E"], ["end"]),
        (["--seed", "7"], NAMES),
    ],
)
def test_what_depends_on_a_change_runs_again_and_nothing_else(looped, tmp_path, change, again):
    run(looped)
    kept = result(tmp_path, "begin")
    run(looped, *change)
    assert counts(tmp_path) == {name: 1 + (name in again) for name in NAMES}
    aside = manifest_of(tmp_path)["aside"]
    assert [one["stage"] for one in aside] == again  # nothing is lost, and nothing old is mixed with the new
    assert all((tmp_path / "out" / one["to"] / "result.txt").is_file() for one in aside)
    assert result(tmp_path, "begin") == kept


def test_a_file_that_changes_and_an_output_that_is_edited_or_lost(tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    (given / "result.txt").write_text("1")
    stages = [stage("a", read=[str(given)]), stage("b", read=["${a.out}"], text="b"), stage("c", text="c")]
    path = write(tmp_path, stages)
    run(path)
    (given / "result.txt").write_text("2")  # the same size
    run(path)
    assert [starts(tmp_path, name) for name in "abc"] == [2, 2, 1] and result(tmp_path, "b") == "2b"

    (tmp_path / "out" / "stages" / "a" / "result.txt").write_text("by hand ")
    _, said = run(path)
    assert "[a] its output was changed since" in said
    assert [starts(tmp_path, name) for name in "abc"] == [2, 3, 1] and result(tmp_path, "b") == "by hand b"

    (tmp_path / "out" / "stages" / "c" / "result.txt").unlink()
    run(path)
    assert [starts(tmp_path, name) for name in "abc"] == [2, 3, 2]


def test_a_finished_stage_can_be_run_again_and_what_is_outdated_be_removed(looped, tmp_path):
    run(looped)
    run(looped, again=["r2.a"], remove_stale=True, until="r2.a")
    assert starts(tmp_path, "r2.a") == 2 and starts(tmp_path, "r2.b") == 1
    assert manifest_of(tmp_path)["aside"][0] | {"at": ""} == {
        "stage": "r2.a", "to": "", "why": "asked to run again", "at": "",
    }  # fmt: skip
    assert not (tmp_path / "out" / "aside").exists()


def test_outputs_of_nobody_are_set_aside(tmp_path):
    path = write(tmp_path, [stage("a", text="new")])
    old = tmp_path / "out" / "stages" / "a"
    old.mkdir(parents=True)
    (old / "result.txt").write_text("old")
    _, said = run(path)
    assert "not in the manifest" in said and result(tmp_path, "a") == "new"
    assert (tmp_path / "out" / "aside" / "a" / "result.txt").read_text() == "old"


def test_a_stage_that_fails_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "quite-a-secret")
    monkeypatch.setenv("MINE", "sk-abcdefgh1234")
    stages = [stage("a", text="a"), stage("b", say_variables=["MY_API_KEY", "MINE"], fail=True), stage("c")]
    path = write(tmp_path, stages)
    with pytest.raises(StageFailed) as error:
        run(path)
    message = str(error.value)
    assert "stage b (module loop_stage) failed: it ended with exit status 3" in message
    assert "last words" in message and "logs/b.log" in message and "Kept and not run again: a." in message
    assert "--say-variables MY_API_KEY MINE" in message and "the same command again" in message
    kept = "".join(file.read_text() for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert "MY_API_KEY ***\nMINE ***\n" in kept and "quite-a-secret" not in kept and "abcdefgh1234" not in kept
    assert states(path) == {"a": "done", "b": "failed", "c": "waiting"}

    run(path, "--b.fail", "false")
    assert [starts(tmp_path, name) for name in "abc"] == [1, 2, 1]
    assert set(states(path, "--b.fail", "false").values()) == {"done"}
    assert states(path) == {"a": "done", "b": "outdated", "c": "done"}  # it was made with another setting


def test_the_command_prints_a_failure_in_a_few_lines(tmp_path, capsys):
    path = write(tmp_path, [stage("a", fail=True)])
    assert cli.main(["loop", str(path)]) == 1
    assert "vt-trl: stage a (module loop_stage) failed" in capsys.readouterr().err


def test_a_stage_that_leaves_nothing_has_failed(tmp_path):
    path = write(tmp_path, [{"name": "a", "run": "module idle_stage", "set": {}}])
    with pytest.raises(StageFailed, match="left nothing in"):
        run(path)


def test_keys_have_no_place_in_a_recipe(tmp_path):
    with pytest.raises(ConfigError, match="'a': text looks like a key"):
        run(write(tmp_path, [stage("a", text="sk-abcdefgh1234")]))
    run(write(tmp_path, [stage("a", text="hf-internal-testing/tiny")]))  # a name on the Hub
    with pytest.raises(ConfigError, match="text looks like a key"):
        run(write(tmp_path, [stage("a", text="https://me:password@host/x")]))
    with pytest.raises(ConfigError, match="HF_TOKEN looks like a key"):
        run(write(tmp_path, [stage("a", env={"HF_TOKEN": "x"})]))


def test_two_drivers_do_not_share_a_folder(looped, tmp_path):
    with locked(tmp_path / "out"), pytest.raises(ConfigError, match="worked on by another"):
        run(looped)


def test_a_manifest_that_cannot_be_read_is_no_reason_to_start_over(looped, tmp_path):
    run(looped)
    (tmp_path / "out" / "loop.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read.*Restore it"):
        run(looped)
    assert set(counts(tmp_path).values()) == {1}


def test_a_bar_is_a_line_now_and_then_and_no_line_is_lost(tmp_path):
    said = []
    read, write_end = os.pipe()
    with os.fdopen(write_end, "wb") as stream:
        stream.write(b"one\r\n\x1b[32mtwo\x1b[0m\n" + b"".join(b"%d/9\r" % n for n in range(10)) + b"9/9\nlast")
    with os.fdopen(read, "rb") as stream:
        _read(stream, said.append)
    assert said == ["one", "two", "0/9", "9/9", "last"]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def steps(folder, name):
    """Which process has done which step of a stage."""
    return {one.name: one.read_text() for one in (folder / "out" / "stages" / name).glob("step-*")}


@pytest.mark.parametrize("at", [0, 3])
def test_a_driver_killed_in_the_middle_goes_on(tmp_path, at):
    """kill -9 while a stage works: it outlives the driver, is ended by the next one, and goes on in its folder."""
    stages = [
        stage("a", text="a", steps=1),
        stage("b", text="b", read=["${a.out}"], steps=30, kill_driver_at=at, resumes=True),
        stage("c", text="c", read=["${b.out}"]),
    ]
    path = write(tmp_path, stages)
    driver = loops.start(path)
    assert driver.wait(120) == -signal.SIGKILL
    record = manifest_of(tmp_path)["stages"]["b"]
    assert record["status"] == "running" and record["token"]
    before = steps(tmp_path, "b")
    manifest, _ = run(path)
    assert not processes_of(record["token"])
    assert result(tmp_path, "c") == "abc" and [starts(tmp_path, name) for name in "abc"] == [1, 2, 1]
    after = steps(tmp_path, "b")
    assert before.items() <= after.items() and len(after) == 30 and len(before) >= at  # nothing was done twice
    assert manifest.stages["b"].starts == 2


def test_what_does_not_resume_starts_in_an_empty_folder(tmp_path):
    path = write(tmp_path, [stage("a", text="a", steps=6, kill_driver_at=3)])
    assert loops.start(path).wait(120) == -signal.SIGKILL
    run(path)
    assert len({*steps(tmp_path, "a").values()}) == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_stage_and_then_the_driver(tmp_path, number, status):
    path = write(tmp_path, [stage("a", text="a", steps=600, resumes=True)])
    driver = loops.start(path)
    mark = tmp_path / "out" / "stages" / "a" / "step-2"
    wait_for(mark.exists)
    driver.send_signal(number)
    said, _ = driver.communicate(timeout=60)
    assert driver.returncode == status, said
    assert f"{number.name}: the loop has ended in order" in said
    record = manifest_of(tmp_path)["stages"]["a"]
    assert record["status"] == "interrupted" and not processes_of(record["token"])
    assert states(path) == {"a": "interrupted"}


def test_a_second_signal_kills(tmp_path):
    path = write(tmp_path, [stage("a", steps=600, stubborn=True)])
    driver = loops.start(path)
    wait_for((tmp_path / "out" / "stages" / "a" / "step-1").exists)
    token = manifest_of(tmp_path)["stages"]["a"]["token"]
    assert states(path) == {"a": "running"}
    driver.send_signal(signal.SIGTERM)
    wait_for(lambda: "asked to end" in (tmp_path / "out" / "logs" / "a.log").read_text())
    assert processes_of(token)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(60) == 143 and not processes_of(token)


def test_the_manifest_survives_a_kill_at_any_write(tmp_path, monkeypatch):
    """It is replaced as a whole: what a reader sees is one of the states it had."""
    run(write(tmp_path, [stage("a", text="a")]))
    before = (tmp_path / "out" / "loop.json").read_bytes()

    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vt_trl.whole.os.replace", cut)
    manifest = Manifest.read(tmp_path / "out")
    manifest.stages["a"].status = "failed"
    with pytest.raises(KeyboardInterrupt):
        manifest.write()
    assert (tmp_path / "out" / "loop.json").read_bytes() == before and json.loads(before)["stages"]["a"]["output"]
