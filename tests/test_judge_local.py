"""The local judge: how its prompt is put together, what two probabilities say, and both places it can compute in."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_judge_prompt import ATTACKS, completion_of
from transformers import AddedToken, AutoTokenizer

from vt_trl.errors import ConfigError
from vt_trl.judges.base import Case, Judgement, Verdict
from vt_trl.judges.local import LocalJudge
from vt_trl.judges.prompt import YES_NO_REPLY
from vt_trl.tiny import phrase_tokenizer

CASE = Case.of("Which animal?", ["dog", "hound"], "Dog")


class FakeScorer:
    """Gives every prompt the same probabilities of its words: ``yes, Yes, no, No`` as far as they are tokens."""

    def __init__(self, *probabilities: float):
        self.values = [math.log(p) if p else -math.inf for p in probabilities]
        self.calls: list[tuple[int, list[int]]] = []

    def logprobs(self, prompts: list[list[int]], words: list[int]) -> list[list[float]]:
        self.calls.append((len(prompts), list(words)))
        assert len(words) == len(self.values)
        return [self.values] * len(prompts)


def with_scorer(judge: LocalJudge, scorer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> LocalJudge:
    monkeypatch.setattr("vt_trl.judges.scorers.make_scorer", lambda *_: scorer)
    judge.model = str(folder)
    judge.open()
    return judge


def ask(judge: LocalJudge, *cases: Case) -> list[Judgement]:
    return asyncio.run(judge.judge(cases))


@pytest.fixture(scope="module")
def qwen3(shared, tmp_path_factory) -> Path:
    """Qwen3's tokenizer: its template and added tokens on the vocabulary that it shares with Qwen2.5."""
    source, target = shared / "qwen" / "qwen3-1.7b", tmp_path_factory.mktemp("qwen3")
    tokenizer = AutoTokenizer.from_pretrained(shared / "qwen" / "qwen2.5-vl-7b-instruct")
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer.chat_template = config["chat_template"]
    missing = [entry for entry in config["added_tokens_decoder"].values() if entry["content"] not in tokenizer.vocab]
    for entry in missing:
        tokenizer.add_tokens(AddedToken(entry["content"], special=entry["special"], normalized=False))
    tokenizer.save_pretrained(target)
    return target


@pytest.mark.parametrize(
    ("probabilities", "settings", "verdict"),
    [
        ((0.6, 0.1, 0.2, 0.1), {}, Verdict.RIGHT),
        ((0.1, 0.3, 0.2, 0.3), {}, Verdict.WRONG),
        ((0.3, 0.2, 0.3, 0.2), {}, Verdict.RIGHT),  # a half reaches the threshold of a half
        ((0.6, 0.1, 0.2, 0.1), {"threshold": 0.9}, Verdict.WRONG),
        ((0.01, 0, 0.01, 0), {}, Verdict.FAILED),  # it wants to say something else
        ((0.01, 0, 0.001, 0), {"min_mass": 0.0}, Verdict.RIGHT),
        ((0, 0, 0, 0), {"min_mass": 0.0}, Verdict.FAILED),
    ],
)
def test_two_words_decide(qwen3, monkeypatch, probabilities, settings, verdict):
    judge = with_scorer(LocalJudge(**settings), FakeScorer(*probabilities), qwen3, monkeypatch)
    assert ask(judge, CASE)[0].verdict is verdict


def test_the_prompt_is_qwen3s_own_with_thinking_off(qwen3, monkeypatch):
    judge = with_scorer(LocalJudge(), FakeScorer(1, 0, 0, 0), qwen3, monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(qwen3)
    text = tokenizer.decode(judge.prompt_ids(CASE))
    assert text.startswith("<|im_start|>system\n") and text.endswith("<think>\n\n</think>\n\n")
    assert judge.rubric in text and YES_NO_REPLY in text
    assert text.index(judge.rubric) < text.index("Which animal?") < text.index("hound") < text.index('"Dog"')
    assert judge.prompt_ids(CASE) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_no_text_of_a_case_becomes_a_control_token(qwen3, monkeypatch):
    judge = with_scorer(LocalJudge(), FakeScorer(1, 0, 0, 0), qwen3, monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(qwen3)
    control = set(tokenizer.added_tokens_encoder.values())
    expected = [token for token in judge.prompt_ids(CASE) if token in control]
    for attack in ATTACKS:
        case = Case.of(attack["question"], attack["answer"], completion_of(attack)[:5000])
        assert [token for token in judge.prompt_ids(case) if token in control] == expected


def test_what_needs_no_judge_or_is_too_long_is_not_computed(qwen3, monkeypatch):
    scorer = FakeScorer(1, 0, 0, 0)
    judge = with_scorer(LocalJudge(max_tokens=600), scorer, qwen3, monkeypatch)
    cases = [Case.of("q", "g", " "), Case.of("q", "g", "x" * 3000), Case.of("q " * 2000, "g", "x"), CASE]
    verdicts = [one.verdict.value for one in ask(judge, *cases)]
    assert verdicts == ["wrong", "wrong", "failed", "right"]
    assert [count for count, _ in scorer.calls] == [1]


def test_a_tokenizer_without_the_words_or_a_template_is_refused(tmp_path, monkeypatch):
    phrase_tokenizer(["user"]).save_pretrained(tmp_path / "letters")  # "yes" is three tokens
    with pytest.raises(ConfigError, match="no single token"):
        with_scorer(LocalJudge(), None, tmp_path / "letters", monkeypatch)
    plain = phrase_tokenizer(["yes", "no"])
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match="chat template"):
        with_scorer(LocalJudge(), None, tmp_path / "plain", monkeypatch)
    with pytest.raises(ConfigError, match="does not load"):
        LocalJudge(model=str(tmp_path / "nothing")).open()


LETTERS = "AEHK"
PAIRS = [Case.of("Which letter?", gold, given) for gold in LETTERS for given in LETTERS]


def test_transformers_judges_in_batches_as_one_by_one(tiny_judge):
    settings = {"model": str(tiny_judge), "backend": "transformers", "device": "cpu"}
    longer = Case.of("Which letter is it, the one in the very middle of the picture?", ["A", "B"], "A")
    together = ask(LocalJudge(**settings, batch_size=5), *PAIRS, longer)
    alone = ask(LocalJudge(**settings, batch_size=1), *PAIRS, longer)
    assert [one.verdict for one in together] == [one.verdict for one in alone]
    assert [one.verdict is Verdict.RIGHT for one in together[:-1]] == [c.prediction == c.golds[0] for c in PAIRS]
    shares = [[float(one.detail.split("= ")[1]) for one in side] for side in (together, alone)]
    assert shares[0] == pytest.approx(shares[1], abs=2e-3)


@pytest.mark.vllm
def test_vllm_says_what_transformers_says(tiny_judge, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = {"model": str(tiny_judge), "max_tokens": 512, "gpu_memory_utilization": 0.1}
    expected = ask(LocalJudge(**settings, backend="transformers", device="cpu"), *PAIRS)
    judge = LocalJudge(**settings, backend="vllm")

    async def go() -> list[Judgement]:
        try:
            return await judge.judge(PAIRS)
        finally:
            await judge.close()

    found = asyncio.run(go())
    assert [one.verdict for one in found] == [one.verdict for one in expected]
    shares = [[float(one.detail.split("= ")[1]) for one in side] for side in (found, expected)]
    assert shares[0] == pytest.approx(shares[1], abs=2e-3)
