"""Dividing a generation batch: every row once, groups together, equally many tokens; and what may be left out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vt_trl.config import VTGRPOConfig
from vt_trl.errors import ConfigError
from vt_trl.forward import as_many, split
from vt_trl.forward.batches import divide, micro_batches, take, without_idle


@st.composite
def generations(draw) -> tuple[list[int], list[int], int, int]:
    """Prompt and length of each row, micro-batches of the generation, and of an update."""
    group, groups = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    rows = group * groups
    steps = draw(st.sampled_from([n for n in range(1, rows + 1) if rows % n == 0]))
    per_update = draw(st.sampled_from([n for n in range(1, steps + 1) if steps % n == 0]))
    lengths = draw(st.lists(st.integers(1, 2000), min_size=rows, max_size=rows))
    return [row // group for row in range(rows)], lengths, steps, per_update


@given(generations(), st.integers(0, 9))
def test_every_row_is_in_one_micro_batch(generation, seed):
    prompts, lengths, steps, per_update = generation
    torch.manual_seed(seed)
    parts = divide(prompts, lengths, steps, per_update)
    assert sorted(row for part in parts for row in part) == list(range(len(prompts)))
    assert len(parts) == steps and {len(part) for part in parts} == {len(prompts) // steps}
    size, group = len(parts[0]), prompts.count(0)
    for part in parts:
        if size % group == 0 and (per_update * size) % group == 0:
            assert all(part.count(row) == 1 for row in part)
            assert {prompts[row] for row in part} == {p for p in set(prompts) if any(prompts[r] == p for r in part)}
            assert len({prompts[row] for row in part}) == size // group  # whole groups
        elif group % size == 0 and (per_update * size) % group == 0:
            assert len({prompts[row] for row in part}) == 1
    for update in range(0, steps, per_update):  # the fullest first, so that processes are busy alike
        loads = [sum(lengths[row] for row in part) for part in parts[update : update + per_update]]
        assert loads == sorted(loads, reverse=True)


def test_long_rollouts_are_spread_over_the_micro_batches():
    lengths = [900, 800, 10, 20, 700, 30, 15, 40]
    parts = divide([0] * 8, lengths, steps=4, per_update=4)
    assert sorted(sum(lengths[row] for row in part) for part in parts) == [70, 720, 815, 910]
    groups = divide([0, 0, 1, 1, 2, 2, 3, 3], [500, 500, 400, 400, 10, 10, 20, 20], steps=2, per_update=2)
    assert sorted(sum([500, 500, 400, 400, 10, 10, 20, 20][row] for row in part) for part in groups) == [840, 1020]


def test_groups_come_in_random_order_and_the_seed_decides():
    prompts, lengths = [row // 2 for row in range(40)], [7] * 40
    drawn = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        drawn.append(divide(prompts, lengths, 20, 1))
    assert drawn[0] == drawn[2] != drawn[1]


def batch_of(count: int) -> dict:
    columns = torch.arange(count)[:, None]
    return {
        "prompt_ids": columns.clone(),
        "prompt_mask": torch.ones(count, 1, dtype=torch.long),
        "completion_ids": columns.repeat(1, 3),
        "completion_mask": torch.ones(count, 3, dtype=torch.long),
        "tool_mask": torch.ones(count, 3, dtype=torch.long),
        "advantages": torch.zeros(count),
        "num_items_in_batch": torch.tensor(9),
        "prompt_index": [row // 2 for row in range(count)],
        "image_index": [[row] for row in range(count)],
        "pixel_values": [torch.full((2, 1), float(row)) for row in range(count)],
        "image_grid_thw": torch.ones(count, 3),
    }


@pytest.mark.parametrize("balance", [True, False])
def test_parts_share_the_pixels_and_keep_their_columns_together(balance):
    batch = batch_of(8)
    parts = micro_batches(batch, 4, 4, balance)
    rows = [row for part in parts for row in part["prompt_ids"][:, 0].tolist()]
    assert sorted(rows) == list(range(8))
    for part in parts:
        assert part["pixel_values"] is batch["pixel_values"] and part["image_grid_thw"] is batch["image_grid_thw"]
        own = part["prompt_ids"][:, 0].tolist()
        assert part["image_index"] == [[row] for row in own] and part["completion_ids"][:, 2].tolist() == own
        assert part["prompt_index"] == [row // 2 for row in own] and part["num_items_in_batch"] == 9
        assert not balance or len(set(part["prompt_index"])) == 1


def test_rows_without_advantage_carry_no_loss_but_one_stays_to_log_from():
    batch = batch_of(4) | {"advantages": torch.tensor([0.5, 0.0, -0.5, 0.0])}
    assert without_idle(batch)["tool_mask"].sum(1).tolist() == [3, 0, 3, 0]
    assert batch["tool_mask"].sum() == 12  # a part is shared between epochs; it is not written to
    none = batch_of(4)
    none["tool_mask"][1, 1:] = 0
    assert without_idle(none)["tool_mask"].sum(1).tolist() == [0, 1, 0, 0]
    none["tool_mask"][:] = 0
    assert not without_idle(none)["tool_mask"].any()


PARTS = st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=6), min_size=1, max_size=4)


@given(PARTS, st.integers(1, 50), st.integers(1, 1200), st.integers(1, 12))
@settings(max_examples=200)
def test_a_split_keeps_below_the_limit_where_single_rows_do(completions, prompt, limit, more):
    groups, lengths, prompts = [], [], []
    for group in completions:
        groups.append(list(range(len(lengths), len(lengths) + len(group))))
        lengths += [prompt + one for one in group]
        prompts += [prompt] * len(group)
    parts = split(groups, lengths, prompts, limit)
    assert [row for part in parts for row in part] == list(range(len(lengths)))
    owner = {row: number for number, group in enumerate(groups) for row in group}
    for part in parts:
        tokens = sum(lengths[row] - prompt + 1 for row in part) + prompt * len({owner[row] for row in part})
        assert tokens <= limit or len(part) == 1
    for before, after in pairwise(parts):  # nothing is split that would have fitted
        row = after[0]
        cost = lengths[row] - prompt + 1 + (0 if owner[row] == owner[before[-1]] else prompt)
        used = sum(lengths[r] - prompt + 1 for r in before) + prompt * len({owner[r] for r in before})
        assert used + cost > limit
    spread = as_many(parts, len(parts) + more)
    assert len(spread) == len(parts) + more
    assert sorted(row for part in spread for row in part) == list(range(len(lengths)))
    assert all(spread) or max(map(len, spread)) == 1  # an empty part only where no row is left for it


def test_take_is_in_the_order_asked_for():
    part = take(batch_of(4), [2, 0])
    assert part["prompt_ids"][:, 0].tolist() == [2, 0] and part["prompt_index"] == [1, 0]


def test_a_limit_that_cannot_work(tmp_path):
    with pytest.raises(ConfigError, match="max_packed_tokens is 0; give a number of tokens"):
        VTGRPOConfig(str(tmp_path), max_packed_tokens=0, use_cpu=True)
