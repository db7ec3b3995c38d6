"""The other shape of a dialogue: boxes inside the reasoning, pictures put in right behind them (VLM-R3).

One assistant turn goes ``<think>… {"bbox_2d": [x1, y1, x2, y2]} PICTURE … </think><answer>…</answer>``. Sampling stops
at a box's end, the tokens stay as they are, the picture follows, and sampling goes on in the same turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from vt_trl.envs.reply import ANSWER, THINK, Reply, ToolCall, parse_reply
from vt_trl.envs.tools import BOX_KEY, ZoomTool
from vt_trl.types import Fault

STOP = "}"  # every end of a box, and of a formula's group now and then: goes_on() tells them apart


def boxes_in(text: str) -> list[str]:
    """Every ``{…"bbox_2d"…}`` of a text without braces inside. One pass, whatever the text."""
    found, start = [], 0
    while (end := text.find("}", start)) >= 0:
        begin = text.rfind("{", start, end)
        if begin >= 0 and f'"{BOX_KEY}"' in text[begin:end]:
            found.append(text[begin : end + 1])
        start = end + 1
    return found


def without_boxes(text: str) -> str:
    """The text with every box taken out."""
    for box in boxes_in(text):
        text = text.replace(box, "", 1)
    return text


def parse_segment(said: Sequence[str], text: str, tool: str = ZoomTool.name) -> Reply:
    """What a segment says after the segments ``said`` before it: a box to look at, or the end of the reply.

    A segment without a box ends the reply, and the layout of all segments together is judged as one reply.
    """
    whole = "".join((*said, text))
    boxes = boxes_in(text)
    if not boxes:
        reply = parse_reply(whole)
        faults = (*reply.faults, Fault.WRONG_TOOL) if reply.wants_call else reply.faults
        return Reply(reply.answer, None, reply.wants_call, faults)
    faults: list[Fault] = []
    call = None
    if len(boxes) > 1:
        faults.append(Fault.SEVERAL_BOXES)
    elif f"<{ANSWER}>" in text:
        faults.append(Fault.CALL_AND_ANSWER)
    else:
        call = _read_box(tool, boxes[0], faults)
    opened, closed = whole.count(f"<{THINK}>"), whole.count(f"</{THINK}>")
    if opened == 0:
        faults.append(Fault.MISSING_THINK)
    elif whole[: whole.find(f"<{THINK}>")].strip():
        faults.append(Fault.STRAY_TEXT)
    if opened > 1:
        faults.append(Fault.DOUBLED_TAGS)
    if closed:  # a box behind the reasoning
        faults.append(Fault.BROKEN_TAGS)
    return Reply(None, call, True, tuple(faults))


def _read_box(tool: str, text: str, faults: list[Fault]) -> ToolCall | None:
    try:
        return ToolCall(tool, json.loads(text))
    except (ValueError, RecursionError):
        faults.append(Fault.BAD_JSON)
        return None
