"""The environments that look again: what each call leads to, what the policy reads, and the budgets it is kept to."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import picture
from helpers import booked
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_env_resize import counters
from transformers import Qwen2VLImageProcessor

from vt_trl.boxes import Sight
from vt_trl.envs import LookEnv, ZoomEnv, make_environment
from vt_trl.envs.inline import boxes_in
from vt_trl.errors import ConfigError
from vt_trl.features import ImageSizes
from vt_trl.types import INSERTED, Done, Fault, Observation, Region, Rollout, RolloutStatus

S, F = RolloutStatus, Fault
THINK = "<think>Hm.</think>"
ANSWER = f"{THINK}<answer>5</answer>"
SECRET = "zebra"  # whatever the policy writes of its own; no message may say it back
ROW = {"id": "r", "image": picture(1, (560, 280)), "question": "What?", "answer": ["5"]}
EIGHT = Sight("per_mille", 32, 65_536, 16_777_216)  # as of Qwen3-VL
SEVEN = Sight("shown_pixels", 28, 3136, 12_845_056)  # as of Qwen2.5-VL


def call(box, name="zoom_image", **more) -> str:
    arguments = {"bbox_2d": box, **more}
    return f"{THINK}<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def inline(box, before="<think>Look: ", **more) -> str:
    return before + json.dumps({"bbox_2d": box, **more})


def play(env, *replies, row=ROW, truncated=False) -> tuple[Rollout, list[Observation]]:
    return booked(env, row, replies, truncated)


def images(observation: Observation) -> list[Image.Image]:
    return [image for message in observation.messages for image in message.images]


def words(observation: Observation) -> str:
    return " ".join(message.text for message in observation.messages)


# The box of 280..420 x 70..140 of a picture of 560 x 280 pixels: share 1/16, so enlarged twice.
FRAMES = {
    "shown_pixels": (SEVEN, [280, 70, 420, 140], (280, 140)),
    "per_mille": (EIGHT, [500, 250, 750, 500], (384, 192)),  # 288 x 128 has 36 tokens, and the processor wants 64
    "unit": (Sight("unit"), [0.5, 0.25, 0.75, 0.5], (280, 140)),
}


@pytest.mark.parametrize(("sight", "box", "size"), FRAMES.values(), ids=FRAMES)
def test_a_box_in_the_familys_frame_shows_that_part_of_the_original(sight, box, size):
    rollout, (shown,) = play(ZoomEnv(sight=sight), call(box, label="sign"), ANSWER)
    (crop,) = images(shown)
    expected = ROW["image"].resize(crop.size, Image.Resampling.LANCZOS, box=(280, 70, 420, 140))
    assert crop.size[0] == size[0] and np.array_equal(crop, expected)
    assert shown.granted and rollout.regions == [Region(0, (280, 70, 420, 140))]
    assert (rollout.status, rollout.answer, rollout.well_formed) == (S.ANSWERED, "5", True)
    assert shown.messages[0].role == "user" and words(shown).startswith("<tool_response>\n<image>\n</tool_response>")


@pytest.mark.parametrize("sight", [SEVEN, EIGHT, Sight("unit", 32, 4096, 200_000)])
@pytest.mark.parametrize("size", [(560, 280), (1001, 777), (90, 70), (4000, 100)])
def test_the_model_sees_pictures_as_the_environment_thinks(sight, size):
    processor = Qwen2VLImageProcessor(
        patch_size=sight.factor // 2,
        merge_size=2,
        size={"shortest_edge": sight.min_pixels, "longest_edge": sight.max_pixels},
    )
    env = ZoomEnv(sight=sight)
    opening = env.reset({**ROW, "image": Image.new("RGB", size)})
    sides = sight.sides(images(opening)[0].size)
    shown = env.step(call([0.1 * sides[0], 0.2 * sides[1], 0.6 * sides[0], 0.9 * sides[1]]))
    for image in images(opening) + images(shown):
        width, height = (side // sight.factor for side in image.size)
        assert (width * sight.factor, height * sight.factor) == image.size
        assert ImageSizes(processor).visual_tokens(image) == width * height
    said = opening.messages[1].text
    pixels = f"{images(opening)[0].width} x {images(opening)[0].height} pixels"
    assert (pixels in said) == (sight.boxes == "shown_pixels")


# Boxes that cannot be shown, in pixels of a picture of 560 x 280: arguments -> fault, and what the policy reads.
REFUSED = {
    "reversed": ({"bbox_2d": [400, 50, 300, 90]}, F.BOX_REVERSED, "reversed"),
    "outside": ({"bbox_2d": [500, 50, 700, 90]}, F.BOX_OUTSIDE, "outside"),
    "empty": ({"bbox_2d": [400, 50, 400, 90]}, F.BOX_EMPTY, "empty"),
    "tiny": ({"bbox_2d": [400, 50, 405, 90]}, F.BOX_TINY, "too small"),
    "NaN": ({"bbox_2d": [float("nan"), 50, 405, 90]}, F.BOX_NOT_FINITE, "finite"),
    "texts": ({"bbox_2d": ["400", "50", "500", "90"]}, F.BOX_NO_NUMBERS, "four numbers"),
    "several": ({"bbox_2d": [[1, 2, 90, 90], [4, 5, 90, 90]]}, F.SEVERAL_BOXES, "Only one box"),
}
REFUSED_CALLS = REFUSED | {
    "another key": ({"bbox_2d": [1, 2, 90, 90], SECRET: 1}, F.WRONG_ARGUMENTS, "do not fit"),
    "no box": ({"label": SECRET}, F.WRONG_ARGUMENTS, "do not fit"),
    "a label that is no text": ({"bbox_2d": [1, 2, 90, 90], "label": 5}, F.WRONG_ARGUMENTS, "do not fit"),
    "a picture it does not take": ({"bbox_2d": [1, 2, 90, 90], "image": 1}, F.WRONG_ARGUMENTS, "do not fit"),
}


def as_call(arguments):
    return f"{THINK}<tool_call>{json.dumps({'name': 'zoom_image', 'arguments': arguments})}</tool_call>"


@pytest.mark.parametrize(("arguments", "fault", "reason"), REFUSED_CALLS.values(), ids=REFUSED_CALLS)
def test_a_bad_box_is_explained_and_shows_nothing(arguments, fault, reason):
    good = call([280, 70, 420, 140])
    rollout, (first, refused) = play(ZoomEnv(), good, as_call(arguments), ANSWER)
    assert first.granted and not refused.granted
    assert images(refused) == [] and refused.regions == ()  # no crop, and not the one before either
    assert refused.faults == (fault,) and reason in words(refused) and SECRET not in words(refused)
    assert (rollout.status, rollout.answer, len(rollout.regions)) == (S.ANSWERED, "5", 1)
    assert not rollout.well_formed and counters(rollout) >= {"status/answered", f"fault/{fault.value}"}


@pytest.mark.parametrize(("arguments", "fault", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_bad_box_in_the_last_turn_ends_the_episode(arguments, fault, reason):
    for env, reply in ((ZoomEnv(turns=1), as_call(arguments)), (ZoomEnv(turns=1, shape="inline"), None)):
        reply = reply or inline(arguments["bbox_2d"])
        rollout, _ = play(env, reply)
        assert (rollout.status, rollout.faults, rollout.asked, rollout.attempted) == (
            S.MALFORMED_CALL,
            [fault],
            False,
            True,
        )


@pytest.mark.parametrize("shape", ["tool_call", "inline"])
def test_turns_are_counted_and_a_box_in_the_last_one_comes_too_late(shape):
    env = ZoomEnv(turns=3, shape=shape)
    first = call([0, 0, 280, 140]) if shape == "tool_call" else inline([0, 0, 280, 140])
    more = first if shape == "tool_call" else inline([0, 0, 280, 140], " And ")
    rollout, shown = play(env, first, more, more)
    assert (rollout.status, len(shown), rollout.faults) == (S.TURN_LIMIT, 2, [])
    assert env.max_images == 3 and [one.granted for one in shown] == [True, True]


def test_a_truncated_turn_ends_the_episode():
    rollout, _ = play(ZoomEnv(shape="inline"), inline([0, 0, 280, 140]), " so", truncated=True)
    assert (rollout.status, rollout.turns[-1].faults) == (S.TRUNCATED, (F.TRUNCATED,))


# The inline shape: segments -> status, answer, faults per segment.
BOX = json.dumps({"bbox_2d": [280, 70, 420, 140]})
INLINE = {
    "clean": ([f"<think>A {BOX}", f" b {BOX}", " c</think><answer>5</answer>"], S.ANSWERED, "5", [(), (), ()]),
    "at once": ([ANSWER], S.ANSWERED, "5", [()]),
    "a label": ([inline([280, 70, 420, 140], label="x"), "</think><answer>5</answer>"], S.ANSWERED, "5", [(), ()]),
    "no think": (
        [f"A {BOX}", " b<answer>5</answer>"],
        S.ANSWERED,
        "5",
        [(F.MISSING_THINK,), (F.MISSING_THINK, F.STRAY_TEXT)],
    ),
    "behind the reasoning": (
        [f"<think>A</think>{BOX}", "<answer>5</answer>"],
        S.ANSWERED,
        "5",
        [(F.BROKEN_TAGS,), (F.STRAY_TEXT,)],
    ),
    "think twice": (
        [f"<think>A{BOX}", f"<think>b{BOX}", "</think><answer>5</answer>"],
        S.ANSWERED,
        "5",
        [(), (F.DOUBLED_TAGS,), (F.DOUBLED_TAGS, F.STRAY_TEXT)],
    ),
    "another key": (
        ['<think>A{"bbox_2d": [1, 2, 90, 90], "a": 1}', "</think><answer>5</answer>"],
        S.ANSWERED,
        "5",
        [(F.WRONG_ARGUMENTS,), ()],
    ),
    "no JSON": (['<think>A{"bbox_2d": 1 2}', "</think><answer>5</answer>"], S.ANSWERED, "5", [(F.BAD_JSON,), ()]),
    "two boxes": ([f"<think>A{BOX}{BOX}", "</think><answer>5</answer>"], S.ANSWERED, "5", [(F.SEVERAL_BOXES,), ()]),
    "box and answer": (
        [f"<think>A{BOX}</think><answer>5</answer>", "x"],
        S.NO_ANSWER,
        None,
        [(F.CALL_AND_ANSWER, F.BROKEN_TAGS), None],
    ),
    "a tool call": (
        [call([1, 2, 90, 90]).replace("bbox_2d", "box"), "x"],
        S.ANSWERED,
        None,
        [(F.WRONG_TOOL,), None],
    ),
    "nothing": ([""], S.NO_ANSWER, None, [(F.NO_MOVE, F.MISSING_THINK)]),
}


@pytest.mark.parametrize(("replies", "status", "answer", "faults"), INLINE.values(), ids=INLINE)
def test_the_inline_shape_is_judged_over_all_segments(replies, status, answer, faults):
    if None in faults:  # what comes after it is of no interest
        env = ZoomEnv(shape="inline")
        env.reset(ROW)
        outcome = env.step(replies[0])
        assert isinstance(outcome, Observation) and not outcome.granted and outcome.faults == faults[0]
        return
    rollout, shown = play(ZoomEnv(shape="inline"), *replies)
    assert (rollout.status, rollout.answer) == (status, answer)
    assert [turn.faults for turn in rollout.turns] == faults
    assert all(message.role == INSERTED for one in shown for message in one.messages)
    assert [one.granted for one in shown] == [not {F.BAD_JSON, F.SEVERAL_BOXES, F.WRONG_ARGUMENTS} & set(turn)
                                              for turn in faults[:-1]]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "goes_on"),
    [
        ("<think>so \\frac{1}", True),
        ("<think>{1, 2}", True),
        ("<think>bbox_2d}", True),
        (f"<think>{BOX}", False),
        (f"<think>{BOX},\n", False),
        ('<think>{"label": "a", "bbox_2d": [1]}', False),
    ],
)
def test_only_a_box_ends_a_segment(text, goes_on):
    assert ZoomEnv(shape="inline").goes_on(text) is goes_on
    assert ZoomEnv().stop_texts == () and ZoomEnv(shape="inline").stop_texts == ("}",)


@pytest.mark.parametrize("unit", ["{", "}", '{"bbox_2d"', '{"bbox_2d"}', '"bbox_2d"', "{}"])
def test_a_megabyte_of_braces_is_no_work(unit):
    found = boxes_in(unit * (1_000_000 // len(unit)))
    assert bool(found) == (unit == '{"bbox_2d"}')


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
NUMBERS = st.floats(-0.02, 1.02)
SCALES = st.sampled_from([1.5, 2, 4, 9, "full", 0.5])


@settings(max_examples=60)
@given(
    st.sampled_from([SEVEN, EIGHT, Sight("unit")]),
    st.tuples(st.integers(20, 700), st.integers(20, 700)),
    st.lists(st.tuples(st.tuples(*[NUMBERS] * 4), st.integers(-1, 9), SCALES, JUNK)),
    st.integers(80, 900),
)
def test_whatever_is_asked_for_budgets_hold_and_parts_lie_inside(sight, size, wishes, budget):
    budget = max(budget, 2 * -(-sight.min_pixels // sight.factor**2))
    env = LookEnv(sight=sight, turns=6, max_visual_tokens=budget, crop_tokens=[4, 300], start_scale=1.5)
    opening = env.reset({**ROW, "image": Image.new("L", size)})
    shown, outcome = images(opening), opening
    for number, (shares, image, scale, junk) in enumerate(wishes):
        if isinstance(outcome, Done):
            break
        sides = sight.sides(env.album.views[min(max(image, 1), len(env.album.views)) - 1].size)
        box = [share * side for share, side in zip(shares, (*sides, *sides), strict=True)]
        arguments = [{"bbox_2d": box, "image": image}, {"scale": scale, "image": image}, {"bbox_2d": junk}][number % 3]
        name = "resize_image" if number % 3 == 1 else "zoom_image"
        outcome = env.step(f"{THINK}<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>")
        if isinstance(outcome, Observation):
            assert len(images(outcome)) == outcome.granted
            shown += images(outcome)
            for region in outcome.regions:
                left, top, right, bottom = region.box
                assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    tokens = [sight.visual_tokens(image.size) for image in shown]
    assert sum(tokens) <= budget and len(shown) <= env.max_images
    assert max(image.width * image.height for image in shown) <= env.max_image_pixels
    assert all(image.width % sight.factor == image.height % sight.factor == 0 for image in shown)


def test_members_of_a_group_share_what_was_made_and_nothing_else():
    env = ZoomEnv()
    opening = env.reset(ROW)
    one, two = env.fork(), env.fork()
    reply = call([280, 70, 420, 140])
    first, second = one.step(reply), two.step(reply)
    assert images(first)[0] is images(second)[0] and images(first)[0] is not images(opening)[0]
    assert len(env.album.views) == 1 and len(one.album.views) == 2 and env.turn == 0


@pytest.mark.parametrize("name", ["zoom", "look"])
@pytest.mark.parametrize("boxes", ["shown_pixels", "per_mille", "unit"])
@pytest.mark.parametrize("shape", ["tool_call", "inline"])
def test_gold_routes_earn_full_marks(name, boxes, shape):
    settings = {"boxes": boxes, "shape": shape, "turns": 3} | ({"tools": ["zoom"]} if name == "look" else {})
    env = make_environment(name, settings, EIGHT)()
    row = {**ROW, "region": [100.5, 60, 200, 100]}
    env.reset(row)
    for replies in env.gold_replies(row):
        rollout, shown = play(env, *replies, row=row)
        assert rollout.well_formed and rollout.answer == "5"
        assert len(rollout.regions) == len(shown) == len(replies) - 1
        for region in rollout.regions:  # thousandths of 280 pixels are a quarter of one
            assert region.box == pytest.approx((100.5, 60, 200, 100), abs=1.5)
    assert len(env.validate(row)) == 2


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("zoom", {"boxes": "pixels"}, "boxes is 'pixels'"),
        ("zoom", {"turns": 0}, "turns is 0"),
        ("zoom", {"tools": ["zoom"]}, "environment: look"),
        ("zoom", {"shape": "in_line"}, "tool_call or inline"),
        ("zoom", {"tolerance": 0.5}, "tolerance is 0.5"),
        ("zoom", {"crop_tokens": [4]}, "least and the most"),
        ("zoom", {"crop_tokens": [4, 7]}, "twice the least"),
        ("zoom", {"max_visual_tokens": 0}, "max_visual_tokens is 0"),
        ("zoom", {"prompts": {"task": "no slot"}}, "question"),
        ("look", {"shape": "inline"}, "only boxes can be written"),
        ("look", {"tools": ["crop"]}, "tools is"),
        ("look", {"start_scale": 0.5}, "start_scale"),
        ("look", {"pictures": 0}, "pictures is 0"),
    ],
)
def test_settings_that_cannot_work_say_why(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_environment(name, settings)


def test_the_models_sight_is_used_and_boxes_replaces_its_frame():
    assert make_environment("zoom", None, EIGHT)().sight is EIGHT
    assert make_environment("zoom", {"boxes": "unit"}, EIGHT)().sight == Sight("unit", 32, 65_536, 16_777_216)
    assert make_environment("resize", None, EIGHT)()  # which need not know
