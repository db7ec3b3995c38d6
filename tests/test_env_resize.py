"""The two-turn environment: what each kind of reply leads to, what the policy then reads, and how it is counted."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_rows, picture
from helpers import booked
from PIL import Image

from vt_trl.envs import DirectEnv, Environment, ResizeEnv, make_environment
from vt_trl.errors import ConfigError, DataError
from vt_trl.metrics import RolloutRecord, summarise
from vt_trl.rewards import accuracy_reward, format_reward
from vt_trl.types import Done, Fault, Observation, Rollout, RolloutStatus

S, F = RolloutStatus, Fault
THINK = "<think>Hm.</think>"
ANSWER = f"{THINK}<answer>5</answer>"
CALL = f'{THINK}<tool_call>{{"name": "resize_image", "arguments": {{"action": "resize"}}}}</tool_call>'
SECRET = "zebra"  # whatever the policy writes of its own; no message may say it back


def call(name: str = "resize_image", arguments: str = '{"action": "resize"}', before: str = THINK) -> str:
    return f'{before}<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


# Calls that cannot be run: reply -> fault, and the words by which the policy learns of it in the first turn.
REFUSED = {
    "no JSON": (f"{THINK}<tool_call>{SECRET}</tool_call>", F.BAD_JSON, "no JSON object"),
    "an extra key": (f'{THINK}<tool_call>{{"{SECRET}": 1}}</tool_call>', F.BAD_JSON, "no JSON object"),
    "another tool": (call(SECRET), F.WRONG_TOOL, "the only one is resize_image"),
    "another argument": (call(arguments=f'{{"action": "{SECRET}"}}'), F.WRONG_ARGUMENTS, '{"action": "resize"}'),
    "one argument more": (
        call(arguments=f'{{"action": "resize", "{SECRET}": 2}}'),
        F.WRONG_ARGUMENTS,
        '{"action": "resize"}',
    ),
    "no argument": (call(arguments="{}"), F.WRONG_ARGUMENTS, '{"action": "resize"}'),
    "two calls": (CALL + CALL + SECRET, F.SEVERAL_CALLS, "several were made"),
    "call and answer": (f"{CALL}<answer>{SECRET}</answer>", F.CALL_AND_ANSWER, "either an answer or a tool call"),
    "doubled tags": (f"{THINK}<tool_call>{SECRET}{CALL[len(THINK) :]}", F.DOUBLED_TAGS, "doubled"),
    "unclosed call": (f"{THINK}<tool_call>{SECRET}", F.BROKEN_TAGS, "not closed"),
}
# Replies that end the episode without a call: reply -> status, answer, fault.
ENDING = {
    "clean answer": (ANSWER, S.ANSWERED, "5", None),
    "no think": ("<answer>5</answer>", S.ANSWERED, "5", F.MISSING_THINK),
    "empty think": ("<think></think><answer>5</answer>", S.ANSWERED, "5", F.EMPTY_THINK),
    "stray text": (f"{ANSWER} bye", S.ANSWERED, "5", F.STRAY_TEXT),
    "think after": ("<answer>5</answer><think>a</think>", S.ANSWERED, "5", F.BROKEN_TAGS),
    "two thinks": (THINK + ANSWER, S.ANSWERED, "5", F.DOUBLED_TAGS),
    "empty answer": (f"{THINK}<answer> </answer>", S.NO_ANSWER, None, F.EMPTY_ANSWER),
    "two answers": (f"{ANSWER}<answer>6</answer>", S.NO_ANSWER, None, F.SEVERAL_ANSWERS),
    "open answer": (f"{THINK}<answer>5", S.NO_ANSWER, None, F.BROKEN_TAGS),
    "no move": (THINK, S.NO_ANSWER, None, F.NO_MOVE),
    "nothing": ("", S.NO_ANSWER, None, F.NO_MOVE),
}


def play(env: Environment, *replies: str, truncated: bool = False) -> tuple[Rollout, list[Observation]]:
    return booked(env, make_rows(1)[0], replies, truncated)


def counters(rollout: Rollout) -> set[str]:
    """Names of the statuses and faults that the log of this one rollout holds."""
    numbers = summarise([RolloutRecord.of(rollout, "g")])
    return {name for name, value in numbers.items() if name.startswith(("status/", "fault/")) and value}


def words(observation: Observation) -> str:
    return " ".join(message.text for message in observation.messages)


@pytest.mark.parametrize(("reply", "fault", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_refused_call_is_explained_once_and_the_answer_still_counts(reply, fault, reason):
    rollout, (observation,) = play(ResizeEnv(), reply, ANSWER)
    assert reason in words(observation) and SECRET not in words(observation)
    assert observation.messages[0].role == "user" and not observation.messages[0].images
    assert (rollout.status, rollout.answer, rollout.asked, rollout.attempted) == (S.ANSWERED, "5", False, True)
    assert fault in rollout.turns[0].faults and not rollout.turns[1].faults
    assert format_reward([[]], rollout=[rollout]) == [0.0]
    assert counters(rollout) >= {"status/answered", f"fault/{fault.value}"}


@pytest.mark.parametrize(("reply", "fault", "reason"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("first", [CALL, call("crop")], ids=["after the image", "after a refusal"])
def test_a_call_that_cannot_be_run_ends_the_last_turn(first, reply, fault, reason):
    rollout, _ = play(ResizeEnv(), first, reply)
    assert (rollout.status, rollout.answer, rollout.attempted) == (S.MALFORMED_CALL, None, True)
    assert rollout.asked == (first == CALL)
    assert fault in rollout.turns[1].faults
    assert format_reward([[]], rollout=[rollout]) == [0.0]
    assert counters(rollout) >= {"status/malformed_call", f"fault/{fault.value}"}


@pytest.mark.parametrize(("reply", "status", "answer", "fault"), ENDING.values(), ids=ENDING)
@pytest.mark.parametrize("before", [(), (CALL,)], ids=["first turn", "after the image"])
def test_replies_without_a_call_end_the_episode(before, reply, status, answer, fault):
    rollout, _ = play(ResizeEnv(), *before, reply)
    assert (rollout.status, rollout.answer, rollout.asked) == (status, answer, bool(before))
    assert rollout.attempted == bool(before)
    assert format_reward([[]], rollout=[rollout]) == [float(fault is None)]
    assert f"status/{status.value}" in counters(rollout)
    assert (fault in rollout.turns[-1].faults) if fault else not rollout.faults
    assert accuracy_reward([[]], ["5"], rollout=[rollout]) == [float(answer == "5")]


@pytest.mark.parametrize("before", [(), (CALL,)], ids=["first turn", "after the image"])
@pytest.mark.parametrize("reply", [ANSWER, CALL, ""])
def test_a_truncated_turn_ends_the_episode_whatever_it_says(before, reply):
    rollout, _ = play(ResizeEnv(), *before, reply, truncated=True)
    assert (rollout.status, rollout.answer, rollout.turns[-1].faults) == (S.TRUNCATED, None, (F.TRUNCATED,))
    assert rollout.asked == rollout.attempted == bool(before)
    assert format_reward([[]], rollout=[rollout]) == [0.0]
    assert counters(rollout) == {"status/truncated", "fault/truncated"}


def test_a_second_call_after_the_image_has_nothing_more_to_show():
    rollout, _ = play(ResizeEnv(), CALL, CALL)
    assert (rollout.status, rollout.faults) == (S.TURN_LIMIT, [F.CALL_AFTER_IMAGE])
    assert rollout.asked and format_reward([[]], rollout=[rollout]) == [0.0]
    assert counters(rollout) == {"status/turn_limit", "fault/call_after_image"}


def test_a_good_call_in_the_last_turn_comes_too_late_and_is_not_at_fault():
    rollout, _ = play(ResizeEnv(), call("crop"), CALL)
    assert (rollout.status, rollout.turns[1].faults, rollout.asked) == (S.TURN_LIMIT, (), False)
    assert format_reward([[]], rollout=[rollout]) == [0.0]


@pytest.mark.parametrize(("before", "fault"), [("", F.MISSING_THINK), (f"so {THINK}", F.STRAY_TEXT)])
def test_a_readable_call_in_bad_form_is_granted_but_costs_the_format(before, fault):
    rollout, (observation,) = play(ResizeEnv(), call(before=before), ANSWER)
    assert observation.granted and rollout.asked and rollout.turns[0].faults == (fault,)
    assert (rollout.status, format_reward([[]], rollout=[rollout])) == (S.ANSWERED, [0.0])


def test_only_calls_that_were_run_count_as_asked():
    rollouts = [play(ResizeEnv(), *replies)[0] for replies in [(ANSWER,), (CALL, ANSWER), (call("crop"), ANSWER)]]
    numbers = summarise([RolloutRecord.of(rollout, "g") for rollout in rollouts])
    assert numbers["request_rate"] == pytest.approx(1 / 3) and numbers["requests_succeeded"] == 0.5


@pytest.mark.parametrize("size", [(640, 512), (641, 513), (1001, 777), (60, 44), (5000, 3000)])
def test_the_low_view_is_half_and_the_tools_image_is_the_full_view(size):
    env, row = ResizeEnv(), make_rows(1, size)[0]
    shown = env.reset(row).messages
    (low,) = [image for message in shown for image in message.images]
    granted = env.step(CALL)
    (full,) = granted.messages[0].images
    assert (2 * low.width, 2 * low.height) == full.size == env.rule.full_size(*size)
    source = row["image"] if size == full.size else row["image"].resize(full.size, Image.Resampling.LANCZOS)
    assert np.array_equal(full, source)
    assert np.array_equal(low, full.resize(low.size, Image.Resampling.LANCZOS))


def test_what_is_shown_comes_in_the_agreed_order():
    env = ResizeEnv()
    system, user = env.reset(make_rows(1)[0]).messages
    assert (system.role, user.role) == ("system", "user") and '"name": "resize_image"' in system.text
    assert user.text.startswith("<image>\nWhich number is 0?\n\n")
    (reply,) = env.step(CALL).messages
    assert reply.role == "user" and reply.text.startswith("<tool_response>\n")
    before, after = reply.text.split("<image>")
    assert "</tool_response>" in after and "</tool_response>" not in before


def test_a_question_is_not_a_template():
    row = make_rows(1)[0] | {"question": "What is {question} or {reason}?"}
    assert "\nWhat is {question} or {reason}?\n" in ResizeEnv().reset(row).messages[1].text


def test_forks_are_independent_and_share_the_picture():
    first = ResizeEnv()
    first.reset(make_rows(1)[0])
    one, two = first.fork(), first.fork()
    asked = one.step(CALL)
    assert two.turn == first.turn == 0 and not two.shown
    assert isinstance(two.step(CALL), Observation)  # neither its first turn nor its image is used up
    assert asked.messages[0].images[0] is two.tool_image()


def test_reset_starts_anew():
    env = ResizeEnv()
    for _ in range(2):
        rollout, (observation,) = play(env, CALL, ANSWER)
        assert observation.granted and rollout.status is S.ANSWERED


@pytest.mark.parametrize("env", [ResizeEnv(), DirectEnv(), DirectEnv("low")], ids=["resize", "direct", "direct low"])
def test_gold_routes_earn_full_marks(env):
    row = make_rows(3)[2]
    ends = env.validate(row)
    assert len(ends) == (2 if isinstance(env, ResizeEnv) else 1)
    for end, replies in zip(ends, env.gold_replies(row), strict=True):
        rollout, _ = play(env, *replies)
        assert end == Done(rollout.status, "2")
        assert accuracy_reward([[]], [row["answer"]], rollout=[rollout]) == [1.0]
        assert format_reward([[]], rollout=[rollout]) == [1.0]
        # the same dialogue under stock TRL
        messages = [{"role": "assistant", "content": reply} for reply in replies]
        assert accuracy_reward([messages], [row["answer"]]) == format_reward([messages]) == [1.0]


@pytest.mark.parametrize(
    ("gold", "message"),
    [([ANSWER, ANSWER], "gold reply 1 of 2 ended the episode"), ([CALL], "1 of 1 left the episode open")],
)
def test_validate_finds_gold_replies_that_do_not_fit(gold, message):
    class Wrong(ResizeEnv):
        def gold_replies(self, row):
            return [gold]

    with pytest.raises(RuntimeError, match=f"Wrong: .*{message}"):
        Wrong().validate(make_rows(1)[0])


@pytest.mark.parametrize(("resolution", "factor"), [("full", 1), ("low", 2)])
def test_the_direct_environment_shows_one_view_and_takes_one_reply(resolution, factor):
    env, row = DirectEnv(resolution), make_rows(1, (640, 512))[0]
    system, user = env.reset(row).messages
    assert user.images[0].size == (640 // factor, 512 // factor)
    assert "resize_image" not in system.text + user.text


DIRECT = {
    "answer": (ANSWER, False, S.ANSWERED, "5", False),
    "nothing": ("", False, S.NO_ANSWER, None, False),
    "call": (CALL, False, S.TURN_LIMIT, None, True),
    "bad call": (f"{THINK}<tool_call></tool_call>", False, S.MALFORMED_CALL, None, True),
    "truncated": (ANSWER, True, S.TRUNCATED, None, False),
}


@pytest.mark.parametrize(("reply", "truncated", "status", "answer", "attempted"), DIRECT.values(), ids=DIRECT)
def test_the_direct_environment_always_ends(reply, truncated, status, answer, attempted):
    rollout, _ = play(DirectEnv(), reply, truncated=truncated)
    assert (rollout.status, rollout.answer, rollout.attempted, rollout.asked) == (status, answer, attempted, False)
    assert format_reward([[]], rollout=[rollout]) == [float(status is S.ANSWERED)]


def test_a_row_that_cannot_be_shown_raises():
    with pytest.raises(DataError, match="aspect"):
        ResizeEnv().reset({"image": picture(size=(2000, 4)), "question": "?"})


class NotOne:
    pass


class Picky(DirectEnv):
    def __init__(self, level: int):
        super().__init__()
        self.level = level


def test_environments_are_built_by_name_with_their_settings():
    build = make_environment("resize", {"max_pixels": 400_000, "prompts": {"system": "Look."}})
    assert build() is not build()
    assert build().rule.max_pixels == 400_000 and build().prompts.system == "Look."
    assert make_environment("direct", {"resolution": "low"})().resolution == "low"
    assert make_environment(f"{__name__}:Picky", {"level": 3})().level == 3


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resise", None, "unknown. Did you mean 'resize'"),
        ("zzz", None, "unknown. Use one of resize, direct"),
        (f"{__name__}:NotOne", None, "not a subclass"),
        (f"{__name__}:play", None, "not a subclass"),
        (f"{__name__}:Missing", None, "Missing"),
        ("no_such_module:Env", None, "no_such_module"),
        (":Env", None, "`module:Name`"),
        (".envs:Env", None, "`module:Name`"),
        ("resize", {"max_pixles": 1}, "environment_args do not fit ResizeEnv.*max_pixles"),
        ("direct", {"scale": 1}, "scale"),
        ("direct", {"resolution": "half"}, "'full' or 'low'"),
        ("resize", {"prompts": {"taks": "x"}}, "no text 'taks'"),
        ("resize", {"prompts": {"task": "no slot"}}, "question"),
        (f"{__name__}:Picky", {}, "do not fit Picky.*level"),
    ],
)
def test_environments_that_cannot_be_built_say_why(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_environment(name, settings)
