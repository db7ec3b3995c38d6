"""The packed forward gives the numbers of the plain one: log-probabilities, entropies and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import FAMILY_NAMES
from forward_world import World
from peft import LoraConfig, get_peft_model

import vt_trl.forward.attention as attention
from vt_trl.forward.attention import by_segment, by_variable_length
from vt_trl.forward.batches import loss_mask, on_cpu, take
from vt_trl.forward.layout import Layout, Segment, lay_out
from vt_trl.forward.passes import Scores, packed_pass, padded_pass
from vt_trl.forward.vision import FeatureCache

ROWS = range(6)


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def world(request, checkpoints) -> World:
    world = World(checkpoints[request.param])
    world.batch = world.pack(world.rollouts())
    world.mask = loss_mask(world.batch)
    return world


def packed(world: World, rows: Any = ROWS, cache: FeatureCache | None = None) -> Scores:
    return packed_pass(world.policy, world.batch, on_cpu(world.batch, world.mask), rows, cache)


def padded(world: World, rows: Any = ROWS, **settings: Any) -> Scores:
    return padded_pass(world.policy, world.batch, world.mask, rows, None, **settings)


def gap(one: Scores, other: Scores) -> float:
    return max(
        (one.logprobs - other.logprobs).abs().max().item(), (one.entropies - other.entropies).abs().max().item()
    )


def gradients(world: World, scores: Scores) -> dict[str, torch.Tensor]:
    """Of a sum that weighs every token and its entropy differently."""
    weights = torch.linspace(-1, 2, scores.logprobs.numel(), dtype=torch.float64).view_as(scores.logprobs)
    world.model.zero_grad()
    ((scores.logprobs + 0.3 * scores.entropies) * weights).sum().backward()
    return {name: p.grad.clone() for name, p in world.model.named_parameters() if p.grad is not None}


def worst(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of a gradient, relative to the largest entry of that gradient."""
    assert one.keys() == other.keys() and one
    return max(((one[n] - other[n]).abs().max() / (other[n].abs().max() + 1e-12)).item() for n in one)


@torch.no_grad()
def test_each_sample_alone_gives_the_same(world):
    """The padded forward is no reference if padding changes it: here every sample runs by itself."""
    scores = packed(world)
    assert world.mask.sum() == 42 and (scores.logprobs[world.mask.bool()] < 0).all()
    assert not scores.logprobs[world.mask == 0].any()
    for row in ROWS:
        alone = padded(world, [row])
        assert (scores.logprobs[row] - alone.logprobs[row]).abs().max() < 1e-10
        assert (scores.entropies[row] - alone.entropies[row]).abs().max() < 1e-10


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_all_weights(world, checkpointing):
    world.model.train()
    if checkpointing:
        world.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        ours, plain = packed(world), padded(world, share_vision=False)
        assert gap(ours, plain) < 1e-10
        mine, theirs = gradients(world, ours), gradients(world, plain)
        assert worst(mine, theirs) < 1e-6  # norms and rotations are in single precision in these models
        tower = [name for name in mine if ".visual." in name and mine[name].abs().max() > 1e-6]
        assert len(tower) > 10  # pictures are trained through, and the test would see it if not
        assert worst(gradients(world, padded(world)), theirs) < 1e-6  # the tower once, prompts as often as before
    finally:
        world.model.gradient_checkpointing_disable()
        world.model.eval()


@pytest.mark.parametrize("targets", ["all-linear", r".*language_model.*(q|v|gate)_proj"])
def test_gradients_of_an_adapter(checkpoints, targets):
    world = World(checkpoints["qwen2_5_vl"], seed=1)
    world.batch = world.pack(world.rollouts())
    world.mask = loss_mask(world.batch)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    world.model = get_peft_model(world.model, settings).double()
    cache = FeatureCache()
    ours = gradients(world, packed(world, cache=cache))
    assert len(cache) == (0 if targets == "all-linear" else 4)  # a tower with an adapter is not frozen
    assert worst(ours, gradients(world, padded(world, share_vision=False))) < 1e-6


