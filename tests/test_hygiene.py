"""Hygiene of traces: answers found, reflection cut, languages and loops seen, by hand and on texts that are drawn."""

from __future__ import annotations

import time

import pytest
from helpers import CALL, SHORT_PROMPTS, answer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep.hygiene import PHRASES, Hygiene, answer_in, clean_replies, cut_reflection, read_reply, trace_print
from data_prep.wording import foreign_share, repeated_share, seen, sentences, words
from vt_trl.dialogue import replay
from vt_trl.envs import ResizeEnv, SingleEnv
from vt_trl.errors import ConfigError
from vt_trl.judges.rule import decide

THINKER = "<think>Half of it, so one of two.</think>"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (rf"{THINKER}It is \boxed{{\frac{{1}}{{2}}}}.", r"\boxed{\frac{1}{2}}"),
        (rf"{THINKER}\boxed{{ \sqrt{{\frac{{a}}{{b_{{1}}}}}} }}", r"\boxed{\sqrt{\frac{a}{b_{1}}}}"),
        (f"{THINKER}\n<answer>\n  42 cm\n</answer>\n", "42 cm"),
        (f"{THINKER}<answer>\nfirst line\nsecond line\n</answer>", "first line\nsecond line"),
        ("<think>\\boxed{3}? No.</think>\nSo it is\n\\boxed{\n5\\text{ cm}\n}", r"\boxed{5\text{ cm}}"),
        (f"{THINKER}The answer is 7.", "7"),
        ("Much is said.\nThus, the answer is 4.50.", "4.50"),
        ("Answer choices are A and B.", None),
        ("Answer: at 9 a.m.", "at 9 a.m."),
        (f"{THINKER}**Final Answer:** 12.5 km/h", "12.5 km/h"),
        ("Looking at it.\nAnswer: B", "B"),
        ("reasoning goes on without an opening tag</think> \\boxed{B}", r"\boxed{B}"),
        ("<think>It is \\boxed{9}.</think>", r"\boxed{9}"),
        (THINKER + r"\boxed{\frac{1}{2}", None),
        (f"{THINKER}nothing to report", None),
        ("<answer></answer>", None),
        ("\\boxed{}", None),
        ("", None),
    ],
)
def test_the_answer_of_a_reply_is_found(text, found):
    assert answer_in(text) == found


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        (r"<think>x</think>\boxed{\frac{1}{2}}", "1/2"),
        ("<think>x</think><answer>\n5 cm\n</answer>", "5 cm"),
        (r"<think>x</think>\boxed{5\text{ cm}}", "5 cm"),
        (r"<think>x</think>\boxed{50\%}", "50%"),
        (r"<think>x</think>\boxed{(3, 4)}", "(3,4)"),
    ],
)
def test_what_is_found_is_what_the_judge_calls_right(text, gold):
    assert decide("What is it?", [gold], answer_in(text)) is True
    assert decide("What is it?", ["17"], answer_in(text)) is not True


def test_code_in_a_reply_is_text(monkeypatch):
    monkeypatch.setattr("builtins.eval", lambda *_: pytest.fail("evaluated"))
    assert read_reply("<think>a</think>\\boxed{__import__('os').getcwd()}") == (
        "a",
        "\\boxed{__import__('os').getcwd()}",
    )


@pytest.mark.parametrize(
    ("text", "reasoning", "given_"),
    [
        ("<think>a b</think><answer>5</answer>", "a b", "5"),
        ("a b</think>\n\\boxed{5}", "a b", "\\boxed{5}"),
        ("a b\n<answer>5</answer>", "a b", "5"),
        ("Step one.\nStep two.\nFinal answer: 5", "Step one.\nStep two.", "5"),
        ("<think>a <answer>6</answer> b</think><answer>5</answer>", "a 6 b", "5"),
        ("<think></think><answer>5</answer>", "", "5"),
    ],
)
def test_a_reply_is_read_as_reasoning_and_answer(text, reasoning, given_):
    assert read_reply(text) == (reasoning, given_)


def test_a_reply_that_was_cut_while_thinking_has_neither():
    assert read_reply("<think>and so \\boxed{5} and") is None


# Cut points.

FOUND = "There are two boxes. Each holds three, so there are 6."


