"""The tiny judge compares strings, and no attack gets a "right" out of it."""

from __future__ import annotations

import asyncio

import pytest
import torch
from test_judge_prompt import ATTACKS, completion_of

from vt_trl import tiny_judge as module
from vt_trl.judges.base import Case, Judgement, Verdict
from vt_trl.judges.local import LocalJudge
from vt_trl.judges.prompt import case_text
from vt_trl.judges.reward import last_answer
from vt_trl.tiny_cases import Cases, is_right

LETTERS = "AEHKSTXZ"


@pytest.fixture(scope="module")
def judge(tiny_judge) -> LocalJudge:
    return LocalJudge(str(tiny_judge), backend="transformers", device="cpu")


def ask(judge: LocalJudge, *cases: Case) -> list[Judgement]:
    return asyncio.run(judge.judge(cases))


def test_it_compares_short_strings_it_has_not_seen(judge):
    cases, made = Cases(999), []
    for number in range(400):
        gold = cases.short(4)
        other = cases.changed(gold) if number % 4 else cases.short(4)
        made.append(Case.of(cases.salad(2), gold, gold if number % 2 else other))
    found = [one.verdict is Verdict.RIGHT for one in ask(judge, *made)]
    agreed = sum(right is is_right(case) for right, case in zip(found, made, strict=True))
    assert agreed / len(made) >= 0.95


def test_it_tells_the_letters_of_the_reading_task_apart(judge):
    cases = [Case.of("Which letter?", gold, given) for gold in LETTERS for given in LETTERS]
    found = [one.verdict is Verdict.RIGHT for one in ask(judge, *cases)]
    assert found == [is_right(case) for case in cases]


def test_yes_and_no_are_nearly_all_it_says(tiny_judge):
    strict = LocalJudge(str(tiny_judge), backend="transformers", device="cpu", min_mass=0.9)
    cases = Cases(5)
    assert all(one.verdict is not Verdict.FAILED for one in ask(strict, *(cases.case() for _ in range(50))))


def test_it_was_trained_on_the_judges_own_prompts(judge):
    judge.open()
    case = Case.of('Which "one"?', ["A", "b"], "A")
    tokenizer = module.judge_tokenizer()
    frame, end = module._FRAME
    expected = tokenizer(frame + case_text(case) + end, add_special_tokens=False)["input_ids"]
    assert judge.prompt_ids(case) == expected and len(expected) < 40
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    # letters so far: `A` begins an accepted answer; `A"` and `A"}` are one; the last place is for the verdict
    assert module._labels(tokenizer, expected, yes, no)[-4:] == [yes, yes, yes, -100]
    wrong = judge.prompt_ids(Case.of("q", ["Ab", "c"], "Ac"))
    assert module._labels(tokenizer, wrong, yes, no)[-5:] == [yes, no, no, no, -100]


def test_random_states_are_left_alone_and_the_command_runs(tmp_path, capsys):
    before = torch.random.get_rng_state()
    module.main([str(tmp_path / "judge"), "--steps", "2"])
    assert torch.equal(before, torch.random.get_rng_state())
    assert (tmp_path / "judge" / "model.safetensors").is_file() and "judge" in capsys.readouterr().out


def test_cases_are_balanced_and_follow_from_the_seed():
    one, other = Cases(3), Cases(3)
    made = [one.case() for _ in range(400)]
    assert made == [other.case() for _ in range(400)]
    assert 0.35 < sum(map(is_right, made)) / len(made) < 0.6
    assert max(len(case.prediction) for case in made) > 80


def test_no_attack_is_right(judge):
    """Where nothing stands in answer tags it is wrong without being asked; the rest goes to the model."""
    cases = {
        attack["id"]: Case.of(attack["question"], attack["answer"], given)
        for attack in ATTACKS
        if (given := last_answer(completion_of(attack))) is not None
    }
    assert len(cases) >= 140
    found = dict(zip(cases, ask(judge, *cases.values()), strict=True))
    assert [name for name, one in found.items() if one.verdict is Verdict.RIGHT] == []
