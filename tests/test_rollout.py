"""The multi-turn loop on integers: text is numbers and blanks, picture n is n placeholders, 99 ends a turn."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

from vt_trl.chat import Encoded
from vt_trl.envs import Environment
from vt_trl.envs.base import user
from vt_trl.errors import DataError
from vt_trl.generation.base import Request, Sample, SamplingSettings, ScriptedBackend
from vt_trl.rollout import Limits, RolloutRunner
from vt_trl.types import Done, Fault, ImagePart, Observation, Region, RolloutStatus

PIC, STOP, ASK = 90, 99, 7
S = RolloutStatus
WIDE = Limits(turn=50, completion=50)


class FakeEncoder:
    def _encode(self, messages) -> Encoded:
        ids, images = [], []
        for part in (part for message in messages for part in message.parts):
            if isinstance(part, ImagePart):
                ids += [PIC] * part.image
                images.append(part.image)
            else:
                ids += [int(word) for word in part.text.split()]
        return Encoded(ids, images, sum(images))

    prompt = reply = _encode

    def decode(self, ids, stop_ids) -> str:
        ids = list(ids)
        return " ".join(map(str, ids[:-1] if ids and ids[-1] in stop_ids else ids))


class Looks(Environment):
    """A reply that starts with 7 is shown picture 3 between 4 and 5, any number of times; any other is the answer."""

    resets: list = []

    def reset(self, row):
        self.resets.append(row["id"])
        self.heard: tuple[str, ...] = ()
        return self.show(user(row["image"], row["question"]))

    def step(self, reply, truncated=False):
        self.heard += (reply,)
        if truncated:
            return Done(S.TRUNCATED, faults=(Fault.TRUNCATED,))
        if reply.startswith(str(ASK)):
            faults = (Fault.STRAY_TEXT,) if " " in reply else ()
            return Observation((user("4", 3, "5"),), faults, called=True, granted=True)
        return Done(S.ANSWERED, answer=" / ".join(self.heard))


@dataclass
class AnyOrder:
    """A backend that ends turns in a drawn order and lets next turns overtake first ones."""

    script: object
    seed: int | str = 0
    pending: list[Request] = field(default_factory=list)
    log: list = field(default_factory=list)

    def begin(self, settings):
        self.log.append(settings)

    def submit(self, request):
        self.pending.append(request)

    def completed(self):
        draw = random.Random(self.seed)
        pick = {"first": lambda n: 0, "last": lambda n: n - 1}.get(self.seed, draw.randrange)
        while self.pending:
            yield self.script(self.pending.pop(pick(len(self.pending))))

    def end(self):
        self.log.append("end")


def say(*tokens: int, finished: bool = True):
    """A sampled turn; the log-probability of token t is -t."""
    return lambda request: Sample(request.request_id, tokens, tuple(-float(t) for t in tokens), finished)


def turns(*scripts):
    """The n-th script for the n-th turn: a prompt holds one picture, and every tool reply brings one more."""
    return lambda request: scripts[len(request.images) - 1](request)


def run(script, rows=None, group=1, limits=WIDE, backend=None, settings=None):
    Looks.resets = []
    backend = backend or ScriptedBackend(script)
    runner = RolloutRunner(Looks, backend, FakeEncoder(), [STOP], limits)
    rows = rows or [{"id": "r1", "image": 2, "question": "1 2"}]
    return runner.run(rows, group, settings or SamplingSettings())


def test_two_turns_token_by_token():
    """
    ::
        prompt  90 90 1 2 | turn 7 6 99 | told 4 90 90 90 5 | turn 8 99
        loss                     1 1 1          0  0  0  0 0        1 1
    """
    requests = []

    def script(request):
        requests.append(request)
        return turns(say(ASK, 6, STOP), say(8, STOP))(request)

    (rollout,) = run(script, limits=Limits(turn=10, completion=12))
    assert rollout.prompt_ids == [90, 90, 1, 2]
    assert rollout.completion_ids == [7, 6, 99, 4, 90, 90, 90, 5, 8, 99]
    assert rollout.loss_mask == [1, 1, 1, 0, 0, 0, 0, 0, 1, 1]
    assert rollout.logprobs == [-7, -6, -99, 0, 0, 0, 0, 0, -8, -99]
    assert (rollout.images, rollout.visual_tokens) == ([2, 3], 5)
    assert (rollout.status, rollout.answer, rollout.asked, rollout.attempted) == (S.ANSWERED, "7 6 / 8", True, True)
    assert [(t.text, t.token_ids, t.faults) for t in rollout.turns] == [
        ("7 6", (7, 6, 99), (Fault.STRAY_TEXT,)),
        ("8", (8, 99), ()),
    ]
    said = [(message.role, message.text) for message in rollout.messages]
    assert said == [("user", "<image>1 2"), ("assistant", "7 6"), ("user", "4<image>5"), ("assistant", "8")]
    assert rollout.prompt_messages == 1
    # What was asked of the backend: all tokens so far, all pictures so far, and the room that is left: 12 - 8 = 4.
    assert requests == [
        Request(0, (90, 90, 1, 2), (2,), 10),
        Request(0, (90, 90, 1, 2, 7, 6, 99, 4, 90, 90, 90, 5), (2, 3), 4),
    ]


def test_a_row_is_reset_once_and_its_group_does_not_share_state():
    rows = [{"id": name, "image": 1, "question": name} for name in ("1", "2")]
    replies = [(say(ASK, STOP), say(8, STOP)), (say(5, STOP),), (say(6, STOP),), (say(ASK, STOP), say(9, STOP))]
    rollouts = run(lambda request: turns(*replies[request.request_id])(request), rows, group=2)
    assert Looks.resets == ["1", "2"]
    assert [rollout.row["id"] for rollout in rollouts] == ["1", "1", "2", "2"]
    assert [rollout.answer for rollout in rollouts] == ["7 / 8", "5", "6", "7 / 9"]
    assert [rollout.images for rollout in rollouts] == [[1, 3], [1], [1], [1, 3]]
    assert [len(rollout.messages) for rollout in rollouts] == [4, 2, 2, 4]
    lists = ("prompt_ids", "completion_ids", "loss_mask", "logprobs", "images", "messages", "turns")
    assert all(getattr(rollouts[0], name) is not getattr(rollouts[1], name) for name in lists)


def test_a_truncated_turn_keeps_its_tokens_and_ends_the_episode():
    (rollout,) = run(say(ASK, 6, finished=False))
    assert (rollout.status, rollout.answer, rollout.asked) == (S.TRUNCATED, None, False)
    assert (rollout.completion_ids, rollout.loss_mask) == ([7, 6], [1, 1])
    assert not rollout.turns[0].finished and rollout.turns[0].faults == (Fault.TRUNCATED,)


@pytest.mark.parametrize(
    ("limits", "rooms"),
    [
        (Limits(turn=50, completion=20), [20, 13]),  # 20 - 2 sampled - 5 told
        (Limits(turn=6, completion=20), [6, 6]),
        (Limits(turn=50, completion=50, context=20), [16, 9]),  # 20 - 4 of the prompt
        (Limits(turn=50, completion=8, context=20), [8, 1]),
        (Limits(turn=50, completion=50, context=12), [8, 1]),
    ],
)
def test_a_turn_gets_the_room_that_the_tightest_limit_leaves(limits, rooms):
    seen = []

    def script(request):
        seen.append(request.max_new_tokens)
        return turns(say(ASK, STOP), say(8))(request)

    assert run(script, limits=limits)[0].status is S.ANSWERED
    assert seen == rooms


@pytest.mark.parametrize("limits", [Limits(50, 7), Limits(50, 50, context=11), Limits(50, 3)])
def test_a_tool_reply_that_leaves_no_room_ends_the_episode_before_it(limits):
    # 2 sampled and 5 told would fill the 7 to the brim: no token would be left to answer with.
    (rollout,) = run(say(ASK, STOP), limits=limits)
    assert (rollout.status, rollout.answer, rollout.detail[:33]) == (
        S.CONTEXT_LIMIT,
        None,
        "the tool's reply has 5 tokens; ra",
    )
    assert (rollout.asked, rollout.attempted) == (False, True)
    assert (rollout.completion_ids, rollout.loss_mask, rollout.images) == ([7, 99], [1, 1], [2])
    assert len(rollout.messages) == 2 and rollout.visual_tokens == 2


@pytest.mark.parametrize("context", [3, 4])
def test_a_prompt_that_fills_the_context_names_row_and_numbers(context):
    with pytest.raises(DataError, match=rf"r1.* 4 tokens \(2 of them visual\).*context of {context};"):
        run(say(8, STOP), limits=Limits(50, 50, context=context))
    assert run(say(8), limits=Limits(50, 50, context=5))[0].completion_ids == [8]


@pytest.mark.parametrize("seed", ["first", "last", *range(6)])
def test_the_order_in_which_turns_end_changes_nothing(seed):
    def script(request):
        # Rollout n looks n % 4 times, then answers; what it says depends on the rollout and the turn alone.
        number, turn = request.request_id, len(request.images)
        return say(*((ASK, number + 100, STOP) if turn <= number % 4 else (number + 200, turn, STOP)))(request)

    rows = [{"id": name, "image": 1, "question": name} for name in ("1", "2", "3")]
    expected = run(script, rows, group=3)
    backend = AnyOrder(script, seed)
    assert run(None, rows, group=3, backend=backend, settings=SamplingSettings(temperature=0.5)) == expected
    assert [len(rollout.turns) for rollout in expected] == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    assert backend.log == [SamplingSettings(temperature=0.5), "end"]


def test_the_next_turn_is_submitted_before_the_backend_moves_on():
    seen = []

    def script(request):
        seen.append((request.request_id, len(request.images)))
        return turns(say(ASK, STOP), say(8, STOP))(request)

    run(None, group=3, backend=AnyOrder(script, "last"))
    assert seen == [(2, 1), (2, 2), (1, 1), (1, 2), (0, 1), (0, 2)]  # no barrier between first and second turns


def test_a_backend_that_loses_a_rollout_is_found_out():
    backend = AnyOrder(say(8, STOP))
    backend.completed = lambda: iter([say(8, STOP)(backend.pending[0])])
    with pytest.raises(RuntimeError, match="2 of 3 rollouts unfinished"):
        run(None, group=3, backend=backend)


def test_the_backend_is_put_to_rest_when_something_raises():
    backend = AnyOrder(lambda request: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(None, backend=backend)
    assert backend.log[-1] == "end"


class Stops(Looks):
    """55 may end a turn: after a 7 it does, and the picture goes into the turn; elsewhere the turn goes on."""

    stop_texts = ("55",)

    def goes_on(self, text):
        return not text.endswith("7 55")

    def step(self, reply, truncated=False):
        outcome = super().step(f"7 {reply}" if reply.endswith("7 55") else reply, truncated)
        return outcome if isinstance(outcome, Done) else replace(outcome, regions=(Region(0, (1, 2, 3, 4)),))


def test_a_turn_that_stops_at_a_text_goes_on_until_the_environment_says_it_is_over():
    """
    ::
        prompt  90 90 1 2 | turn 1 55 | same turn 7 55 | told 4 90 90 90 5 | turn 8 99
        loss                     1  1            1  1         0  0  0  0 0        1  1
    """
    requests = []
    samples = iter([say(1, 55), say(ASK, 55), say(8, STOP)])

    def script(request):
        requests.append(request)
        return next(samples)(request)

    runner = RolloutRunner(Stops, ScriptedBackend(script), FakeEncoder(), [STOP], Limits(turn=10, completion=12))
    (rollout,) = runner.run([{"id": "r1", "image": 2, "question": "1 2"}], 1, SamplingSettings(seed=3))
    assert rollout.completion_ids == [1, 55, 7, 55, 4, 90, 90, 90, 5, 8, 99]
    assert rollout.loss_mask == [1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1]
    assert rollout.logprobs == [-1, -55, -7, -55, 0, 0, 0, 0, 0, -8, -99]
    assert [(turn.text, turn.token_ids, turn.logprobs) for turn in rollout.turns] == [
        ("1 55 7 55", (1, 55, 7, 55), (-1, -55, -7, -55)),
        ("8", (8, 99), (-8, -99)),
    ]
    assert [request.max_new_tokens for request in requests] == [10, 8, 3]  # of the turn, then of the completion
    assert [request.stop for request in requests] == [("55",)] * 3
    assert requests[1].token_ids == (90, 90, 1, 2, 1, 55) and len({request.seed for request in requests}) == 3
    assert (rollout.status, rollout.regions) == (S.ANSWERED, [Region(0, (1, 2, 3, 4))])


def test_a_turn_that_would_go_on_without_room_is_truncated():
    for limits in (Limits(turn=2, completion=50), Limits(turn=9, completion=2), Limits(9, 50, sampled=2)):
        runner = RolloutRunner(Stops, ScriptedBackend(say(1, 55)), FakeEncoder(), [STOP], limits)
        (rollout,) = runner.run([{"id": "r1", "image": 2, "question": "1"}], 1, SamplingSettings())
        assert (rollout.status, rollout.completion_ids) == (S.TRUNCATED, [1, 55])
        assert not rollout.turns[0].finished and rollout.faults == [Fault.TRUNCATED]
