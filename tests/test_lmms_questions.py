"""What benchmark suites ask and get back: messages to rows, limits, stripped answers, counts. Needs no suite."""

from __future__ import annotations

import pytest
from conftest import picture
from helpers import CALL, SHORT_PROMPTS, answer

from vt_trl.dialogue import Dialogue
from vt_trl.envs import DirectEnv, ResizeEnv
from vt_trl.envs.controls import AlwaysAskEnv
from vt_trl.errors import DataError
from vt_trl.integrations.questions import Tally, lifted, plain_answer, question_row
from vt_trl.types import Done, RolloutStatus


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def image(number: int, size=(112, 112)) -> dict:
    return {"type": "image", "url": picture(number, size)}


def user(*content) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


def row(*content, most: int = 4) -> dict:
    return question_row(user(*content), "task/test/7", most)


def rollout(environment, asked: dict, *replies: str, cut: bool = False):
    dialogue = Dialogue(environment, asked)
    for reply in replies:
        dialogue.say(reply, truncated=cut)
    return dialogue.rollout()


def test_one_picture_is_a_row_like_any_other():
    one = row(image(3), text("  How many? "))
    assert (one["id"], one["question"], one["answer"], one["data_source"]) == ("task/test/7", "How many?", [], "task")
    assert one["image"].tobytes() == picture(3).tobytes() and len(one["images"]) == 1


def test_where_several_pictures_stood_is_said_only_when_texts_part_them():
    leading = row(image(0), image(1), text("Which is larger?"))
    assert leading["question"] == "Which is larger?"
    assert [one.tobytes() for one in leading["images"]] == [picture(0).tobytes(), picture(1).tobytes()]
    parted = row(text("Here"), image(0), text("and there"), image(1), text("Alike?"))
    assert parted["question"] == "Here\n<image 1>\nand there\n<image 2>\nAlike?"
    assert row(image(0), text("A"), image(1))["question"] == "<image 1>\nA\n<image 2>"


def test_a_system_text_joins_and_content_may_be_a_text():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    one = question_row(messages, "a/b/0", 4)
    assert (one["question"], one["images"], one["image"]) == ("Be brief.\n2 + 2?", [], None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"type": "video", "url": "a.mp4"}, text("?")], "a part of type 'video'"),
        ([image(0)], "the question is empty"),
        ([*[image(0)] * 5, text("?")], "5 pictures, above max_pictures=4"),
        ([{"type": "image", "url": "https://example.org/a.png"}, text("?")], "is no local path"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(content, reason):
    with pytest.raises(DataError, match=reason) as caught:
        row(*content)
    assert caught.value.id == "task/test/7"


def test_earlier_turns_are_refused():
    messages = [*user(text("?")), {"role": "assistant", "content": [text("A")]}, *user(text("And?"))]
    with pytest.raises(DataError, match="a turn of the assistant"):
        question_row(messages, "a/b/0", 4)


def test_limits_and_sampling_are_named():
    settings = {"max_new_tokens": 16, "until": ["\n\n"], "do_sample": False, "image_aspect_ratio": "original"}
    assert lifted(settings) == {"max_new_tokens": 16, "until": ["\n\n"], "do_sample": False}
    assert lifted({"temperature": 0, "until": []}) == {"temperature": 0}
    assert lifted({}) == {}


@pytest.mark.parametrize(
    ("reply", "cut", "expected"),
    [
        (answer(" Paris\n"), False, "Paris"),
        (answer("It is \\boxed{B}."), False, "B"),
        ("<think>long</think> Paris", False, "Paris"),
        ("Paris", False, "Paris"),
        ("<think>Paris", False, ""),
        ("<think>a</think><answer></answer>", False, ""),
        ("<think>a</think>Paris", True, ""),
        ("<think>x</think><answer>Par", True, ""),
    ],
)
def test_the_answer_is_plain(reply, cut, expected):
    assert plain_answer(rollout(DirectEnv(), row(image(0), text("?")), reply, cut=cut)) == expected


def test_a_box_is_kept_on_request_and_a_call_is_no_answer():
    asked = row(image(0), text("?"))
    assert plain_answer(rollout(DirectEnv(), asked, answer("\\boxed{B}")), unbox=False) == "\\boxed{B}"
    assert plain_answer(rollout(ResizeEnv(), asked, CALL, CALL)) == ""
    assert plain_answer(rollout(ResizeEnv(), asked, CALL, answer("7"))) == "7"


def test_one_call_shows_all_of_several_pictures():
    environment = ResizeEnv(prompts=SHORT_PROMPTS, min_pixels=3136)
    done = rollout(environment, row(image(0), image(1, (224, 112)), text("Alike?")), CALL, answer("no"))
    assert [one.size for one in done.images] == [(56, 56), (112, 56), (112, 112), (224, 112)]
    assert done.messages[1].text == "<image><image>\nAlike?" and done.messages[3].text == "Full:<image><image>Go"
    assert done.images[3].tobytes() == picture(1, (224, 112)).tobytes()
    full = DirectEnv(min_pixels=3136).reset(row(image(0), image(1, (224, 112)), text("Alike?")))
    assert [one.size for one in full.messages[1].images] == [(112, 112), (224, 112)]


@pytest.mark.parametrize("make", [ResizeEnv, AlwaysAskEnv, DirectEnv])
def test_a_text_alone_has_one_turn_and_no_tool(make):
    environment, asked = make(), row(text("2 + 2?"))
    shown = environment.reset(asked)
    assert shown.messages[-1].text == "2 + 2?" and "resize_image" not in shown.messages[0].text
    assert not shown.granted
    assert rollout(make(), asked, answer("4")).status is RolloutStatus.ANSWERED
    called = environment.step(CALL)
    assert isinstance(called, Done) and called.status is RolloutStatus.TURN_LIMIT


def test_the_tally_counts_everything():
    tally = Tally()
    asked = row(image(0), text("?"))
    tally.add(rollout(ResizeEnv(), asked, CALL, answer("7")))
    tally.add(rollout(ResizeEnv(), asked, answer("7")))
    for number in range(7):
        tally.add(DataError("too many", id=f"t/{number}"))
    assert "2 questions played (2 answered); looked again in 50.0%" in tally.summary()
    assert tally.summary().endswith("7 not shown")
    lines = tally.refusals().splitlines()
    assert lines[0].startswith("7 questions") and lines[1] == "  id 't/0': too many" and lines[-1] == "  and 2 more"