@torch.no_grad()
def test_a_group_in_parts_gives_the_same(world):
    whole = packed(world)
    parts = [packed(world, rows) for rows in ([0, 3], [1, 4, 5], [2])]
    assert (sum(part.logprobs for part in parts) - whole.logprobs).abs().max() < 1e-10


@torch.no_grad()
def test_text_only_groups_and_prompts_of_one_token(checkpoints):
    world = World(checkpoints["qwen3_vl"])
    prompts = [world.text(1), world.text(4)]
    rollouts = [world.rollout(prompts[n // 2], [], [3 + n], []) for n in range(4)]
    world.batch = world.pack(rollouts)
    world.mask = loss_mask(world.batch)
    # Without pictures the model counts padding as positions, and rotates in single precision.
    assert gap(packed(world, range(4)), padded(world, range(4))) < 1e-6
    mixed = [*rollouts, *world.rollouts()]
    world.batch = world.pack(mixed)
    world.mask = loss_mask(world.batch)
    scores = packed(world, range(10))
    for row in range(10):
        assert (scores.logprobs[row] - padded(world, [row]).logprobs[row]).abs().max() < 1e-6


@torch.no_grad()
def test_what_follows_the_last_loss_token_is_not_computed(world):
    rope = world.policy.base.get_rope_index
    row = lay_out(on_cpu(world.batch, world.mask), [4], world.image_id, 2, rope)
    assert row.images == [world.batch["image_index"][4][0]]  # the crop that ends row 4 teaches nothing
    prompt = int(world.batch["prompt_mask"][4].sum())
    assert len(row.ids) == prompt + 6 - 1  # its last sampled token is a label only
    assert row.labels[-6:].tolist() == world.batch["completion_ids"][4, :6].tolist()


@torch.no_grad()
def test_a_row_without_loss_still_makes_a_forward(world):
    nothing = torch.zeros_like(world.mask)
    scores = packed_pass(world.policy, world.batch, on_cpu(world.batch, nothing), [0], None)
    assert not scores.logprobs.any() and scores.logprobs.shape == world.mask.shape


# Negative controls: what a wrong forward looks like. Each must be far above what the tests above allow.


def visible(query, key, value, layout, scaling=None):
    """Everything before a token, other completions too."""
    whole = Layout([Segment(0, query.shape[2])])
    return by_segment(query, key, value, whole, scaling)


def shifted(change: Any) -> Any:
    def lay(*args: Any) -> Any:
        row = lay_out(*args)
        row.positions = change(row.positions.clone(), row)
        return row

    return lay


def off_by_one(positions, row):
    for one in row.layout.segments:
        if one.before[1]:
            positions[:, one.start : one.start + one.length] += 1
    return positions


def flat(positions, row):
    return positions[:1].expand(3, -1)


@torch.no_grad()
@pytest.mark.parametrize("wrong", ["visible", "off_by_one", "flat", "other_picture"])
def test_negative_controls(world, monkeypatch, wrong):
    right = packed(world)
    if wrong == "visible":
        monkeypatch.setattr(attention, "by_segment", visible)
    elif wrong == "other_picture":
        swapped = list(world.batch["pixel_values"])
        swapped[1] = swapped[1].flip(0)
        monkeypatch.setitem(world.batch, "pixel_values", swapped)
    else:
        change = {"off_by_one": off_by_one, "flat": flat}[wrong]
        monkeypatch.setattr("vt_trl.forward.passes.lay_out", shifted(change))
    assert gap(packed(world), right) > 1e-4


# Kernels


def reference_varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
    """What ``torch.nn.attention.varlen.varlen_attn`` computes, sequence by sequence; the real one needs CUDA."""
    assert window_size == (-1, 0) and cu_q.dtype == cu_k.dtype == torch.int32
    assert longest_q == cu_q.diff().max() and longest_k == cu_k.diff().max()
    outs = []
    for number in range(len(cu_q) - 1):
        a, b = (t[cu_k[number] : cu_k[number + 1]].transpose(0, 1) for t in (k, v))
        own = q[cu_q[number] : cu_q[number + 1]].transpose(0, 1)
        mask = torch.ones(own.shape[1], a.shape[1], dtype=torch.bool).tril(a.shape[1] - own.shape[1])
        outs.append(
            torch.nn.functional.scaled_dot_product_attention(
                own, a, b, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
            ).transpose(0, 1)
        )
    return torch.cat(outs)


def test_variable_length_and_segments_agree(monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", reference_varlen)
    layout = Layout(
        [Segment(0, 5), Segment(5, 3, (0, 5)), Segment(8, 4, (0, 5)), Segment(12, 2), Segment(14, 6, (12, 2))]
    )
    draw = lambda heads: torch.randn(1, heads, 20, 8, dtype=torch.float64, requires_grad=True)  # noqa: E731
    q, k, v = draw(4), draw(2), draw(2)
    one, other = (f(q, k, v, layout, 0.3) for f in (by_segment, by_variable_length))
    assert one.shape == other.shape == (1, 20, 4, 8)
    assert (one - other).abs().max() < 1e-12
    weights = torch.randn_like(one)
    for tensor in (q, k, v):
        a, b = (torch.autograd.grad((out * weights).sum(), tensor, retain_graph=True)[0] for out in (one, other))
        assert (a - b).abs().max() < 1e-12


@torch.no_grad()
def test_a_call_without_a_layout_is_transformers_own(world):
    batch = take(world.batch, [0])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    before = world.model(input_ids=ids).logits
    attention.install("sdpa")  # a second time changes nothing
    assert torch.equal(world.model(input_ids=ids).logits, before)
    with pytest.raises(KeyError):
        attention.install("eager")


# The vision tower


class Counted:
    def __init__(self, world: World, monkeypatch):
        self.patches: list[int] = []
        tower = world.policy.base.visual
        forward = tower.forward

        def count(pixels, *args, **kwargs):
            self.patches.append(len(pixels))
            return forward(pixels, *args, **kwargs)

        monkeypatch.setattr(tower, "forward", count)


UNIQUE = 4 * 6 + 8 * 12 + 6 * 4 + 4 * 4


@torch.no_grad()
def test_the_tower_runs_once_per_unique_picture(world, monkeypatch):
    counted = Counted(world, monkeypatch)
    packed(world)
    padded(world)
    padded(world, share_vision=False)
    packed_pass(world.policy, world.batch, on_cpu(world.batch, world.mask), ROWS, None, share_vision=False)
    everywhere = 3 * 4 * 6 + 2 * 8 * 12 + 3 * 6 * 4 + 3 * 4 * 4
    # Packed, a prompt and its picture are there once anyway; what row 4 ends with is not there at all.
    by_place = 4 * 6 + 2 * 8 * 12 + 6 * 4 + 2 * 4 * 4
    assert counted.patches == [UNIQUE, UNIQUE, everywhere, by_place]


def test_features_of_a_frozen_tower_are_kept_and_those_of_a_trained_one_are_not(world, monkeypatch):
    counted, cache = Counted(world, monkeypatch), FeatureCache()
    packed(world, cache=cache)
    assert len(cache) == 0
    world.policy.base.visual.requires_grad_(False)
    try:
        first = packed(world, [0, 1], cache)
        again = packed(world, cache=cache)
        plain = padded_pass(world.policy, world.batch, world.mask, ROWS, cache)
        assert counted.patches == [UNIQUE, 4 * 6 + 8 * 12, 6 * 4 + 4 * 4]
        assert (first.logprobs[:2] - again.logprobs[:2]).abs().max() < 1e-10
        assert gap(again, padded(world, share_vision=False)) < 1e-10 and gap(plain, again) < 1e-10
        again.logprobs.sum().backward()  # twice through kept features
        packed(world, cache=cache).logprobs.sum().backward()
        cache.clear()
        assert len(cache) == 0
    finally:
        world.policy.base.visual.requires_grad_(True)
        world.model.zero_grad()
    assert "get_image_features" not in vars(world.policy.base)
