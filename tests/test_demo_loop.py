"""The self-improvement demo: task and reasoner by hand, every stage at a size that teaches nothing, and its page."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from demos.loop import __main__ as demo
from demos.loop import report
from demos.loop.reasoner import continued, reason
from demos.loop.task import MODULUS, draw, make_rows, running_sums

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("digits", "steps"), [("3", "3"), ("34", "3+4=2"), ("3412", "3+4=2+1=3+2=0")])
def test_running_sums(digits, steps):
    assert running_sums(digits) == steps


def test_rows_have_the_sum_modulo_5_and_lengths_in_equal_numbers():
    rows = make_rows(40, (3, 4), seed=1)
    assert [row["answer"] for row in rows] == [str(sum(map(int, row["digits"])) % MODULUS) for row in rows]
    assert sorted(row["data_source"] for row in rows) == ["3 digits"] * 20 + ["4 digits"] * 20
    again = make_rows(40, (3, 4), seed=1)
    assert [np.asarray(row["image"]).tobytes() for row in rows] == [np.asarray(r["image"]).tobytes() for r in again]


def test_digits_stand_in_reading_order():
    """The third digit of three is drawn below the first; the fourth square is empty."""
    pictures = [np.asarray(draw("144", np.random.default_rng(seed)).convert("L"), float) for seed in range(60)]
    mean = np.mean([one - one[28:, 28:].mean() for one in pictures], axis=0)
    ink = {(y, x): -mean[28 * y : 28 * y + 28, 28 * x : 28 * x + 28].mean() for y in (0, 1) for x in (0, 1)}
    assert ink[0, 1] > ink[0, 0] > 2 and ink[1, 0] > 2 and abs(ink[1, 1]) < 0.5


def test_a_slip_is_carried_on():
    assert continued("3+4=1+1=3+2=0") == "3+4=1+1=2+2=4"


def test_reasoner_is_mostly_right_and_doubts_itself():
    replies = [reason("3 4 1", random.Random(seed)) for seed in range(400)]
    right = sum("<answer>3</answer>" in reply for reply in replies) / 400
    assert 0.8 < right < 0.9
    assert 0.4 < sum("\nWait, " in reply for reply in replies) / 400 < 0.6
    assert "<answer>" not in reason("no digits here", random.Random(0))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two rounds with a handful of rows and two steps of everything."""
    out = tmp_path_factory.mktemp("loop") / "not" / "there"
    arguments = ["--seeds", "0", "--rounds", "2", "--small", "0.01", "--jobs", "1"]
    arguments += ["--out", str(out)]
    return out, arguments, demo.main(arguments)


def test_every_arm_gets_the_same_rows_and_as_many_sequences(results):
    out, _, found = results
    (seed,) = json.loads((out / "loop.json").read_text(encoding="utf-8"))["seeds"]
    assert seed == json.loads(json.dumps(found["seeds"][0]))
    assert len(seed["rounds"]) == 2 and {"base", *report.CONTROLS} <= set(seed)
    loop = seed["sequences"]["loop"]
    parts = [
        stage["sequences"] for name, stage in seed["stages"].items() if name.startswith("r") and "sequences" in stage
    ]
    controls = {"rl-only-medium", "rl-only-hard"}
    rewarded = sum(seed["stages"][name]["sequences"] for name in controls)
    assert sum(parts) - rewarded == loop and seed["sequences"]["rl_only"] == rewarded
    assert loop <= rewarded < loop + 64
    assert all(abs(seed["sequences"][name] - loop) < 32 for name in ("sft_only", "sft_seed_only"))
    assert seed["stages"]["sft-seed-only"]["traces"] == seed["stages"]["r1-traces"]["kept"]
    assert seed["stages"]["sft-only-traces"]["rows"] == seed["rows"]


@pytest.mark.parametrize(("accuracy", "said"), [(0.0, "yes, in 1 of 1 seeds"), (1.0, "no, in 0 of 1 seeds")])
def test_the_page_says_what_was_reached_and_what_was_not(results, tmp_path, accuracy, said):
    (seed,) = results[2]["seeds"]
    found = {**results[2], "seeds": [seed | {"rounds": [0.5, 0.5], "sft_only": accuracy}]}
    page = report.write_page(found, tmp_path / "loop.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml") == 1
    assert f"<dt>better than SFT alone</dt><dd>{said}</dd>" in page


def test_what_was_finished_is_not_run_again(results, monkeypatch):
    out, arguments, found = results
    monkeypatch.setattr("vt_trl.run.train", None)
    monkeypatch.setattr("vt_trl.sft.sft", None)
    assert demo.main(arguments)["seeds"][0]["rounds"] == found["seeds"][0]["rounds"]


def test_a_run_of_other_sizes_is_not_gone_on_with(results):
    _, arguments, _ = results
    with pytest.raises(SystemExit, match="other sizes"):
        demo.main([*arguments, "--rounds", "3"])


def test_verdict_needs_every_seed():
    good = {"base": 0.1, "rounds": [0.2, 0.3], "rl_only": 0.25, "sft_only": 0.2, "sft_seed_only": 0.1}
    assert all(report.verdict([good]).values())
    worse = {**good, "rl_only": 0.3}
    assert ("better than GRPO alone", "in 1 of 2 seeds", False) in report.claims([good, worse])
    assert report.verdict([good, worse]) == {
        "accuracy rises over two rounds": True,
        "better than GRPO alone": False,
        "better than SFT alone": True,
        "better than SFT on the seed traces": True,
    }


@pytest.mark.skipif(not report.LOOP.exists(), reason="no figures of `make demo-loop` are committed")
def test_the_pages_table_is_the_committed_one():
    path = ROOT / "docs" / "loop_demo.md"
    text = path.read_text(encoding="utf-8")
    current = report.with_table(text, json.loads(report.LOOP.read_text(encoding="utf-8")))
    assert text == current, f"run `python -m demos.loop.report --write {path.name}`"
