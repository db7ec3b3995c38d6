"""Evaluation: policies, scores, shards that survive a kill, the report, comparisons, and exact tokens."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from conftest import FAMILY_NAMES, make_rows
from helpers import SHORT_PROMPTS, Script, answer
from published import greedy, untrained, write_rows
from serving import serving, token_ids

from vt_trl import cli
from vt_trl.data import load_rows
from vt_trl.envs.controls import AlwaysAskEnv, ShareEnv, draw
from vt_trl.errors import ConfigError, DataError, JudgeOutage
from vt_trl.evaluation import play_rows
from vt_trl.evaluation import run as evaluation
from vt_trl.evaluation.compare import compare
from vt_trl.evaluation.run import Plan, evaluate, named
from vt_trl.evaluation.shards import Cell, read_results
from vt_trl.evaluation.stats import summarise
from vt_trl.generation.base import ScriptedBackend
from vt_trl.inference import PolicyModel
from vt_trl.judges import Judge, Judgement, RuleJudge, make_judge_reward
from vt_trl.pipeline import VisionThinkPipeline
from vt_trl.policies import parse_policy, trained_policy, trained_settings
from vt_trl.transcripts.browse import Filter, Run
from vt_trl.types import Done, RolloutStatus

ROOT = Path(__file__).resolve().parents[1]
ARGS = {"prompts": SHORT_PROMPTS, "min_pixels": 3136}
LIMITS = {"max_turn_tokens": 6, "max_completion_length": 256, "device": "cpu", "dtype": "float32"}
CALLING = '<think>x</think><tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'


class Outage(Judge):
    """A judge that is down."""

    name, remote = "outage", True

    async def judge(self, cases):
        return [Judgement.failed("no connection") for _ in cases]


# Policies.


@pytest.fixture(scope="module")
def row() -> dict:
    return make_rows(1)[0]


def test_always_ask_opens_with_the_call_and_both_pictures(row):
    environment = AlwaysAskEnv(**ARGS)
    opening = environment.reset(row)
    assert [message.role for message in opening.messages] == ["system", "user", "assistant", "user"]
    assert [image.size for message in opening.messages for image in message.images] == [(56, 56), (112, 112)]
    assert opening.granted
    end = environment.fork().step(answer("0"))
    assert isinstance(end, Done) and end.answer == "0"
    assert environment.fork().step(CALLING).status is RolloutStatus.TURN_LIMIT  # there is nothing more to show
    assert [end.answer for end in environment.validate(row)] == ["0"]


def test_a_share_is_drawn_by_id_alone():
    ids = [f"row-{number}" for number in range(2000)]
    drawn = {id for id in ids if draw(id, 0) < 0.3}
    assert 0.27 < len(drawn) / len(ids) < 0.33
    assert drawn == {id for id in reversed(ids) if draw(id, 0) < 0.3}
    assert drawn != {id for id in ids if draw(id, 1) < 0.3}
    environment = ShareEnv(share=0.3, min_pixels=3136)
    for one in make_rows(20):
        shown = environment.reset(one).messages[-1].images[0].size
        assert shown == ((112, 112) if draw(one["id"], 0) < 0.3 else (56, 56))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("two-turns", "Did you mean 'two-turn'"),
        ("share=x", "holds no number"),
        ("share=1.5", "from 0 to 1"),
    ],
)
def test_policies_that_do_not_exist(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_policy(text)


def test_settings_of_training_go_to_the_policy_of_their_kind():
    facts = {"kind": "resize", "rule": {"min_pixels": 3136}, "prompts": {"system": "Mine", "task": "{question}"}}
    assert trained_policy(facts).name == "two-turn"
    mine = {"min_pixels": 3136, "prompts": {"system": "Mine", "task": "{question}"}}
    assert trained_settings(parse_policy("always-ask"), facts) == mine
    assert trained_settings(parse_policy("always-full"), facts) == {"min_pixels": 3136}  # no tool: no text about one
    assert trained_policy({"kind": "direct", "resolution": "full"}).name == "always-full"
    with pytest.raises(ConfigError, match="which is not part of vt_trl"):
        trained_policy({"kind": "own", "name": "Guess"})


# Rows, played and judged.


@pytest.fixture(scope="module")
def model(checkpoint) -> PolicyModel:
    return PolicyModel(checkpoint, **LIMITS)


def scripted(model: PolicyModel, choose, policy: str = "two-turn"):
    """A runner that replies ``choose(rollout, turn)``."""
    runner = model.runner(parse_policy(policy).environment(ARGS))
    runner.backend = ScriptedBackend(Script(model.parts.tokenizer, choose))
    return runner


def test_every_row_has_a_result_and_only_judged_ones_a_score(model):
    """Right, wrong, no answer, a judge without a rule, no picture, and one too long to be shown."""
    rows = make_rows(6)
    rows[3]["answer"] = ["a long and winding road"]
    rows[4]["image"] = b"no picture"
    rows[5]["image"] = rows[5]["image"].resize((2400, 10))
    replies = [answer("0"), answer("7"), "nothing", answer("a road which is rather short"), "-", "-"]
    reward = make_judge_reward(RuleJudge(), max_failed=1.0)
    said = {number: f"Which number is {number}?" for number in range(6)}
    runner = scripted(model, lambda index, turn: "")
    texts = {text: replies[number] for number, text in said.items()}
    script = Script(model.parts.tokenizer, lambda index, turn: "")

    def reply(request):
        question = model.parts.tokenizer.decode(request.token_ids)
        script.choose = lambda index, turn: next(text for asked, text in texts.items() if asked in question)
        return script(request)

    runner.backend = ScriptedBackend(reply)
    done = play_rows(runner, rows, reward=reward)
    reward.close()
    assert [one.correct for one in done.results] == [True, False, False, None, None, None]
    assert [one.verdict for one in done.results] == ["right", "wrong", "wrong", "failed", None, None]
    assert [one.status for one in done.results][2:] == ["no_answer", "answered", "unreadable", "unreadable"]
    assert "in none of the formats" in done.results[4].reason and "aspect ratio" in done.results[5].reason
    numbers = summarise(done.results)
    assert (numbers["rows"], numbers["judged"], numbers["judge_failed"], numbers["unreadable"]) == (6, 3, 1, 2)
    assert numbers["accuracy"] == pytest.approx(1 / 3) and numbers["accuracy_at_least"] == pytest.approx(1 / 4)
    assert done.rate("correct") == pytest.approx(1 / 3)


def test_tokens_of_two_turns_are_counted_by_hand(model):
    """Low 56 x 56 is 2 x 2 visual tokens, full 112 x 112 4 x 4; the sampled ones are those of both replies."""
    runner = scripted(model, lambda index, turn: answer("0") if turn else CALLING)
    result = play_rows(runner, make_rows(1)).results[0]
    sampled = [model.parts.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (CALLING, answer("0"))]
    assert result.asked and result.visual_tokens == 4 + 16
    assert result.generated_tokens == sum(len(ids) + 1 for ids in sampled)  # and a stop token each
    low, ask = (
        play_rows(scripted(model, lambda *_: answer("0"), policy), make_rows(1)).results[0]
        for policy in ("always-low", "always-ask")
    )
    assert (low.visual_tokens, low.asked) == (4, False)
    assert (ask.visual_tokens, ask.asked) == (20, True)


# Shards and results.


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory) -> Path:
    """Five rows, the last without a readable picture."""
    folder = write_rows(tmp_path_factory.mktemp("evaluation") / "rows", 5)
    (folder / "4.png").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def plan(checkpoint, rows_folder) -> Plan:
    return Plan(
        models={"tiny": str(checkpoint)},
        data={"rows": str(rows_folder)},
        policies=["two-turn", "always-full", "always-low", "share=0.5"],
        environment_args=ARGS,
        model_settings=LIMITS,
        shard_rows=2,
    )


@pytest.fixture(scope="module")
def done(plan, checkpoint, rows_folder, tmp_path_factory):
    """The plan as a command, whose folder and results are those of the same plan in Python."""
    out = tmp_path_factory.mktemp("evaluation") / "out"
    options = {"--environment-args": json.dumps(ARGS), "--shard-rows": "2", "--layout": "paper", "--out": str(out)}
    options |= {f"--{name.replace('_', '-')}": str(value) for name, value in LIMITS.items()}
    words = [word for pair in options.items() for word in pair]
    named = ["--model", f"tiny={checkpoint}", "--data", f"rows={rows_folder}"]
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert cli.main(["evaluate", *named, "--policies", *plan.policies, *words]) == 0
    assert "Table 2: score in %" in printed.getvalue() and "tiny always-low\t25.0\t" in printed.getvalue()
    return out, json.loads((out / "results.json").read_text())


def cells_of(report: dict) -> list[dict]:
    return [
        {name: value for name, value in cell.items() if name not in ("seconds", "sessions")}
        for cell in report["cells"]
    ]


def test_results_page_and_transcripts(done):
    out, report = done
    full = next(cell for cell in report["cells"] if cell["policy"] == "always-full")
    low = next(cell for cell in report["cells"] if cell["policy"] == "always-low")
    assert (full["rows"], full["unreadable"], full["visual_tokens"], full["visual_tokens_share"]) == (5, 1, 16, 1)
    assert (low["visual_tokens"], low["visual_tokens_share"], low["request_rate"]) == (4, 0.25, None)
    page = (out / "report.html").read_text()
    assert "tiny on rows" in page and "data:image/svg+xml" in page and "<script" not in page
    assert page.count("<td>two-turn</td>") == 3  # the cell, and two sources
    shown = Run(out)
    found = shown.read(shown.find(Filter(mode="always-low")))
    assert [one.id for one in found] == [f"row-{number}" for number in range(5)]
    assert [len(one.images) for one in found] == [1, 1, 1, 1, 0] and found[4].status == "unreadable"


def test_a_run_that_is_killed_goes_on_and_ends_the_same(plan, done, tmp_path, monkeypatch):
    """kill -9 in the middle of a cell, with a half-written file left; the second session plays only the rest."""

    code = (
        "import os, sys, pickle; from vt_trl.evaluation.run import evaluate\n"
        "plan, out = pickle.load(sys.stdin.buffer)\n"
        "evaluate(plan, out, lambda label, *_: label.endswith('always-full') and os.kill(os.getpid(), 9))"
    )
    killed = subprocess.run([sys.executable, "-c", code], input=pickle.dumps((plan, tmp_path)), cwd=ROOT, timeout=300)
    assert killed.returncode == -9
    kept = sorted((tmp_path / "completions").glob("*.parquet"))
    assert [path.name.rpartition("--")[2] for path in kept] == [
        "always_full-00000.parquet", "two_turn-00000.parquet", "two_turn-00001.parquet", "two_turn-00002.parquet",
    ]  # fmt: skip
    (tmp_path / "completions" / f".{kept[0].name}.1.tmp").write_bytes(b"half")
    stamps, played = [path.stat().st_mtime_ns for path in kept], []
    play = evaluation.play_rows
    monkeypatch.setattr(evaluation, "play_rows", lambda *a, **k: played.append(len(a[1])) or play(*a, **k))
    report = evaluate(plan, tmp_path)
    assert cells_of(report) == cells_of(done[1])
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    assert played == [2, 1, 2, 2, 1, 2, 2, 1]
    assert [cell["sessions"] for cell in report["cells"]] == [1, 2, 1, 1]
    assert read_results(tmp_path) == read_results(done[0])


def test_done_work_is_not_mixed_with_other_settings(plan, done, rows_folder, tmp_path):
    out, _ = done
    other = Plan(**vars(plan) | {"model_settings": LIMITS | {"max_turn_tokens": 5}})
    with pytest.raises(ConfigError, match="limits was .*'turn': 6.* and is .*'turn': 5.*name another --out"):
        evaluate(other, out)
    changed = write_rows(tmp_path / "rows", 5)
    with pytest.raises(ConfigError, match="made with other settings: the rows was"):
        evaluate(Plan(**vars(plan) | {"data": {"rows": str(changed)}}), out)


def test_an_outage_of_the_judge_stops_before_anything_is_kept(plan, tmp_path, monkeypatch):
    monkeypatch.setattr("vt_trl.judges.reward._ENOUGH", 1)
    scored = Plan(**vars(plan) | {"judge": f"{__name__}:Outage", "policies": ["helpers:AsksFirst"]})
    with pytest.raises(JudgeOutage, match="no connection"):
        evaluate(scored, tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))
    report = evaluate(Plan(**vars(scored) | {"judge_max_failed": 1.0}), tmp_path)
    assert (report["cells"][0]["judge_failed"], report["cells"][0]["accuracy"]) == (4, None)


def test_two_rows_of_one_id_and_two_models_of_one_name(plan, folder, tmp_path):
    twice = folder(*({"id": "a", "image": "images/0.png", "question": "What is it?", "answer": "b"} for _ in range(2)))
    with pytest.raises(DataError, match="'a' occurs twice"):
        evaluate(Plan(**vars(plan) | {"data": {"rows": str(twice)}}), tmp_path)
    with pytest.raises(ConfigError, match="given twice"):
        named(["runs/a/final", "runs/b/final"])
    assert named(["before=runs/a/final", "runs/b/final"]) == {"before": "runs/a/final", "final": "runs/b/final"}


# Comparisons.


def test_comparing_policies_of_one_run(done):
    out, _ = done
    pair = compare(out, out, policies=["always-full", "always-low"])[0]
    assert pair["visual_tokens"]["difference"] == 4 - 16
    assert pair["visual_tokens"]["interval"] == [-12, -12]
    assert (pair["rows"], pair["unreadable"]) == (5, 1)
    assert [one["accuracy"]["difference"] for one in compare(out, out)] == [0] * 4
    with pytest.raises(ConfigError, match="was not evaluated there; there are tiny, rows, always-full"):
        compare(out, out, policies=["always-ask", "always-full"])


def test_comparing_different_rows_is_refused_without_common(done, plan, tmp_path, capsys):
    out, _ = done
    evaluate(Plan(**vars(plan) | {"limit": 3, "policies": ["always-low"]}), tmp_path)
    with pytest.raises(ConfigError, match=r"5 and 3, 3 of them in both \(not 'row-3', 'row-4'\). Add --common"):
        compare(out, tmp_path)
    assert cli.main(["compare", str(out), str(tmp_path), "--common", "--json", str(tmp_path / "pairs.json")]) == 0
    pair = json.loads((tmp_path / "pairs.json").read_text())[0]
    assert (pair["rows"], pair["left_out"]) == (3, 2)
    assert "McNemar, exact" in capsys.readouterr().out


# Exactness.


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_training_evaluation_pipeline_and_server_write_the_same_tokens(family, checkpoints, tmp_path):
    """Greedy, the same weights and rows, two turns each: token for token, and so the same pictures in between."""
    from helpers import AsksFirst

    trainer = untrained(checkpoints[family], tmp_path, environment=AsksFirst)
    rows = load_rows(tmp_path / "rows")
    trained = greedy(trainer, [*make_rows(4)])
    model = PolicyModel(checkpoints[family], **LIMITS | {"max_completion_length": 128})
    environment = parse_policy("helpers:AsksFirst").environment(ARGS)
    evaluated = play_rows(model.runner(environment), rows, model.sampling, batch_size=3).rollouts
    pipe = VisionThinkPipeline(
        checkpoints[family],
        policy="helpers:AsksFirst",
        environment_args=ARGS,
        **LIMITS | {"max_completion_length": 128},
    )
    piped = [
        one.rollout for one in pipe([{"image": row["image"], "question": row["question"]} for row in make_rows(4)])
    ]
    with serving(model.runner(environment)) as running:
        replies = [token_ids(running.ask(row)) for row in make_rows(4)]
    assert replies == [[list(turn.token_ids) for turn in rollout.turns] for rollout in trained]
    assert model.parts.banned_ids == trainer.banned_ids and model.parts.stop_ids == set(trainer.stop_ids)
    for ours, theirs, thirds in zip(trained, evaluated, piped, strict=True):
        assert len(ours.turns) == 2 and ours.asked
        assert ours.prompt_ids == theirs.prompt_ids == thirds.prompt_ids
        assert ours.completion_ids == theirs.completion_ids == thirds.completion_ids
        assert ours.loss_mask == theirs.loss_mask == thirds.loss_mask


def test_cells_have_names_of_their_own():
    assert Cell("a/b", "c d", "share=0.3").slug == "a_b--c_d--share=0.3"
