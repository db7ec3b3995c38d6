"""Boxes on pictures: where a policy looked, in the record, in the table, and in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from test_env_zoom import ANSWER, EIGHT, SEVEN, call, inline
from test_view import CHROMIUM, browser

from vt_trl import cli
from vt_trl.boxes import Sight
from vt_trl.dialogue import Dialogue
from vt_trl.envs import LookEnv, ResizeEnv, ZoomEnv
from vt_trl.envs.resize import DirectEnv
from vt_trl.transcripts import Part, Transcript, read_transcripts, write_transcripts
from vt_trl.transcripts.looks import looks_of
from vt_trl.transcripts.show import render_transcript
from vt_trl.types import Rollout

WIDE, HIGH = Image.new("RGB", (560, 280), "white"), Image.new("RGB", (280, 560), "white")
ROW = {"id": "r", "image": WIDE, "question": "What?", "answer": ["5"]}
TWO = {**ROW, "images": [WIDE, HIGH]}
RESIZE = '<think>a</think><tool_call>{"name": "resize_image", "arguments": {"scale": "full", "image": 2}}</tool_call>'
PER_MILLE = [500, 250, 750, 500]  # 280..420 x 70..140 of 560 x 280


def played(environment, row, *replies: str) -> Rollout:
    dialogue = Dialogue(environment, row)
    for reply in replies:
        dialogue.say(reply)
    return dialogue.rollout()


def pictures(rollout: Rollout) -> list:
    return [one for turn in Transcript.of(rollout).turns for one in turn.pictures]


@pytest.mark.parametrize(
    ("sight", "box"),
    [(SEVEN, [280, 70, 420, 140]), (EIGHT, PER_MILLE), (Sight("unit"), [0.5, 0.25, 0.75, 0.5])],
)
@pytest.mark.parametrize("shape", ["tool_call", "inline"])
def test_a_look_is_drawn_in_any_frame_and_shape(sight, box, shape):
    """A box that is refused is drawn nowhere."""
    bad = [value * 9 for value in box]
    said = [call(bad), call(box), ANSWER]
    if shape == "inline":
        said = [inline(bad), inline(box, ""), "</think><answer>5</answer>"]
    shown, part = pictures(played(ZoomEnv(sight=sight, shape=shape), ROW, *said))
    assert shown.parts == (Part(1, 0.5, 0.25, 0.75, 0.5),) and shown.look is None
    assert part.parts == () and part.look == 1


def test_parts_are_drawn_on_the_picture_and_on_the_part_that_they_were_taken_from():
    """Look 1: the right half of picture 2; then all of it, no part; look 2: the top of look 1; look 3: picture 1."""
    half = [70, 0, 140, 280]  # of 140 x 280, half of picture 2's sides
    rollout = Dialogue(LookEnv(), TWO)
    rollout.say(call(half, image=2))
    width, height = rollout.images[2].size
    rollout.say(RESIZE)
    for reply in (call([0, 0, width, height / 4], image=3), call([0, 0, 140, 140], image=1), ANSWER):
        rollout.say(reply)
    first, second, crop, whole, top, third = pictures(rollout.rollout())
    assert [one.look for one in (first, second, crop, whole, top, third)] == [None, None, 1, None, 2, 3]
    assert first.parts == (Part(3, 0, 0, 0.5, 1),)
    assert second.parts == (Part(1, 0.5, 0, 1, 1), Part(2, 0.5, 0, 1, 0.25))
    assert crop.parts == (Part(2, 0, 0, 1, 0.25),)
    assert whole.parts == top.parts == third.parts == ()


def test_nothing_is_drawn_where_pictures_cannot_be_told_apart():
    """A full picture is no part; an opening with another picture in front does not say which one was meant."""
    full = RESIZE.replace('"scale": "full", "image": 2', '"action": "resize"')
    plain = played(ResizeEnv(min_pixels=3136), ROW, full, ANSWER)
    assert len(plain.images) == 2
    assert looks_of(plain) == looks_of(played(DirectEnv(), ROW, ANSWER)) == ({}, {})

    class Twice(ZoomEnv):
        def reset(self, row):
            shown = super().reset(row)
            return self.show(*shown.messages[:1], *shown.messages[1:], *shown.messages[1:])

    doubled = played(Twice(), ROW, call([280, 70, 420, 140]), ANSWER)
    assert looks_of(doubled) == ({2: 1}, {})


@pytest.fixture
def table(tmp_path) -> Path:
    """Two rollouts: zoom on one picture, look on two."""
    zoom = played(ZoomEnv(sight=EIGHT), ROW, call(PER_MILLE), ANSWER)
    look = played(LookEnv(), TWO, call([70, 140, 140, 280], image=2), ANSWER)
    found = [Transcript.of(one, group=name) for name, one in (("zoom", zoom), ("look", look))]
    return write_transcripts(tmp_path / "completions" / "completions_00001.parquet", found)


def test_boxes_are_kept_in_the_table(table):
    zoom, look = read_transcripts(table)
    assert zoom.turns[1].pictures[0].parts == (Part(1, 0.5, 0.25, 0.75, 0.5),)
    assert look.turns[1].pictures[1].parts == (Part(1, 0.5, 0.5, 1, 1),) and look.looks == zoom.looks == 1
    page = render_transcript(look)
    assert '<rect x="50%" y="50%" width="50%" height="50%"/>' in page and page.count("<rect") == 1
    assert "looked at 1 part<" in page and "Part 1: " in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1200, 420])
def test_a_browser_draws_the_box_at_its_place(table, tmp_path, width):
    """Measured against the picture as displayed, in pages of two widths, so that narrow ones shrink it."""
    page = tmp_path / "run.html"
    assert cli.main(["view", str(table), "--export", str(page)]) == 0
    probe = """<script>addEventListener("load", () => {
      document.title = JSON.stringify([...document.querySelectorAll("rect")].map(one => {
        const box = one.getBBox(), svg = one.ownerSVGElement.getBoundingClientRect();
        const image = one.closest("figure").querySelector("img").getBoundingClientRect();
        return {left: (svg.left + box.x - image.left) / image.width, top: (svg.top + box.y - image.top) / image.height,
                width: box.width / image.width, height: box.height / image.height, natural: image.width};
      }));
    })</script>"""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text()).replace(
        ' loading="lazy"', ""
    )
    (tmp_path / "probe.html").write_text(text.replace("</body>", f"{probe}</body>"))
    dom = browser(f"file://{tmp_path}/probe.html", "--dump-dom", f"--window-size={width},900")
    seen = json.loads(re.search("<title>(.*?)</title>", dom)[1])
    places = [[one[name] for name in ("left", "top", "width", "height")] for one in seen]
    assert places == [pytest.approx([0.5, 0.25, 0.25, 0.25], abs=0.01), pytest.approx([0.5] * 4, abs=0.01)]
    assert (seen[0]["natural"] < 450) == (width == 420)