@pytest.mark.parametrize(
    ("text", "gold", "kept"),
    [
        (f"{FOUND} Wait, let me count again. Two times three is 6. Yes, 6.", "6", FOUND),
        (f"{FOUND}\nHmm, is that so? It is.", "\\boxed{6}", FOUND),
        (f"{FOUND} But wait. It is 6.", "6", FOUND),
        (f"{FOUND} Alternatively, add three and three.", "6", FOUND),
        (f"{FOUND} Let me double-check. Fine.", "6", FOUND),
        # the first attempt was wrong: the doubt is what leads to the answer
        ("There are 5. Wait, I missed one. So there are 6.", "6", "There are 5. Wait, I missed one. So there are 6."),
        # 16 and 6.5 are no 6
        ("There are 16 and 6.5. Wait, that is not it. It is 6.", "6", None),
        # a part that says nothing new goes, the one that brings the answer stays
        ("I count one two three four. Wait, I count one two three four. Hold on, there is a fifth: 5.", "5",
         "I count one two three four. Hold on, there is a fifth: 5."),
        ("Step 6. Look at Figure 6. Wait, what is asked? There are 6.", "6", None),
        ("1. Count.\n6.\nWait, which ones? All 6.", "6", None),
        ("In row 6 there is one. Hmm, and 5 more. So 6.", "6", None),
        ("He waits. The waiter waits for 6 people.", "6", None),
        ("Option B is taller. Wait, check A. A is short, so B.", "B", "Option B is taller."),
        ("I see a b here. Wait, there is more. It is B.", "B", None),
        ("", "6", ""),
    ],
)  # fmt: skip
def test_reflection_is_cut_where_the_answer_was_there(text, gold, kept):
    assert cut_reflection(text, gold) == (text if kept is None else kept)


_WORDS = st.sampled_from(["one", "two", "6", "6.", "so", "Wait,", "wait.", "Hmm,", "But", "\n", "it is 6.", "Is it?"])
_PROSE = st.lists(_WORDS, max_size=60).map(" ".join)


@given(_PROSE | st.text(max_size=200), st.sampled_from(["6", "five", None, "", "\\boxed{6}"]))
def test_a_cut_keeps_sentences_in_their_order_and_is_done_once(text, gold):
    cut = cut_reflection(text, gold)
    left = iter(one.strip() for one in sentences(text))
    assert all(one.strip() in left for one in sentences(cut) if one.strip())
    assert len(words(cut)) <= len(words(text))
    assert cut_reflection(text, gold, ()) == text.strip()


@given(st.text(max_size=300))
def test_sentences_are_the_text(text):
    assert "".join(sentences(text)) == text


@given(st.text(max_size=300), st.text(max_size=80), st.text(max_size=20))
def test_no_text_breaks_a_rule(text, question, gold):
    found = Hygiene(as_seen=True).clean([text], question, [gold], gold)
    assert found.words >= 0 and found.removed >= 0 and isinstance(found.texts[0], str)
    reply = read_reply(text)
    assert reply is None or not any(tag in part for part in reply for tag in ("<think>", "</think>", "<answer>"))
    assert 0 <= foreign_share(text, question) <= 1 and 0 <= repeated_share(text) <= 1


@pytest.mark.parametrize(
    "text", ["wait " * 20_000, "a" * 100_000, "\\boxed{" * 10_000, ".\n" * 40_000, "the image " * 9000]
)
def test_long_texts_take_no_time(text):
    began = time.perf_counter()
    Hygiene(as_seen=True).clean([text], "What?", ["5"], "5")
    read_reply(text)
    assert time.perf_counter() - began < 5


# What is left out, and why.


def why(text: str, question: str = "How many boxes are there?", gold: str = "6", **rules) -> str | None:
    return Hygiene.of(rules).clean([text], question, [gold], gold).reason


