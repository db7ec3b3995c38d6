"""Several pictures and scales, budgets, and what pipeline, transcripts, policies and preflight make of the looks."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from conftest import picture
from PIL import Image
from test_env_resize import CALL as RESIZE
from test_env_zoom import ANSWER, EIGHT, ROW, THINK, call, images, words

from vt_trl.boxes import Sight
from vt_trl.config import VTGRPOConfig
from vt_trl.dialogue import Dialogue
from vt_trl.envs import LookEnv, ResizeEnv, ZoomEnv, make_environment
from vt_trl.errors import DataError
from vt_trl.policies import parse_policy, trained_policy, trained_settings
from vt_trl.preflight.episodes import PixelLimits, longest_episode
from vt_trl.run_notes import environment_facts
from vt_trl.types import Done, Fault, Region, RolloutStatus

S, F = RolloutStatus, Fault

TWO = {**ROW, "images": [picture(1, (560, 280)), picture(2, (280, 560))]}


def resize(scale, **more) -> str:
    arguments = {"scale": scale, **more}
    return f"{THINK}<tool_call>{json.dumps({'name': 'resize_image', 'arguments': arguments})}</tool_call>"


def test_pictures_are_numbered_as_shown_and_parts_of_parts_are_mapped_through():
    """Pictures 1 and 2 open at half; 3 is the second at 1.5 times that; 4 a part of 3; 5 a part of 4."""
    env = LookEnv()
    opening = env.reset(TWO)
    assert [one.size for one in images(opening)] == [(280, 140), (140, 280)]
    assert "Image 1, 280 x 140 pixels." in opening.messages[1].text and "Image 2, 140 x" in opening.messages[1].text
    third = env.step(resize(1.5, image=2))
    assert images(third)[0].size == (224, 420) and "Image 3, 224 x 420 pixels." in words(third)  # 210 is 7.5 x 28
    assert not third.regions  # it is all of the picture
    fourth = env.step(call([112, 0, 224, 210], image=3))  # the upper right quarter
    assert fourth.regions == (Region(1, (140, 0, 280, 280)),)
    width, height = images(fourth)[0].size
    fifth = env.step(call([0, 0, width / 2, height / 2], image=4))
    assert fifth.regions == (Region(1, (140, 0, 210, 140)),)
    expected = TWO["images"][1].resize(images(fifth)[0].size, Image.Resampling.LANCZOS, box=(140, 0, 210, 140))
    assert np.array_equal(images(fifth)[0], expected)


@pytest.mark.parametrize(
    ("scale", "size"), [(1.5, (420, 224)), (2, (560, 280)), ("full", (560, 280)), (4, (560, 280)), (1.01, (280, 140))]
)
def test_any_scale_may_be_asked_for_up_to_the_full_picture(scale, size):
    env = LookEnv()
    env.reset(ROW)
    shown = env.step(resize(scale))
    assert images(shown)[0].size == size
    assert ("It is at full resolution." in words(shown)) == (size == (560, 280))


REFUSED_LOOKS = {
    "which one": (resize(2), F.WRONG_ARGUMENTS),
    "none of that number": (resize(2, image=3), F.NO_SUCH_IMAGE),
    "number nought": (call([1, 2, 90, 90], image=0), F.NO_SUCH_IMAGE),
    "a number as text": (call([1, 2, 90, 90], image="1"), F.WRONG_ARGUMENTS),
    "half": (resize(0.5, image=1), F.WRONG_ARGUMENTS),
    "as it is": (resize(1, image=1), F.WRONG_ARGUMENTS),
    "a scale as text": (resize("2", image=1), F.WRONG_ARGUMENTS),
    "true": (resize(True, image=1), F.WRONG_ARGUMENTS),
    "NaN": (resize(float("nan"), image=1), F.WRONG_ARGUMENTS),
    "infinite": (resize(float("inf"), image=1), F.WRONG_ARGUMENTS),
    "a huge number": (resize(10**400, image=1), None),
    "another tool": (call([1, 2, 90, 90], name="crop", image=1), F.WRONG_TOOL),
}


@pytest.mark.parametrize(("reply", "fault"), REFUSED_LOOKS.values(), ids=REFUSED_LOOKS)
def test_calls_that_name_no_picture_or_scale_are_refused(reply, fault):
    env = LookEnv()
    env.reset(TWO)
    outcome = env.step(reply)
    if fault is None:  # however large, it is a scale
        assert images(outcome)[0].size == (560, 280)
    else:
        assert (outcome.faults, outcome.granted, images(outcome)) == ((fault,), False, [])


def test_a_picture_at_full_resolution_has_nothing_more_to_show():
    env = LookEnv()
    env.reset(ROW)
    assert images(env.step(resize("full")))[0].size == (560, 280)
    again = env.step(resize(2, image=2))
    assert again.faults == (F.CALL_AFTER_IMAGE,) and "full resolution already" in words(again)


def test_what_the_budget_cannot_pay_is_refused_and_said_so():
    """The opening takes 10 x 5 = 50 tokens, the full picture 20 x 10 = 200, the part 10 x 5 = 50."""
    env = LookEnv(max_visual_tokens=249)
    env.reset(ROW)
    refused = env.step(resize("full"))
    assert refused.faults == (F.OVER_BUDGET,) and "more room than is left" in words(refused)
    assert env.step(call([140, 35, 210, 70])).granted and env.album.spent == 100
    assert LookEnv(max_visual_tokens=250).reset(ROW) and env.album.spent <= 249
    enough = LookEnv(max_visual_tokens=250)
    enough.reset(ROW)
    assert enough.step(resize("full")).granted and enough.album.spent == 250


def test_two_turns_of_look_are_the_resize_environment_in_other_words():
    """Same pictures, same ends: what differs is the wording of the tool."""
    look, plain = LookEnv(tools=["resize"], turns=2, pictures=1), ResizeEnv(min_pixels=3136)
    row = {**ROW, "image": picture(3, (560, 448))}
    assert images(look.reset(row))[0].size == images(plain.reset(row))[0].size == (280, 224)
    asked = [look.step(resize("full")), plain.step(RESIZE)]
    assert np.array_equal(*[images(one)[0] for one in asked])
    assert look.step(ANSWER) == plain.step(ANSWER) == Done(S.ANSWERED, "5")


def test_a_frame_that_is_not_the_models_is_warned_of(caplog):
    make_environment("zoom", {"boxes": "per_mille"}, EIGHT)
    assert not caplog.text
    make_environment("zoom", {"boxes": "shown_pixels"}, EIGHT)
    assert "boxes is shown_pixels, and the model's family writes per_mille" in caplog.text


def test_several_pictures_are_never_cut_to_one():
    starts = [lambda: Dialogue(ZoomEnv(), TWO), lambda: ZoomEnv().reset(TWO), lambda: LookEnv(pictures=1).reset(TWO)]
    for start in starts:
        with pytest.raises(DataError, match="2 pictures"):
            start()
    assert len(Dialogue(LookEnv(), TWO).images) == 2


@pytest.mark.parametrize("env", [ZoomEnv(turns=5, shape="inline", boxes="unit"), LookEnv(pictures=2, tools=["zoom"])])
def test_a_checkpoint_is_played_as_it_was_trained(env):
    facts = json.loads(json.dumps(environment_facts(env, SimpleNamespace(max_turn_tokens=9))))
    policy = trained_policy(facts)
    assert policy.name == {ZoomEnv: "zoom", LookEnv: "look"}[type(env)]
    again = policy.environment(trained_settings(policy, facts), EIGHT)()
    assert type(again) is type(env) and again.prompts.task == env.prompts.task.replace(
        "in pixels of the image as it was shown", "in thousandths of the image's width and height, from 0 to 1000"
    )
    names = ("max_turns", "shape", "max_pictures", "max_images", "rule", "start_scale", "numbered")
    assert [getattr(again, name) for name in names] == [getattr(env, name) for name in names]
    assert again.sight == (Sight("unit", 32, 65_536, 16_777_216) if env.shape == "inline" else EIGHT)
    full = trained_settings(parse_policy("always-full"), facts)  # a control sees as many pixels
    assert (full["max_pixels"], full["min_pixels"]) == (env.rule.max_pixels, 3136)


class Widths(NamedTuple):
    side: int  # pixels per patch
    merge: int
    factor: int


def test_preflight_counts_as_many_pictures_as_there_can_be(tmp_path):
    args = VTGRPOConfig(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        environment="zoom",
        environment_args={"turns": 3, "max_pixels": 1_003_520},
        max_turn_tokens=100,
        max_completion_length=8000,
    )
    episode = longest_episode(args, Widths(14, 2, 28), PixelLimits())
    # 1001 x 1001 px are shown as 35 x 35 tokens, and three times the whole of it as a crop of at most 1024.
    assert (episode.images, episode.turns, episode.prompt_visual) == (3, 3, 35 * 35)
    assert 2 * 1000 < episode.reply_visual <= 2 * 1024
