"""Reading replies: every way to get the layout wrong, and an oracle written another way for the two ways to get it
right."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vt_trl.envs.reply import Reply, ToolCall, parse_reply
from vt_trl.types import Fault as F

THINK = "<think>It is small.</think>"
CALL = '<tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'
GOOD = ToolCall("resize_image", {"action": "resize"})
PRETTY = json.dumps({"name": "resize_image", "arguments": {"action": "resize"}}, indent=4)


def called(content: str) -> str:
    return f"{THINK}<tool_call>{content}</tool_call>"


REPLIES = {
    # name: text, (answer, call, wants_call, faults)
    "clean answer": (f"{THINK}<answer>5</answer>", ("5", None, False, ())),
    "clean call": (THINK + CALL, (None, GOOD, True, ())),
    "space around": (f"\n {THINK}\n\n<answer>\n 5 \n</answer> \n", ("5", None, False, ())),
    "pretty JSON": (called(f"\n{PRETTY}\n"), (None, GOOD, True, ())),
    "braces in a string": (
        called('{"name": "}</x>{", "arguments": {}}'),
        (None, ToolCall("}</x>{", {}), True, ()),
    ),
    "wrong tool is read, the environment judges": (
        called('{"name": "crop", "arguments": {"x": [1]}}'),
        (None, ToolCall("crop", {"x": [1]}), True, ()),
    ),
    "no JSON": (called("resize_image()"), (None, None, True, (F.BAD_JSON,))),
    "empty call": (called(""), (None, None, True, (F.BAD_JSON,))),
    "two objects": (called("{}{}"), (None, None, True, (F.BAD_JSON,))),
    "single quotes": (called("{'name': 'resize_image'}"), (None, None, True, (F.BAD_JSON,))),
    "list": (called("[1]"), (None, None, True, (F.BAD_JSON,))),
    "null": (called("null"), (None, None, True, (F.BAD_JSON,))),
    "no arguments": (called('{"name": "resize_image"}'), (None, None, True, (F.BAD_JSON,))),
    "extra key": (called('{"name": "a", "arguments": {}, "id": 1}'), (None, None, True, (F.BAD_JSON,))),
    "name is a number": (called('{"name": 1, "arguments": {}}'), (None, None, True, (F.BAD_JSON,))),
    "arguments as text": (called('{"name": "a", "arguments": "{}"}'), (None, None, True, (F.BAD_JSON,))),
    "two calls": (THINK + CALL + CALL, (None, None, True, (F.SEVERAL_CALLS,))),
    "two answers": (
        f"{THINK}<answer>1</answer><answer>2</answer>",
        (None, None, False, (F.SEVERAL_ANSWERS,)),
    ),
    "call and answer": (f"{THINK}{CALL}<answer>5</answer>", (None, None, True, (F.CALL_AND_ANSWER,))),
    "answer and call": (f"{THINK}<answer>5</answer>{CALL}", (None, None, True, (F.CALL_AND_ANSWER,))),
    "call inside the answer": (f"{THINK}<answer>{CALL}</answer>", (None, None, True, (F.CALL_AND_ANSWER,))),
    "answer and a lone call tag": (
        f"{THINK}<answer>5</answer><tool_call>",
        (None, None, True, (F.BROKEN_TAGS, F.CALL_AND_ANSWER)),
    ),
    "empty think": ("<think> \n</think><answer>5</answer>", ("5", None, False, (F.EMPTY_THINK,))),
    "empty answer": (f"{THINK}<answer> \n</answer>", (None, None, False, (F.EMPTY_ANSWER,))),
    "missing think": ("<answer>5</answer>", ("5", None, False, (F.MISSING_THINK,))),
    "call without think": (CALL, (None, GOOD, True, (F.MISSING_THINK,))),
    "two thinks": (f"{THINK}{THINK}<answer>5</answer>", ("5", None, False, (F.DOUBLED_TAGS, F.STRAY_TEXT))),
    "doubled opening think": (
        "<think><think>a</think><answer>5</answer>",
        ("5", None, False, (F.DOUBLED_TAGS, F.STRAY_TEXT)),
    ),
    "doubled closing answer": (f"{THINK}<answer>5</answer></answer>", (None, None, False, (F.DOUBLED_TAGS,))),
    "doubled opening call": (f"{THINK}<tool_call>{CALL}", (None, None, True, (F.DOUBLED_TAGS,))),
    "nested answers": (
        f"{THINK}<answer><answer>5</answer></answer>",
        (None, None, False, (F.DOUBLED_TAGS,)),
    ),
    "unclosed answer": (f"{THINK}<answer>5", (None, None, False, (F.BROKEN_TAGS,))),
    "unopened answer": (f"{THINK}5</answer>", (None, None, False, (F.BROKEN_TAGS,))),
    "answer tags swapped": (f"{THINK}</answer>5<answer>", (None, None, False, (F.BROKEN_TAGS,))),
    "unclosed call": (f"{THINK}<tool_call>{PRETTY}", (None, None, True, (F.BROKEN_TAGS,))),
    "unclosed think": ("<think>a<answer>5</answer>", ("5", None, False, (F.BROKEN_TAGS, F.STRAY_TEXT))),
    "answer first": (f"<answer>5</answer>{THINK}", ("5", None, False, (F.BROKEN_TAGS,))),
    "answer inside think": ("<think>a<answer>5</answer></think>", ("5", None, False, (F.BROKEN_TAGS,))),
    "call inside think": (f"<think>a{CALL}</think>", (None, GOOD, True, (F.BROKEN_TAGS,))),
    "overlapping": ("<think>a<answer>5</think></answer>", ("5</think>", None, False, (F.BROKEN_TAGS,))),
    "text before": (f"So: {THINK}<answer>5</answer>", ("5", None, False, (F.STRAY_TEXT,))),
    "text between": (f"{THINK}so<answer>5</answer>", ("5", None, False, (F.STRAY_TEXT,))),
    "text after": (f"{THINK}{CALL}.", (None, GOOD, True, (F.STRAY_TEXT,))),
    "control token after": (f"{THINK}<answer>5</answer><|im_start|>", ("5", None, False, (F.STRAY_TEXT,))),
    "think only": (THINK, (None, None, False, (F.NO_MOVE,))),
    "prose": ("It is 5.", (None, None, False, (F.NO_MOVE, F.MISSING_THINK))),
    "nothing": ("", (None, None, False, (F.NO_MOVE, F.MISSING_THINK))),
    "capital tags are no tags": (
        f"{THINK}<Answer>5</Answer>",
        (None, None, False, (F.NO_MOVE, F.STRAY_TEXT)),
    ),
    "attribute makes no tag": (
        f'{THINK}<answer id="1">5</answer>',
        (None, None, False, (F.BROKEN_TAGS,)),
    ),
    "deep JSON": (called("[" * 100_000), (None, None, True, (F.BAD_JSON,))),
    "deep closed JSON": (
        called('{"name": "a", "arguments": ' + '{"a":' * 50_000 + "1" + "}" * 50_001),
        (None, None, True, (F.BAD_JSON,)),
    ),
    "huge integer": (
        called('{"name": "a", "arguments": {"a": ' + "9" * 10_000 + "}}"),
        (None, None, True, (F.BAD_JSON,)),
    ),
}
# Stray text next to one of these is a consequence, not a finding of its own.
UNREADABLE = {F.BROKEN_TAGS, F.DOUBLED_TAGS, F.SEVERAL_CALLS, F.SEVERAL_ANSWERS, F.CALL_AND_ANSWER}


@pytest.mark.parametrize(("text", "expected"), REPLIES.values(), ids=REPLIES)
def test_every_kind_of_reply(text, expected):
    reply = parse_reply(text)
    answer, call, wants_call, faults = expected
    assert (reply.answer, reply.call, reply.wants_call) == (answer, call, wants_call)
    ignored = {F.STRAY_TEXT} if UNREADABLE & set(faults) else set()
    assert set(reply.faults) - ignored == set(faults) - ignored
    assert len(reply.faults) == len(set(reply.faults))


TAGS = [f"<{slash}{tag}>" for tag in ("think", "answer", "tool_call") for slash in ("", "/")]
PIECES = [*TAGS, *TAGS, " ", "\n", "5", "a", "<", ">", "{", '"', CALL, THINK, "<answer>5</answer>", "<think></think>"]
FRAGMENTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
NEARLY = st.builds(
    lambda think, move, at, piece: (
        (t := f"<think>{think}</think>{move}")[: at % (len(t) + 1)] + piece + t[at % (len(t) + 1) :]
    ),
    st.sampled_from(["", " ", "a", "a<", "\xa0"]),
    st.sampled_from([CALL, "<answer>5</answer>", "<answer> </answer>", "<answer>a b</answer>", called("{}")]),
    st.integers(0, 500),
    st.sampled_from(["", "", " ", "\n", "x", *TAGS]),
)


def clean_layout(text: str) -> bool:
    """The two clean layouts by one regular expression, where parse_reply searches tags one by one."""
    body = r"((?:(?!</?(?:think|answer|tool_call)>).)*)"
    found = re.fullmatch(rf"\s*<think>{body}</think>\s*<(answer|tool_call)>{body}</\2>\s*", text, re.DOTALL)
    if not found or not found[1].strip() or not found[3].strip():
        return False
    if found[2] == "answer":
        return True
    try:
        call = json.loads(found[3])
    except ValueError:
        return False
    shape = isinstance(call, dict) and {name: type(value) for name, value in call.items()}
    return shape == {"name": str, "arguments": dict}


def check(text: str) -> Reply:
    reply = parse_reply(text)
    assert reply.answer is None or reply.call is None
    assert reply.answer is None or reply.answer == reply.answer.strip() != ""
    assert reply.wants_call or reply.call is None
    assert (not reply.faults) == clean_layout(text)
    assert reply.faults or (reply.answer is None) != (reply.call is None)
    return reply


@given(st.text() | FRAGMENTS | NEARLY)
def test_no_fault_exactly_for_the_two_clean_layouts(text):
    check(text)


@given(st.text(alphabet=st.characters(exclude_characters="<>"), min_size=1).filter(str.strip))
def test_any_text_can_be_thought_and_answered(text):
    reply = check(f"<think>{text}</think><answer>{text}</answer>")
    assert reply.answer == text.strip()


@given(st.dictionaries(st.text("abc"), st.none() | st.integers(-9, 9) | st.lists(st.booleans())), st.integers(0, 9))
def test_a_call_is_read_however_its_json_is_printed(arguments, indent):
    text = json.dumps({"arguments": arguments, "name": "any"}, indent=indent or None)
    assert check(called(text)).call == ToolCall("any", arguments)


@pytest.mark.parametrize(
    "unit", ["<think>", "</answer>", "<tool_call>", "<answer></answer>", "<think", "<", "{", "<think><answer>", " "]
)
def test_a_megabyte_of_tags_is_no_work(unit):
    # A quadratic search (a pattern that backtracks, a find per tag) would take minutes here.
    text = unit * (1_000_000 // len(unit))
    for framed in (text, f"<think>{text}</think><answer>{text}</answer>", called(text)):
        assert parse_reply(framed).faults or unit in ("<think", "<", "{")
