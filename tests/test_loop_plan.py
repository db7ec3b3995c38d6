"""A loop's recipe: rounds unrolled, references looked up, and every mistake found before anything runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from loops import RUN, stage, write
from shipped import ROOT

from vt_trl.config import VTGRPOConfig
from vt_trl.errors import ConfigError
from vt_trl.loop import plan_loop
from vt_trl.loop.references import fill, parse, resolve_values
from vt_trl.recipe import parse_recipe
from vt_trl.sft import VTSFTConfig

SFT = {"model": "m", "dataset": "d", "bf16": False}


def rounds(*stages, number=2):
    return {"rounds": number, "stages": list(stages)}


def test_rounds_are_unrolled(tmp_path):
    """Which stages there are, what each takes, and where it leaves it: by hand, for three rounds."""
    stages = [
        stage("begin"),
        rounds(
            stage("sft", read=["${previous.write.out | begin.out}"], text="${round} of ${rounds}"),
            stage("hard", read=["${sft.out}/hard"], score="${rates[round]}"),
            stage("write", read=["${hard.out}"], in_rounds="not_last"),
            number=3,
        ),
        stage("end", read=["${last.hard.out}", "${last.write.out}", "${begin.out}"], text="$${x} ${name}"),
    ]
    plan = plan_loop(write(tmp_path, stages, values={"rates": [1, 2], "name": "n-${base}", "base": "b"}, seed=4))
    assert {one.id: one.uses for one in plan.stages} == {
        "begin": (),
        "r1.sft": ("begin",),
        "r1.hard": ("r1.sft",),
        "r1.write": ("r1.hard",),
        "r2.sft": ("r1.write",),
        "r2.hard": ("r2.sft",),
        "r2.write": ("r2.hard",),
        "r3.sft": ("r2.write",),
        "r3.hard": ("r3.sft",),
        "end": ("r3.hard", "r2.write", "begin"),
    }
    at = f"{tmp_path}/out/stages"
    settings = {one.id: one.settings() for one in plan.stages}
    assert settings["r2.sft"] == {
        "read": [f"{at}/r1.write"], "text": "2 of 3", "seed": 6, "out": f"{at}/r2.sft",
    }  # fmt: skip
    assert [settings[f"r{n}.hard"]["score"] for n in (1, 2, 3)] == [1, 2, 2]
    assert settings["r1.hard"]["read"] == [f"{at}/r1.sft/hard"]
    assert settings["end"]["text"] == "${x} n-b" and settings["end"]["seed"] == 4
    assert plan.by_id["r2.hard"].settings(symbols=True)["read"] == ["<r2.sft>/hard"]


def test_a_list_without_rounds(tmp_path):
    """Not every list of stages is a loop: SFT, training, a selection, training again."""
    plan = plan_loop(write(tmp_path, [stage("a"), stage("b", read=["${a.out}"]), stage("c", read=["${b.out}"])]))
    assert [(one.id, one.uses) for one in plan.stages] == [("a", ()), ("b", ("a",)), ("c", ("b",))]


def test_the_best_round_is_filled_in_when_it_is_known(tmp_path):
    block = rounds(stage("a"), stage("b", read=["${a.out}"], score=1))
    best = {"stage": "b", "of": "a", "metric": "score"}
    end = plan_loop(write(tmp_path, [block, stage("end", read=["${best.a.out}"])], best=best)).by_id["end"]
    assert end.waits_for_best and end.uses == ("r1.b", "r2.b", "r1.a", "r2.a")
    assert end.settings(best=1)["read"] == [f"{tmp_path}/out/stages/r1.a"]


def test_trainers_are_given_what_their_commands_would_be(tmp_path):
    """The recipe, then the defaults of the kind, then the stage, then what the loop sees to."""
    (tmp_path / "one.yaml").write_text(
        yaml.safe_dump({**SFT, "learning_rate": 1.0, "max_steps": 9, "warmup_steps": 7})
    )
    entry = {"name": "one", "run": "sft", "recipe": str(tmp_path / "one.yaml"), "set": {"learning_rate": 3.0}}
    path = write(tmp_path, [entry], defaults={"sft": {"learning_rate": 2.0, "max_steps": 8}})
    assert plan_loop(path).stages[0].settings() == SFT | {
        "learning_rate": 3.0, "max_steps": 8, "warmup_steps": 7, "seed": 0, "resume_from_checkpoint": True,
        "output_dir": f"{tmp_path}/out/stages/one",
    }  # fmt: skip
    changed = ("--one.learning_rate", "4e-6", "--defaults.sft.max_steps", "5", "--folder", "elsewhere")
    settings = plan_loop(path, changed).stages[0].settings()
    assert (settings["learning_rate"], settings["max_steps"]) == ("4e-6", 5)
    assert settings["output_dir"] == "elsewhere/stages/one"


# Each: the stages (or more of the recipe), and what the error has to say.
A, B = rounds(stage("a")), rounds(stage("b"))
SFT_STAGE = {"name": "a", "run": "sft"}
WRONG = {
    "no name": ([{"run": RUN}], {}, "a stage is called None"),
    "bad name": ([stage("A b")], {}, "a stage is called 'A b'"),
    "reserved": ([stage("previous")], {}, "is none of"),
    "twice": ([stage("a"), stage("a")], {}, "two stages are called a"),
    "key": ([{"name": "a", "run": RUN, "sett": {}}], {}, "'sett' is unknown. Did you mean 'set'"),
    "top key": ([stage("a")], {"vales": {}}, "'vales' is unknown. Did you mean 'values'"),
    "run": ([{"name": "a", "run": "prepare trace"}], {}, "Did you mean 'prepare traces'"),
    "makes nothing": ([{"name": "a", "run": "play"}], {}, "leaves nothing"),
    "module": ([{"name": "a", "run": "module no_such_module"}], {}, "No module named 'no_such_module'"),
    "option": ([stage("a", stepps=3)], {}, "'stepps' is no option of it. Did you mean 'steps'"),
    "value": ([stage("a", steps="three")], {}, "argument --steps: invalid int value: 'three'"),
    "switch": ([stage("a", fail="maybe")], {}, "fail is 'maybe'; it is a switch"),
    "out": ([stage("a", out="x")], {}, "out is the loop's to set"),
    "unknown stage": ([stage("sft"), stage("b", read=["${stf.out}"])], {}, "names no stage. Did you mean 'sft'"),
    "unknown value": ([stage("a", text="${nam}")], {"values": {"name": 1}}, "names no value. Did you mean 'name'"),
    "no reference": ([stage("a", text="${a-b}")], {}, "is no reference"),
    "scope": ([stage("a"), stage("b", read=["${previos.a.out}"])], {}, "Did you mean 'previous'"),
    "later": ([stage("a", read=["${b.out}"]), stage("b")], {}, "'b' comes later; move it in front"),
    "itself": ([stage("a", read=["${a.out}"])], {}, "wait for each other: a -> a"),
    "cycle": (
        [rounds(stage("a", read=["${b.out}"]), stage("b", read=["${c.out}"]), stage("c", read=["${a.out}"]))],
        {},
        "wait for each other: a -> b -> c -> a",
    ),
    "first round": ([rounds(stage("a", read=["${previous.a.out}"]))], {}, "r1.a: .* is nothing here; add an"),
    "previous outside": ([B, stage("c", read=["${previous.b.out}"])], {}, "write .{last.b"),
    "not in rounds": ([stage("a"), rounds(stage("b", read=["${previous.a.out}"]))], {}, "stands outside the rounds"),
    "which round": ([B, stage("c", read=["${b.out}"])], {}, "runs in every round: write .{last.b.out"),
    "last inside": ([rounds(stage("a"), stage("b", read=["${last.a.out}"]))], {}, "after all rounds only"),
    "no best": ([B, stage("c", read=["${best.b.out}"])], {}, "no `best` that says which"),
    "best of": ([B], {"best": {"stage": "b", "of": "d"}}, "best.of is 'd', which is no stage of the"),
    "round outside": ([stage("a", text="${round}")], {}, "used outside the rounds"),
    "no list": ([rounds(stage("a", text="${v[round]}"))], {"values": {"v": 3}}, "needs a list"),
    "values cycle": ([stage("a")], {"values": {"x": "${y}", "y": "${x}"}}, "in a cycle: x -> y -> x"),
    "values know no stage": ([stage("a")], {"values": {"x": "${a.out}"}}, "values are the same in all rounds"),
    "stage and value": ([stage("a")], {"values": {"a": 1}}, "a is a stage and a value"),
    "in_rounds": ([rounds(stage("a", in_rounds="frist"))], {}, "Did you mean 'first'"),
    "in_rounds outside": ([stage("a", in_rounds=[1])], {}, "stands outside the rounds"),
    "defaults": ([stage("a")], {"defaults": {"trian": {}}}, "defaults has 'trian', and no stage runs it"),
    "rounds": ([rounds(stage("a"), number=0)], {}, "rounds is 0; it is a whole number from 1"),
    "two blocks": ([A, B], {}, "two blocks with rounds"),
    "launch": ([{**SFT_STAGE, "set": SFT, "launch": {"num_proceses": 2}}], {}, "Did you mean 'num_processes'"),
    "launch file": ([{**SFT_STAGE, "set": SFT, "launch": {"config_file": "no.yaml"}}], {}, "no such file"),
    "one process": ([{"name": "a", "run": "evaluate", "launch": {"cpu": True}}], {}, "runs in one process"),
    "trainer": ([{**SFT_STAGE, "set": {**SFT, "learing_rate": 1}}], {}, "did you mean 'learning_rate'"),
    "trainer's own": ([{**SFT_STAGE, "set": {**SFT, "max_length": 0}}], {}, "stage 'a'.*max_length is 0"),
    "other trainer": ([{"name": "a", "run": "train", "set": {**SFT, "on_too_long": "skip"}}], {}, "`vt-trl sft`"),
    "no model": ([{**SFT_STAGE, "set": {"dataset": "d"}}], {}, "model is not set"),
    "recipe": ([{**SFT_STAGE, "recipe": "no.yaml"}], {}, "Cannot read the recipe no.yaml"),
    "recipe of no trainer": ([{**stage("a"), "recipe": "x.yaml"}], {}, "recipe is for train and sft"),
    "missing rows": ([{**SFT_STAGE, "set": {**SFT, "dataset": "a/b/c"}}], {}, "dataset is 'a/b/c', and there"),
    "environment": (
        [{"name": "a", "run": "prepare traces", "set": {"dataset": "d", "model": "m", "environment": "zom"}}],
        {},
        "stage 'a'.*'zom', which is unknown. Did you mean 'zoom'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("stages", "more", "says"), WRONG.values(), ids=WRONG)
def test_mistakes_are_found_before_anything_runs(tmp_path, stages, more, says):
    with pytest.raises(ConfigError, match=says):
        plan_loop(write(tmp_path, stages, **more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--a.txt", "3"], "'txt' is no option of it. Did you mean 'text'"),
        (["--b.text", "3"], "--b.text is no setting of this loop"),
        (["--nme", "3"], "Did you mean 'name'"),
        (["--rounds", "3"], "no stages are repeated"),
        (["--folder"], "--folder has no value"),
        (["3"], "left over"),
    ],
)
def test_overrides_with_mistakes(tmp_path, words, says):
    with pytest.raises(ConfigError, match=says):
        plan_loop(write(tmp_path, [stage("a")], values={"name": 1}), words)


def test_a_recipe_of_one_run_is_none_of_a_loop_and_the_other_way_round(tmp_path):
    with pytest.raises(ConfigError, match="no list of `stages`"):
        plan_loop(ROOT / "recipes" / "smoke.yaml")
    for kind in (VTGRPOConfig, VTSFTConfig):
        with pytest.raises(ConfigError, match="is the recipe of a loop: run `vt-trl loop "):
            parse_recipe(ROOT / "recipes" / "openvlthinker_smoke.yaml", (), kind)


def test_references_are_looked_up_and_never_evaluated():
    given = {"a": ["x ${n} y", "${n}", {"b": "$${n} ${other}"}]}
    assert fill(given, lambda alternatives, text: {"n": 3}.get(text, f"<{text}>"), "here") == {
        "a": ["x 3 y", 3, {"b": "${n} <other>"}]
    }
    for text in ("a.b.c.out", "1+1", "open('x')", "a.out.out", "", "a |", "x.y"):
        with pytest.raises(ConfigError, match="is no reference"):
            parse(text, "here")
    assert [str(one) for one in parse("previous.a.out | b.out|c[round]", "here")] == [
        "previous.a.out",
        "b.out",
        "c[round]",
    ]
    with pytest.raises(ConfigError, match="cannot be a part of the text"):
        fill("x ${n}", lambda *_: [1], "here")
    assert resolve_values({"a": "${b}/x", "b": "${seed}"}, {"seed": 3}, "here") == {"a": "3/x", "b": 3}


def test_a_status_does_not_wait_for_torch(tmp_path):
    path = write(tmp_path, [stage("a")])
    code = f"import sys; sys.argv[1:] = ['loop', {str(path)!r}, '--status']; from vt_trl.cli import main; main(); " \
           f"print('torch' in sys.modules)"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
    )
    assert done.stdout.strip().endswith("False"), done.stdout + done.stderr