def test_each_rule_has_its_reason():
    assert why(FOUND) is None
    assert why("") == "too_short" and why("Six.", min_words=5) == "too_short"
    long = " ".join(f"Word{number} is followed by another{number}." for number in range(150))
    assert why(long) == "too_long" and why(long, max_words=None) is None
    assert why("Count the boxes from left to right again. " * 4) == "repeats"
    loop = "".join(f"Box number {number} of them?\nI look at it.\n" for number in range(5))
    assert why(loop, max_repeats=1.0) == "loops" and why(loop, max_repeats=1.0, max_same_line=5) is None
    assert why("There are 6 " + "a" * 50) == "repeats"
    assert why("这里有两个盒子，每个里面有三个，所以一共有六个。") == "foreign_language"
    assert why("这里有两个盒子，所以一共有六个。", question="有多少个盒子？") is None
    assert why("There are two boxes, three in each of them.", question="有多少个盒子？") == "foreign_language"
    assert why("The sign reads 出口, which means exit.", question="What does the sign say?", gold="出口") is None


def test_formulas_belong_to_every_language():
    formula = r"由 \frac{a}{b} = \sqrt{x^2 + \alpha} 得 x = 3。"
    assert foreign_share(formula, "求 x 的值是多少？") == 0.0
    assert foreign_share("Считаем коробки: 6.", "Сколько коробок?") == 0.0
    assert foreign_share("abc где", "Сколько коробок?") == 0.5
    assert foreign_share("anything", "5 + 3 = ?") == 0.0


def test_repeats_are_a_share_of_six_word_sequences():
    """Eight words twice: 11 sequences, 8 of which are different."""
    assert repeated_share("a b c d e f g h " * 2) == pytest.approx(3 / 11)
    assert repeated_share("a b c d e f g h") == 0.0


@pytest.mark.parametrize(
    ("text", "as_seen"),
    [
        ("The description says 5.", "The picture shows 5."),
        ("According to the given image description, it is 5.", "According to the picture, it is 5."),
        ("this caption mentions a dog; the provided description of the image is short",
         "the picture shows a dog; the picture is short"),
        ("A description is missing.", "A description is missing."),
    ],
)  # fmt: skip
def test_reasoning_from_a_description_is_told_as_seen(text, as_seen):
    assert seen(text) == as_seen
    rules = Hygiene(as_seen=True)
    assert rules.clean([text], "What is it?", ["5"], "5").texts == [as_seen]
    assert rules.clean([text], "What does the caption say?", ["5"], "5").texts == [text]


def test_traces_are_told_apart_by_question_and_words():
    one = trace_print("How many?", ["<think>Two  boxes.</think>"])
    assert one == trace_print("how many ?", ["<think>two\nboxes.</think>"])
    assert one != trace_print("How much?", ["<think>Two  boxes.</think>"])
    assert one != trace_print("How many?", ["<think>Two boxes.", "</think>"])


def rollout(environment, *replies: str):
    row = {"image": Image.new("RGB", (56, 56)), "question": "How many boxes are there?", "answer": ["6"]}
    return replay(environment, row, replies).rollout()


def test_each_turn_is_cleaned_inside_its_tags_and_the_layout_stays():
    last = f"<think>{FOUND} Wait, once more. It is 6.</think>\n<answer>6</answer>"
    first = CALL.replace("too small", "It is 6. Wait, it is too small to say.")
    played = rollout(ResizeEnv(min_pixels=3136, prompts=SHORT_PROMPTS), first, last)
    replies, found = clean_replies(played, Hygiene())
    assert replies == [first, f"<think>{FOUND}</think>\n<answer>6</answer>"]  # a call is cut nowhere: it has no answer
    assert (found.reason, found.removed) == (None, 9)
    replay(ResizeEnv(min_pixels=3136, prompts=SHORT_PROMPTS), played.row, replies)
    assert clean_replies(rollout(SingleEnv(), answer("6")), Hygiene())[0] == [answer("6")]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_word": 3}, "Did you mean 'max_words'"),
        ({"cut": "yes"}, "cut is 'yes'"),
        ({"phrases": "wait"}, "phrases is 'wait'"),
        ({"max_foreign": 2}, "max_foreign is 2"),
        ({"max_words": 3, "min_words": 5}, "below min_words"),
    ],
)
def test_settings_that_cannot_work(settings, said):
    with pytest.raises(ConfigError, match=said):
        Hygiene.of(settings)


def test_own_phrases_replace_the_usual_ones():
    rules = Hygiene.of({"phrases": ["moment mal"]})
    assert "wait" in PHRASES and rules.phrases == ("moment mal",)
    assert rules.clean([f"{FOUND} Moment mal, es sind 6."], "How many?", ["6"], "6").texts == [FOUND]
