"""Reading a reply: which move it makes and what is wrong with its form. Works on any text and never raises.

The layout (VisionThink, Section 3.3 and Appendix): ``<think>…</think>`` and then either ``<answer>…</answer>`` or
``<tool_call>{"name": …, "arguments": {…}}</tool_call>``. Tags are found by plain search, not by pattern, so that JSON
may be printed in any way and no text can make the search slow.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from vt_trl.types import Fault

THINK, ANSWER, TOOL_CALL = "think", "answer", "tool_call"


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """A parsed reply: at most one of ``answer`` and ``call`` is set. ``wants_call``: it tried, well or badly."""

    answer: str | None
    call: ToolCall | None
    wants_call: bool
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class _Block:
    start: int  # of the opening tag
    end: int  # after the closing tag
    content: str


def _block(text: str, tag: str, faults: list[Fault], several: Fault) -> tuple[_Block | None, bool]:
    """The only block of a tag, or None with the fault noted; and whether the tag occurs at all."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    opened, closed = text.count(opening), text.count(closing)
    if opened == closed == 0:
        return None, False
    start, end = text.find(opening), text.find(closing)
    if opened == closed == 1 and start < end:
        return _Block(start, end + len(closing), text[start + len(opening) : end]), True
    if opened > 1 and closed > 1 and text.find(opening, end) >= 0:
        faults.append(several)
    elif max(opened, closed) > 1:
        faults.append(Fault.DOUBLED_TAGS)
    else:
        faults.append(Fault.BROKEN_TAGS)
    return None, True


def _read_call(content: str, faults: list[Fault]) -> ToolCall | None:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        data = None
    if (
        not isinstance(data, dict)
        or set(data) != {"name", "arguments"}
        or not isinstance(data["name"], str)
        or not isinstance(data["arguments"], dict)
    ):
        faults.append(Fault.BAD_JSON)
        return None
    return ToolCall(data["name"], data["arguments"])


def _layout_faults(text: str, think: _Block | None, thinks: bool, move: _Block | None) -> list[Fault]:
    """Faults of think block, order and surroundings, given the move's block."""
    faults = []
    if not thinks:
        faults.append(Fault.MISSING_THINK)
    elif think and not think.content.strip():
        faults.append(Fault.EMPTY_THINK)
    blocks = sorted((block for block in (think, move) if block), key=lambda block: block.start)
    if think and move and (blocks[0] is not think or think.end > move.start):
        faults.append(Fault.BROKEN_TAGS)
    elif blocks:
        edges = [0, *(edge for block in blocks for edge in (block.start, block.end)), len(text)]
        if any(text[left:right].strip() for left, right in zip(edges[::2], edges[1::2], strict=True)):
            faults.append(Fault.STRAY_TEXT)
    return faults


def parse_reply(text: str) -> Reply:
    """Parse any text. A reply with several answers or with answer and call together makes no move."""
    faults: list[Fault] = []
    think, thinks = _block(text, THINK, faults, several=Fault.DOUBLED_TAGS)
    answer, answers = _block(text, ANSWER, faults, several=Fault.SEVERAL_ANSWERS)
    call, calls = _block(text, TOOL_CALL, faults, several=Fault.SEVERAL_CALLS)
    tool_call, answer_text, move = None, None, None
    if answers and calls:
        faults.append(Fault.CALL_AND_ANSWER)
    elif call:
        tool_call, move = _read_call(call.content, faults), call
    elif answer:
        answer_text, move = answer.content.strip() or None, answer
        if answer_text is None:
            faults.append(Fault.EMPTY_ANSWER)
    elif not (answers or calls):
        faults.append(Fault.NO_MOVE)
    faults += _layout_faults(text, think, thinks, move)
    return Reply(answer_text, tool_call, calls, tuple(dict.fromkeys(faults)))
