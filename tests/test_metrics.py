"""Numbers of the log, from records written by hand."""

from __future__ import annotations

import math

import pytest

from vt_trl.metrics import MetricBook, RolloutRecord, mean, summarise, unique_by_id
from vt_trl.types import Fault, Rollout, RolloutStatus, Turn


def record(correct: bool | None = True, asked=False, group="g", **fields) -> RolloutRecord:
    defaults = {
        "id": "r",
        "source": "",
        "status": "answered",
        "faults": [],
        "attempted": asked,
        "well_formed": True,
        "reward": float(bool(correct)),
        "penalty": 0.0,
        "advantage": 0.0,
        "parts": {},
        "visual_tokens": 4,
        "images": 1,
        "completion_tokens": 10,
        "sampled_tokens": 10,
    }
    return RolloutRecord(group=group, correct=correct, asked=asked, **{**defaults, **fields})


def test_means_by_hand():
    records = [
        record(reward=1.5, parts={"accuracy": 1.0}, source="hard"),
        record(asked=True, reward=0.9, penalty=0.1, visual_tokens=20, images=2, completion_tokens=30, source="hard"),
        record(correct=False, asked=True, reward=0.0, well_formed=False, sampled_tokens=2, parts={"accuracy": 0.0}),
        record(
            correct=False,
            reward=0.0,
            attempted=True,
            well_formed=False,
            status="truncated",
            faults=["truncated", "truncated", "no_move"],
            source="easy",
        ),
    ]
    # rewards 1.5, 0.9, 0, 0: mean 0.6; squares 0.81 + 0.09 + 0.36 + 0.36 = 1.62, over N - 1 = 3
    assert summarise(records) == pytest.approx(
        {
            "reward": 0.6,
            "reward_std": math.sqrt(0.54),
            "accuracy": 0.5,
            "accuracy_with_tool": 0.5,
            "accuracy_without_tool": 0.5,
            "request_rate": 0.5,
            "requests_succeeded": 2 / 3,
            "format_rate": 0.5,
            "penalty_mean": 0.025,
            "visual_tokens": 8.0,
            "images": 1.25,
            "completions/mean_length": 15.0,
            "completions/max_length": 30,
            "completions/mean_sampled": 8.0,
            "completions/clipped_ratio": 0.25,
            "unjudged": 0.0,
            "status/answered": 0.75,
            "status/truncated": 0.25,
            **{f"status/{status}": 0.0 for status in RolloutStatus if status not in ("answered", "truncated")},
            "fault/truncated": 0.25,
            "fault/no_move": 0.25,
            "rewards/accuracy/mean": 0.5,
            "request_rate/easy": 0.0,
            "request_rate/hard": 0.5,
            "accuracy/easy": 0.0,
            "accuracy/hard": 1.0,
            "groups/all_right": 0.0,
            "groups/all_wrong": 0.0,
            "groups/all_well_formed": 0.0,
            "groups/any_request": 1.0,
            "groups/only_tool_right": 0.0,
            "groups/only_direct_right": 0.0,
            "groups/both_right": 1.0,
            "groups/dropped_unjudged": 0.0,
            "frac_reward_zero_std": 0.0,
        }
    )


def test_what_has_no_value_is_left_out():
    numbers = summarise([record(reward=math.nan, correct=None, parts={"judge": math.nan})])
    absent = {"reward", "accuracy", "accuracy_with_tool", "accuracy_without_tool", "requests_succeeded"}
    assert not absent & set(numbers) and "rewards/judge/mean" not in numbers
    assert not any(math.isnan(value) for value in numbers.values())
    assert numbers["unjudged"] == 1.0 and numbers["request_rate"] == 0.0
    assert not any(name.startswith(("groups/", "frac_")) for name in numbers)  # a group of one is none
    assert not any(math.isnan(value) for value in summarise([]).values())


