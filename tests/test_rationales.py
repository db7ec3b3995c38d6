"""Rationales with looks, written by a model behind an endpoint: what is kept, what the filters let through, and what
is then taught."""

from __future__ import annotations

import json

import pytest
from test_traces import _key, rejected, shown, write_rows  # noqa: F401 - _key is a fixture

from benchmarks.judge_server import JudgeServer, content, server_error
from data_prep import traces
from data_prep.rationales import LOGICAL, NAMEABLE
from data_prep.tracing import WriterOutage
from vt_trl.data import load_rows
from vt_trl.envs import make_environment
from vt_trl.errors import ConfigError
from vt_trl.sft import played

BOX = {"name": "zoom_image", "arguments": {"bbox_2d": [0, 0, 56, 56]}}
LOOK = f"<think>It is small.</think><tool_call>{json.dumps(BOX)}</tool_call>"


def closing(answer: int) -> str:
    return f"<think>Now I see it.</think><answer>{answer}</answer>"


def run(rows, out, script, *more: str):
    with JudgeServer(script) as server:
        words = ["--dataset", rows, "--out", out, "--model", "strong", "--environment", "zoom"]
        for name in ("--endpoint-args", "--filter-args"):
            words += [name, json.dumps({"base_url": server.base_url, "max_attempts": 1})]
        traces.run(traces.parser().parse_args([str(word) for word in [*words, "--filter-model", "critic", *more]]))
        return list(server.requests)


def role_of(request) -> str:
    first = request.body["messages"][0]["content"]
    return "named" if first == NAMEABLE else "logical" if first == LOGICAL else "writer"


def writer(request):
    number = shown(request)[0].getpixel((0, 0))[0]
    return content(LOOK if len(shown(request)) == 1 else closing(number))


def test_what_both_filters_let_through_is_a_trace_of_every_frame_and_shape(tmp_path):
    """Row 1 passes. Row 2's look shows nothing; of row 3 the text is not logical."""
    rows = write_rows(tmp_path / "rows", None, None, None)

    def script(request):
        if role_of(request) == "writer":
            return writer(request)
        if role_of(request) == "named":
            (crop,) = shown(request)
            assert crop.size == (56, 56)  # half of the picture is not enlarged
            return content("No." if crop.getpixel((0, 0))[0] == 2 else "Yes.")
        case = json.loads(request.body["messages"][1]["content"])
        assert case["steps"] == ["It is small.", "Now I see it."]
        return content("no" if case["question"] == "What is 3?" else "**Yes**")

    out = tmp_path / "out"
    requests = run(rows, out, script, "--attempts", "1")
    assert sorted(map(role_of, requests)) == ["logical"] * 2 + ["named"] * 3 + ["writer"] * 6
    (kept,) = load_rows(out)
    assert (kept["id"], kept["replies"]) == ("r1", [LOOK, closing(1)])
    assert (kept["segments"], kept["crops"]) == (["It is small.", "Now I see it."], [0, 0, 56, 56])
    assert {one["id"]: one["reason"] for one in rejected(out)} == {"r2": "crop_not_nameable", "r3": "text_not_logical"}
    for boxes in ("shown_pixels", "per_mille", "unit"):
        taught = played(kept, make_environment("zoom", {"boxes": boxes, "shape": "inline"}))
        assert [one.box for one in taught.regions] == [(0, 0, 56, 56)]


def test_filters_that_cannot_be_asked_stop_the_run(tmp_path):
    rows = write_rows(tmp_path / "rows", None)
    with pytest.raises(WriterOutage, match="1 of 1 requests to the filters failed"):
        run(rows, tmp_path / "out", lambda one: writer(one) if role_of(one) == "writer" else server_error())


def test_an_endpoint_cannot_write_boxes_inside_its_reasoning(tmp_path):
    rows = write_rows(tmp_path / "rows", None)
    with pytest.raises(ConfigError, match="shape: tool_call"):
        run(rows, tmp_path / "out", writer, "--environment-args", '{"shape": "inline"}')
