"""Which kind a row is and which rows are chosen, work that is kept, and draws that depend on the row alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.kinds import Kind, Rule, choose, shards_of, shares_by_source
from data_prep.work import Work
from vt_trl.errors import ConfigError
from vt_trl.generation.hf import _DrawByRow
from vt_trl.rollout import turn_seed

K = Kind


@pytest.mark.parametrize(
    ("low", "full", "kind"),
    [
        (8, 8, K.LOW_IS_ENOUGH),
        (7, 8, K.NEITHER),
        (8, 7, K.NEITHER),
        (2, 8, K.NEEDS_FULL),
        (3, 8, K.NEITHER),
        (0, 6, K.NEEDS_FULL),
        (0, 5, K.NEITHER),
        (8, 0, K.NEITHER),  # low ahead says nothing of the kind
        (0, 0, K.NEITHER),
    ],
)
def test_the_papers_rule(low, full, kind):
    assert Rule().kind(low, full) is kind


@pytest.mark.parametrize(("rollouts", "margin"), [(8, 9), (8, 0), (0, 1)])
def test_rules_that_no_row_could_meet(rollouts, margin):
    with pytest.raises(ConfigError, match="margin|rollouts"):
        Rule(rollouts, margin)


def numbered(*kinds: Kind) -> list[tuple[int, Kind]]:
    return list(enumerate(kinds))


def test_the_share_is_kept_when_one_kind_is_short():
    """3 rows need full and 10 do not: 6 in halves, 3 of each; at a share of 1/4 all 13."""
    rows = numbered(*[K.NEEDS_FULL] * 3, *[K.LOW_IS_ENOUGH] * 10, K.NEITHER, K.JUDGE_FAILED, K.BAD_ROW)
    half = choose(rows, 8, 0.5, seed=0)
    assert half.needs_full == (0, 1, 2) and len(half.low_is_enough) == 3 and half.wanted == 8
    quarter = choose(rows, None, 0.25, seed=0)
    assert (len(quarter.needs_full), len(quarter.low_is_enough)) == (3, 10)  # 3.25 of 13 rows
    assert choose(rows, None, 1.0, seed=0).low_is_enough == ()
    assert half.available == {
        "needs_full": 3,
        "low_is_enough": 10,
        "neither": 1,
        "judge_failed": 1,
        "bad_row": 1,
    }


@given(st.lists(st.sampled_from(list(Kind)), max_size=40), st.integers(1, 40), st.floats(0, 1), st.randoms())
def test_a_choice_holds_what_it_promises(kinds, size, share, random):
    rows = numbered(*kinds)
    choice = choose(rows, size, share, seed=3)
    assert all(kinds[number] is K.NEEDS_FULL for number in choice.needs_full)
    assert all(kinds[number] is K.LOW_IS_ENOUGH for number in choice.low_is_enough)
    assert choice.size <= size and len(choice.needs_full) == round(choice.size * share)
    random.shuffle(rows)
    assert choose(rows, size, share, seed=3) == choice


def test_another_seed_draws_other_rows():
    rows = numbered(*[K.NEEDS_FULL, K.LOW_IS_ENOUGH] * 20)
    assert choose(rows, 10, 0.5, seed=1) != choose(rows, 10, 0.5, seed=2)


@pytest.mark.parametrize(("size", "share"), [(0, 0.5), (4, -0.1), (4, 1.5)])
def test_choices_that_cannot_be(size, share):
    with pytest.raises(ConfigError, match="size|share"):
        choose([], size, share, seed=0)


@given(st.integers(1, 9), st.integers(0, 50))
def test_processes_share_out_all_shards(processes, shards):
    parts = [shards_of(process, processes, shards) for process in range(processes)]
    assert sorted(shard for part in parts for shard in part) == list(range(shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_sources_are_counted_apart():
    found = shares_by_source([("b", K.NEITHER), ("a", K.NEEDS_FULL), ("b", K.NEITHER)])
    assert list(found) == ["a", "b"] and found["b"]["neither"] == 2 and found["a"]["needs_full"] == 1
    assert found["a"]["bad_row"] == 0


def test_work_of_other_settings_is_refused(tmp_path):
    work = Work(tmp_path, {"model": "x", "seed": 1})
    work.write(3, [{"a": 1}, {"b": "é\n"}])
    again = Work(tmp_path, {"model": "x", "seed": 1})
    assert again.is_done(3) and not again.is_done(2) and again.read(3) == [{"a": 1}, {"b": "é\n"}]
    with pytest.raises(ConfigError, match="seed was 1 and is 2"):
        Work(tmp_path, {"model": "x", "seed": 2})


def test_a_row_is_drawn_from_its_own_distribution():
    """Frequencies of 4000 rows with probabilities 0, 0.1, 0.6, 0.3, within 4 standard deviations; never token 0."""
    scores = torch.tensor([0.0, 0.1, 0.6, 0.3]).log()
    draw = _DrawByRow(range(4000), temperature=1.0)
    drawn = draw(torch.zeros(4000, 1, dtype=torch.long), scores.expand(4000, -1)).argmax(-1)
    shares = drawn.bincount(minlength=4) / 4000
    assert shares[0] == 0
    for share, probability in zip(shares[1:].tolist(), (0.1, 0.6, 0.3), strict=True):
        assert abs(share - probability) < 4 * (probability * (1 - probability) / 4000) ** 0.5
    cold = _DrawByRow(range(50), temperature=0.01)(torch.zeros(50, 1, dtype=torch.long), scores.expand(50, -1))
    assert cold.argmax(-1).eq(2).all()


def test_seeds_of_turns():
    seeds = {turn_seed(*key) for key in [(0, "a", 0, (1,)), (1, "a", 0, (1,)), (0, "b", 0, (1,)), (0, "a", 1, (1,))]}
    assert len(seeds | {turn_seed(0, "a", 0, (1, 2))}) == 5 and max(seeds) < 2**63
    assert turn_seed(0, "a", 0, [1]) == turn_seed(0, "a", 0, (1,))