def test_nan_is_left_out_of_means_and_not_counted_as_zero():
    records = [
        record(reward=1.0, parts={"judge": 1.0}),
        record(reward=math.nan, correct=None, parts={"judge": math.nan}),
    ]
    numbers = summarise(records)
    assert (numbers["reward"], numbers["accuracy"], numbers["rewards/judge/mean"]) == (1.0, 1.0, 1.0)
    assert (numbers["unjudged"], numbers["reward_std"]) == (0.5, 0.0)
    assert mean([1.0, math.nan, 3.0]) == 2.0 and math.isnan(mean([math.nan])) and math.isnan(mean([]))


def group_numbers(*groups: list[RolloutRecord]) -> dict[str, float]:
    for index, group in enumerate(groups):
        for one in group:
            one.group = str(index)
    mixed = [one for pair in zip(*groups, strict=True) for one in pair]  # groups need not lie side by side
    return {name.removeprefix("groups/"): value for name, value in summarise(mixed).items()}


def test_shares_of_groups():
    numbers = group_numbers(
        [record(True), record(True)],
        [record(False), record(False)],
        [record(True, asked=True), record(False)],
        [record(True), record(False, asked=True, well_formed=False)],
        [record(True), record(True, asked=True)],
    )
    names = ("all_right", "all_wrong", "only_tool_right", "only_direct_right", "both_right", "any_request")
    assert [numbers[name] for name in names] == [0.4, 0.2, 0.2, 0.4, 0.2, 0.6]
    assert numbers["all_well_formed"] == 0.8
    assert numbers["frac_reward_zero_std"] == 0.6  # rewards are 1 for right and 0 for wrong


def test_variance_below_the_filters_threshold_is_none():
    numbers = group_numbers([record(reward=1.0), record(reward=1.0001)], [record(reward=1.0), record(reward=1.001)])
    assert numbers["frac_reward_zero_std"] == 0.5  # deviations 0.7e-4 and 7e-4; the threshold is 1e-4


def test_an_undecided_member_makes_a_group_neither_right_nor_wrong():
    def unknown():
        return record(None, reward=math.nan)

    numbers = group_numbers([unknown(), unknown()], [record(False), unknown()], [record(True), record(True)])
    assert (numbers["all_right"], numbers["all_wrong"]) == (1.0, 0.0)
    assert numbers["dropped_unjudged"] == pytest.approx(2 / 3)
    assert {"all_right", "all_wrong"} & set(group_numbers([unknown(), unknown()])) == set()


def test_a_record_takes_its_numbers_from_the_rollout():
    turns = [Turn("", (1,), (0.0,), True, (Fault.STRAY_TEXT,)), Turn("", (2,), (0.0,), True)]
    rollout = Rollout(
        row={"id": 7, "data_source": None},
        prompt_ids=[9, 9],
        completion_ids=[1, 5, 5, 2],
        loss_mask=[1, 0, 0, 1],
        logprobs=[0.0] * 4,
        images=["a", "b"],
        messages=[],
        prompt_messages=0,
        turns=turns,
        status=RolloutStatus.ANSWERED,
        asked=True,
        attempted=True,
        visual_tokens=12,
    )
    one = RolloutRecord.of(rollout, "g", correct=None, reward=0.5)
    expected = ("7", "g", "", "answered", ["stray_text"], True, True, None, False, 0.5, 0.0, 0.0, {}, 12, 2, 4, 2)
    assert tuple(vars(one).values()) == expected


def test_rows_repeated_by_a_sampler_count_once_and_rows_without_id_all_count():
    records = [record(id="a", reward=1.0), record(id="b"), record(id="a", reward=1.0)]
    assert sorted(one.id for one in unique_by_id(records)) == ["a", "b"]
    nameless = [
        RolloutRecord.of(Rollout(row, *[[]] * 6, 0, [], RolloutStatus.ANSWERED), "g") for row in ({}, {"id": None})
    ]
    assert unique_by_id(nameless) == nameless


def test_a_cleared_book_is_empty():
    book = MetricBook([record()])
    book.timings["time"].append(1.0)
    book.clear()
    assert book.records == [] and not book.timings
