"""Rewards for looking, against numbers worked out by hand; who decides what is right; and the presets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vt_trl.config import VTGRPOConfig
from vt_trl.errors import ConfigError
from vt_trl.groups import score_groups
from vt_trl.rewards import (
    group_penalty,
    iou_reward,
    keep_when_right,
    length_reward_paper,
    length_reward_released,
    make_reward,
    make_rewards,
    region_reward,
)
from vt_trl.rewards.region import reasoning
from vt_trl.types import Region, Rollout, RolloutStatus

SIGN = Region(0, (10.0, 10.0, 20.0, 20.0))
OTHER = Region(0, (0.0, 0.0, 5.0, 5.0))
SECOND = Region(1, (10.0, 10.0, 20.0, 20.0))  # of another picture


def rollout(answer: str | None = "5", *regions: Region, **more) -> Rollout:
    fields = {"row": {}, "prompt_ids": [], "messages": [], "prompt_messages": 0, "turns": [], **more}
    empty = {name: [] for name in ("completion_ids", "loss_mask", "logprobs", "images")}
    status = RolloutStatus.ANSWERED if answer else RolloutStatus.NO_ANSWER
    return Rollout(**fields, **empty, status=status, answer=answer, regions=list(regions))


def said(*replies: str) -> list[dict]:
    told = {"role": "user", "content": "x" * 500}
    return [message for reply in replies for message in ({"role": "assistant", "content": reply}, told)]


@pytest.mark.parametrize(
    ("answer", "regions", "score"),
    [
        ("5", [], 0.0),
        ("5", [SIGN], 0.5),
        ("5", [SIGN, SIGN], 0.5),
        ("5", [SIGN, OTHER, SECOND], 0.5),  # capped
        ("6", [SIGN], 0.0),
        (None, [SIGN], 0.0),
    ],
)
def test_a_crop_pays_once_and_only_for_a_right_answer(answer, regions, score):
    one = rollout(answer, *regions)
    assert region_reward([[]], answer=["5"], rollout=[one]) == [score]
    assert region_reward([[]], correct=[answer == "5"], rollout=[one]) == [score]
    assert region_reward([[]], correct=[False], rollout=[one]) == [0.0]


def test_a_box_that_was_written_and_not_shown_pays_nothing():
    completions = [said('<think>{"bbox_2d": [1, 2, 3, 4]}', "</think><answer>5</answer>")]
    assert region_reward(completions, answer=["5"], rollout=[rollout("5")]) == [0.0]


@pytest.mark.parametrize(
    ("regions", "gold", "score"),
    [
        ([SIGN], [10, 10, 20, 20], 1.0),
        ([SIGN], [15, 10, 25, 20], 1 / 3),
        ([SIGN, OTHER], [0, 0, 5, 10], 0.5),  # the better one
        ([SIGN], [30, 30, 40, 40], 0.0),
        ([SECOND], [10, 10, 20, 20], 0.0),
        ([], [10, 10, 20, 20], 0.0),
        ([SIGN], None, 0.0),
        ([SIGN], [], 0.0),
    ],
)
def test_overlap_with_the_gold_region(regions, gold, score):
    assert iou_reward([[]], rollout=[rollout("5", *regions)], region=[gold]) == [pytest.approx(score)]


def test_rows_without_the_column_have_no_gold_region():
    assert iou_reward([[]], rollout=[rollout("5", SIGN)]) == [0.0]


BOX = '{"bbox_2d": [1, 2, 3, 4], "label": "a sign"}'


def test_reasoning_is_what_is_neither_tag_nor_box_nor_call_nor_answer():
    call = '<tool_call>{"name": "zoom_image", "arguments": {"bbox_2d": [1, 2, 3, 4]}}</tool_call>'
    assert reasoning(said(f"<think>abc</think>{call}", "<think> de </think><answer>long</answer>")) == ["abc", "de"]
    assert reasoning(said(f"<think>abc {BOX}", f" de{BOX}", " f</think><answer>x</answer>")) == ["abc", "de", "f"]
    assert reasoning(said("no tags", "<answer>open")) == ["no tags", ""]


@pytest.mark.parametrize(
    ("replies", "paper", "released"),
    [
        (["<think>" + "a" * 100 + "</think><answer>5</answer>"], 0.1, 0.1),
        (["<think>" + "a" * 400 + "</think><answer>5</answer>"], 0.25, 0.1),
        (["<think>" + "a" * 200 + BOX, "bcd</think><answer>5</answer>"], 0.203, 0.03),
        (["<think>" + "a" * 200 + BOX, "</think><answer>5</answer>"], 0.2, 0.0),
        ([""], 0.0, 0.0),
        ([], 0.0, 0.0),
    ],
)
def test_both_published_forms_of_the_length_reward(replies, paper, released):
    assert length_reward_paper([said(*replies)]) == [pytest.approx(paper)]
    assert length_reward_released([said(*replies)]) == [pytest.approx(released)]


def config(tmp_path, **settings) -> VTGRPOConfig:
    return VTGRPOConfig(str(tmp_path), use_cpu=True, report_to=[], **settings)


@pytest.mark.parametrize("preset", ["paper", "released"])  # of VLM-R3
def test_presets_set_rewards_and_weights(tmp_path, preset):
    args = config(tmp_path, reward_preset=preset, penalty="none")
    length = {"paper": "length_paper", "released": "length_released"}[preset]
    assert args.rewards == ["accuracy", "format", "region", length]
    assert args.reward_weights == [1.0, {"paper": 1.0, "released": 0.5}[preset], 1.0, 1.0]
    again = config(tmp_path, reward_preset=preset, penalty="none", rewards=args.rewards,
                   reward_weights=args.reward_weights)  # fmt: skip
    assert again.rewards == args.rewards  # as a checkpoint's settings are read back
    assert len(make_rewards(args)) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_preset": "papr", "penalty": "none"}, "Did you mean 'paper'"),
        ({"reward_preset": "paper"}, "penalty: none, or penalty_on: visual_tokens"),
        ({"reward_preset": "paper", "penalty": "none", "rewards": ["accuracy"]}, "Remove reward_preset, or them"),
        ({"reward_preset": "paper", "penalty": "none", "reward_weights": [1.0] * 4}, None),
        ({"reward_preset": "released", "penalty": "none", "reward_weights": [1.0] * 4}, "Remove reward_preset"),
        ({"penalty_on": "tokens"}, "Use call or visual_tokens"),
    ],
)
def test_presets_that_are_contradicted_say_so(tmp_path, settings, message):
    if message is None:
        config(tmp_path, **settings)
        return
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **settings)


def test_the_trainers_own_verdict_decides_which_regions_pay(tmp_path):
    """A judge called the first and the third right, whatever a rule would say; the second keeps its other parts."""
    functions = [make_reward("accuracy"), make_reward("region").ungated, make_reward("length_paper")]
    parts = torch.tensor([[1.0, 0.5, 0.1], [0.0, 0.5, 0.2], [1.0, 0.5, 0.0], [float("nan"), 0.5, 0.0]])
    kept = keep_when_right(parts, functions, parts[:, 0])
    assert kept[:, 1].tolist() == [0.5, 0.0, 0.5, 0.0]
    assert kept[:2, 2].tolist() == pytest.approx([0.1, 0.2]) and kept[3, 0].isnan()
    args = config(tmp_path, reward_preset="paper", penalty="always", penalty_on="visual_tokens", penalty_amount=0.2)
    trainer = SimpleNamespace(
        _calculate_rewards=lambda *_: parts[:2].double(),
        accelerator=SimpleNamespace(process_index=0),
        correct_column=0,
        reward_funcs=functions,
        reward_weights=torch.tensor([1.0, 1.0, 1.0]),
        args=args,
        image_token_id=9,
        _pending_extra_logs={},
    )
    prompt = {"prompt_ids": [1, 9, 9, 9], "asked": True}
    rollouts = [rollout("5", SIGN, visual_tokens=3 + 4, **prompt), rollout("6", SIGN, visual_tokens=3 + 8, **prompt)]
    (group,) = score_groups(trainer, rollouts, 2)
    assert group.penalty.tolist() == pytest.approx([0.1, 0.2])  # 4 and 8 of at most 8 tokens
    assert group.reward.tolist() == pytest.approx([1.0 + 0.5 + 0.1 - 0.1, 0.0 + 0.0 + 0.2 - 0.2])


def test_a_look_pays_by_its_share_of_the_most_that_was_spent():
    right, asked = torch.tensor([True] * 4), torch.tensor([True, True, False, True])
    spent = torch.tensor([100, 400, 0, 0])
    assert group_penalty("always", right, asked, 4, amount=0.1, spent=spent).tolist() == pytest.approx(
        [0.025, 0.1, 0.0, 0.0]
    )
    # Where direct answers pay (here 1 of 4 is below theta), they pay in full: they spent nothing that could be shared.
    assert group_penalty("paper", right, asked, 4, theta=0.3, amount=0.1, spent=spent).tolist() == pytest.approx(
        [0.0, 0.0, 0.1, 0.0]
    )
    nobody = group_penalty("always", right, torch.tensor([False] * 4), 4, spent=torch.zeros(4))
    assert nobody.tolist() == [0.0] * 4
