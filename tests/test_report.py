"""The report is one safe, self-contained file whose numbers and pictures are those it was given."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import picture
from PIL import Image

from vt_trl.envs.base import system, user
from vt_trl.metrics import RolloutRecord
from vt_trl.report import Episode, choose_episodes, plot_request_rates, write_report
from vt_trl.transcripts.record import tokens_per_image
from vt_trl.types import Fault, ImagePart, Message, Rollout, RolloutStatus, TextPart, Turn

PAD = 7  # the image placeholder in the hand-drawn ids
ATTACK = "<script>alert(1)</script>"
QUESTION = 'Which <b>letter</b>? <img src="https://evil.example/x.png" onerror=alert(2)>'
FACTS = {
    "before": {
        "accuracy": 0.111,
        "accuracy_easy": 0.122,
        "accuracy_hard": 0.133,
        "request_rate_easy": 0.144,
        "request_rate_hard": 0.155,
        "visual_tokens_mean": 1.66,
    },
    "after": {
        "accuracy": 0.911,
        "accuracy_easy": 0.922,
        "accuracy_hard": 0.933,
        "request_rate_easy": 0.044,
        "request_rate_hard": 0.955,
        "visual_tokens_mean": 3.36,
    },
    "always_full_accuracy": 0.977,
    "always_low_accuracy": 0.566,
    "control": {"hard_low_accuracy": 0.127, "hard_full_accuracy": 0.961, "chance": 0.125},
    "visual_tokens_always_full": 4.25,
    "hard_share": 0.5,
    "grpo_steps": 123,
    "wall_seconds": 754.2,
    "machine": "two cores & <nothing> more",
    "versions": {"torch": "9.8.7", "trl": "1.16.0"},
}
HISTORY = [
    {"step": step, "reward": 0.5 + step / 100, "request_rate": 0.5, "request_rate/easy": 0.4, "request_rate/hard": 0.6}
    for step in range(1, 41)
] + [{"step": 40, "train_runtime": 3.0, "accuracy": math.nan}]


def make_pair(
    index: int,
    asked: bool = False,
    correct: bool | None = True,
    source: str = "easy",
    status: RolloutStatus = RolloutStatus.ANSWERED,
    advantage: float = 0.0,
    group: str = "",
    answer: str = "A",
    faults: tuple[Fault, ...] = (),
) -> tuple[Rollout, RolloutRecord]:
    """An episode without a model: low picture 28 x 28 px (1 token), full picture 56 x 56 px (4 tokens)."""
    low, full = picture(index, (28, 28)), picture(index, (56, 56))
    prompt = [system("Be brief."), user(low, "\n", QUESTION)]
    told = [Message("assistant", (TextPart("a call"),)), user("Here:", full)] if asked else []
    said = [Message("assistant", (TextPart(f"<answer>{answer}</answer>"),))]
    turns = [Turn(one.text, (1, 2), (0.0, 0.0), True, faults) for one in told[:1] + said]
    rollout = Rollout(
        row={"id": f"row-{index}", "question": QUESTION, "answer": ["A", ATTACK], "data_source": source},
        prompt_ids=[1, 5, PAD, 6],
        completion_ids=[2, 3, *([5, PAD, PAD, PAD, PAD, 6, 2] if asked else [])],
        loss_mask=[1, 1, *([0] * 5 + [1, 1] if asked else [])],
        logprobs=[0.0] * (9 if asked else 2),
        images=[low, full] if asked else [low],
        messages=prompt + told + said,
        prompt_messages=2,
        turns=turns,
        status=status,
        answer=answer,
        asked=asked,
        attempted=asked,
        visual_tokens=5 if asked else 1,
    )
    numbers = {"reward": 1.4, "penalty": 0.1, "advantage": advantage, "parts": {"accuracy": 1.0, "format": math.nan}}
    return rollout, RolloutRecord.of(rollout, group or f"0/{index}", correct, **numbers)


@pytest.fixture
def report(tmp_path: Path) -> str:
    pairs = [make_pair(index, asked=index % 2 == 0, advantage=0.25, faults=(Fault.STRAY_TEXT,)) for index in range(5)]
    pairs.append(make_pair(5, correct=None, source="hard", answer=ATTACK, status=RolloutStatus.NO_ANSWER))
    pairs.append(Episode(*make_pair(6, correct=False), label="after training"))
    path = write_report(tmp_path / "new" / "report.html", title=ATTACK, facts=FACTS, history=HISTORY, episodes=pairs)
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags with attributes, as a browser would see them, and the text in between."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def pngs(self) -> list[tuple[Image.Image, dict]]:
        found = [attributes for tag, attributes in self.tags if attributes.get("src", "").startswith("data:image/png")]
        return [(Image.open(io.BytesIO(base64.b64decode(one["src"].partition(",")[2]))), one) for one in found]


def test_untrusted_text_is_printed_and_never_becomes_markup(report: str) -> None:
    page = Page(report)
    assert {"script", "b", "iframe", "link"}.isdisjoint(tag for tag, _ in page.tags)
    assert ATTACK not in report
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in report
    text = "".join(page.text)
    assert f"<answer>{ATTACK}</answer>" in text and QUESTION in text and FACTS["machine"] in text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_nothing_is_loaded_from_elsewhere(report: str) -> None:
    page = Page(report)
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not any({"href", "srcset", "data", "style"} & set(attributes) for _, attributes in page.tags)
    style = re.search(r"<style>(.*?)</style>", report, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_pictures_are_pngs_of_the_size_shown_and_say_so(report: str) -> None:
    assert report.count("<article>") == 7
    pngs = Page(report).pngs()
    low, full = (28, 28), (56, 56)
    assert [image.size for image, _ in pngs] == [low, full, low, low, full, low, low, full, low, low]
    assert pngs[1][0].tobytes() == picture(0, full).tobytes()
    assert (pngs[0][1]["width"], pngs[1][1]["width"]) == ("112", "224")  # one factor per episode: 4
    assert all(attributes["class"] == "pixelated" for _, attributes in pngs)
    assert "28 × 28 px, 1 visual token<" in report and "56 × 56 px, 4 visual tokens<" in report


def test_episodes_are_told_whole(report: str) -> None:
    text = " ".join("".join(Page(report).text).split())
    for said in ("stray_text", "no_answer", "not judged", "saw the full picture", "did not ask", "after training"):
        assert said in text, said
    assert "1.400 (penalty 0.100, accuracy 1.000, format –)" in text
    assert "+0.250, group 0/0" in text
    assert f"A or {ATTACK}" in text
    assert text.count("Tool reply") == 3 and text.count("Be brief.") == 7


def test_numbers_come_from_the_facts(report: str) -> None:
    cells = [re.sub("<.*?>", "|", row) for row in re.findall(r"<tr>(.*?)</tr>", report)]
    rows = {row.strip("|").split("||")[0]: row.strip("|").split("||")[1:] for row in cells}
    assert rows["Accuracy"] == ["11.1 %", "91.1 %", "56.6 %", "97.7 %"]
    assert rows["Accuracy on hard questions"] == ["13.3 %", "93.3 %", "–", "–"]
    assert rows["Requests on easy questions"] == ["14.4 %", "4.4 %", "–", "–"]
    assert rows["Visual tokens per question"] == ["1.7", "3.4", "–", "4.2"]
    control, run = ("12.7 %", "96.1 %", "12.5 %"), ("wall time</dt><dd>12 min 34 s", "torch 9.8.7, trl 1.16.0")
    for said in (*control, *run, "<dt>grpo steps</dt><dd>123"):
        assert said in report, said


def test_curves_are_split_by_source_and_a_missing_one_is_left_out(report: str) -> None:
    plots = [a for tag, a in Page(report).tags if a.get("src", "").startswith("data:image/svg+xml;base64,")]
    assert len(plots) == 2  # accuracy was never a number
    assert "all from 0.50 to 0.50; easy from 0.40 to 0.40; hard from 0.60 to 0.60" in plots[1]["alt"]
    assert b"<svg" in base64.b64decode(plots[0]["src"].partition(",")[2])


def test_report_is_the_same_file_each_time_and_needs_no_facts(tmp_path: Path) -> None:
    rollout, record = make_pair(0, answer=json.loads('"\\ud800"'))
    given = {"title": "t", "facts": {}, "history": HISTORY, "episodes": [(rollout, record)]}
    first, second = (write_report(tmp_path / name, **given).read_bytes() for name in ("a.html", "b.html"))
    assert first == second
    assert b"<td>Accuracy</td><td>\xe2\x80\x93</td>" in first


def test_choose_episodes_is_varied_and_deterministic() -> None:
    dull = [make_pair(index) for index in range(20)]
    others = [
        make_pair(20, asked=True, source="hard"),
        make_pair(21, asked=True, source="hard", correct=False, advantage=-1.0, group="live"),
        make_pair(22, correct=None, status=RolloutStatus.TRUNCATED),
        make_pair(23, group="live", source="hard"),
    ]
    chosen = choose_episodes(dull + others, count=6)
    ids = [episode.record.id for episode in chosen]
    assert set(ids[:2]) == {"row-21", "row-23"}, "the group with advantages goes first"
    assert {"row-20", "row-22"} <= set(ids) and len(ids) == len(set(ids)) == 6
    assert ids == [episode.record.id for episode in choose_episodes(dull + others, count=6)]
    assert len(choose_episodes(dull[:3], count=8)) == 3 and choose_episodes([]) == []


def test_choose_episodes_prefers_the_live_one_of_a_kind() -> None:
    pairs = [make_pair(0), make_pair(1, advantage=0.5), make_pair(2)]
    assert [episode.record.id for episode in choose_episodes(pairs)] == ["row-1", "row-0", "row-2"]


def test_tokens_of_a_picture_are_read_off_the_ids_or_shared_out_by_area() -> None:
    rollout, _ = make_pair(0, asked=True)
    rollout.images = rollout.images[::-1]  # areas are 4 : 1 now, but the ids say 1 and 4
    assert tokens_per_image(rollout) == [1, 4]
    rollout.prompt_ids = rollout.completion_ids = []
    assert tokens_per_image(rollout) == [4, 1]
    rollout.images, rollout.visual_tokens = [], 0
    assert tokens_per_image(rollout) == []


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_request_rates_of_an_ablation_are_drawn(tmp_path: Path, suffix: str) -> None:
    seed = {"steps": [1, 2, 3], "request_rate_easy": [0.5, None, 0.1], "request_rate_hard": [0.5, 0.7, math.nan]}
    results = {"paper": [seed | {"accuracy": [0.1, 0.2, 0.9]}, seed], "always $": [seed], "none": []}
    path = plot_request_rates(results, tmp_path / "sub" / f"rates.{suffix}")
    if suffix == "png":
        assert Image.open(path).width > 1000
    else:
        assert path.read_bytes() == plot_request_rates(results, tmp_path / "again.svg").read_bytes()


def test_request_rates_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        plot_request_rates({"paper": []}, tmp_path / "rates.pdf")
    with pytest.raises(ValueError, match="at least one"):
        plot_request_rates({}, tmp_path / "rates.png")


def test_message_with_a_foreign_role_is_named(tmp_path: Path) -> None:
    rollout, record = make_pair(0)
    rollout.messages.insert(2, Message("tool", (TextPart("hello"), ImagePart(rollout.images[0]))))
    html = write_report(tmp_path / "r.html", title="t", facts={}, history=[], episodes=[(rollout, record)]).read_text()
    assert "<h4>tool</h4>" in html and "visual tokens unknown" in html
