"""Rollouts to tensors, with tokens drawn by hand: 1-9 text, 90 an image placeholder between 91 and 92, 0 padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vt_trl.packing import AlignmentError, pack, placeholder_runs
from vt_trl.types import Rollout, RolloutStatus, Turn

PAD, PIC, START, END = 0, 90, 91, 92
CPU = torch.device("cpu")


class Picture(int):
    """A number with an identity of its own."""


class FakeFeatures:
    """Pictures are numbers: picture n makes n visual tokens and n patches that hold n."""

    def visual_tokens(self, image: int) -> int:
        return image

    def preprocess(self, image: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((image, 1), float(image)), torch.tensor([1, 1, image])

    def patches(self, image: int) -> torch.Tensor:
        return self.preprocess(image)[0]

    def grid(self, image: int) -> torch.Tensor:
        return self.preprocess(image)[1]


def rollout(prompt: list[int], turns: list[list[int]], told: list[list[int]], images: list[int]) -> Rollout:
    """Prompt, then turn 1, what the tool said, turn 2, ...; the log-probability of token t is -t."""
    ids, mask = [], []
    for index, turn in enumerate(turns):
        ids += turn
        mask += [1] * len(turn)
        if index < len(told):
            ids += told[index]
            mask += [0] * len(told[index])
    logprobs = [-float(token) if keep else 0.0 for token, keep in zip(ids, mask, strict=True)]
    made = [Turn("", tuple(turn), tuple(-float(token) for token in turn), True) for turn in turns]
    return Rollout({"id": "r7"}, prompt, ids, mask, logprobs, images, [], 0, made, RolloutStatus.ANSWERED)


def packed(rollouts: list[Rollout], **settings) -> dict:
    return pack(rollouts, FakeFeatures(), pad_id=PAD, image_token_id=PIC, device=CPU, **settings)


def direct() -> Rollout:
    return rollout([1, START, PIC, END], turns=[[5, 6]], told=[], images=[1])


def looked() -> Rollout:
    return rollout([1, START, PIC, END, 2], turns=[[5], [7, 8]], told=[[3, START, PIC, PIC, END]], images=[1, 2])


def test_two_rollouts_side_by_side():
    """
    ::
                       prompt                |  completion
        direct         .   1  91  90  92     |  5   6   .   .   .   .   .   .
          attention    0   1   1   1   1     |  1   1   0   0   0   0   0   0
          loss                               |  1   1   0   0   0   0   0   0
        looked         1  91  90  92   2     |  5   3  91  90  90  92   7   8
          attention    1   1   1   1   1     |  1   1   1   1   1   1   1   1
          loss                               |  1   0   0   0   0   0   1   1
    """
    batch = packed([direct(), looked()])
    logps = batch.pop("sampling_per_token_logps")
    pixels = [one.tolist() for one in batch.pop("pixel_values")]
    lists = {name: value for name, value in batch.items() if isinstance(value, list)}
    assert {name: tensor.tolist() for name, tensor in batch.items() if name not in lists} == {
        "prompt_ids": [[0, 1, 91, 90, 92], [1, 91, 90, 92, 2]],
        "prompt_mask": [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
        "completion_ids": [[5, 6, 0, 0, 0, 0, 0, 0], [5, 3, 91, 90, 90, 92, 7, 8]],
        "completion_mask": [[1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]],
        "tool_mask": [[1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 1, 1]],
        "image_grid_thw": [[1, 1, 1], [1, 1, 2]],
    }
    assert logps.tolist() == [[-5, -6, 0, 0, 0, 0, 0, 0], [-5, 0, 0, 0, 0, 0, -7, -8]]
    assert pixels == [[[1.0]], [[2.0], [2.0]]]  # each picture once
    assert lists == {"prompt_index": [0, 1], "prompt_images": [1, 1], "image_index": [[0], [0, 1]]}
    assert {batch[name].dtype for name in ("prompt_ids", "completion_ids")} == {torch.int64}


def test_pictures_are_kept_once_and_named_in_the_order_of_the_rollouts():
    batch = packed([looked(), direct(), looked()])
    assert batch["image_index"] == [[0, 1], [0], [0, 1]]
    assert batch["image_grid_thw"][:, 2].tolist() == [1, 2]
    assert [one.flatten().tolist() for one in batch["pixel_values"]] == [[1], [2, 2]]
    assert batch["prompt_index"] == [0, 1, 0]


def test_without_sharing_every_occurrence_is_a_picture_and_a_prompt_stays_one():
    batch = packed([looked(), looked(), direct()], share_images=False)
    assert batch["image_index"] == [[0, 1], [2, 3], [4]]
    assert batch["image_grid_thw"][:, 2].tolist() == [1, 2, 1, 2, 1]
    assert batch["prompt_index"] == [0, 0, 1]


def test_the_same_words_about_another_picture_are_another_prompt():
    first, second = direct(), direct()
    first.images, second.images = [Picture(1)], [Picture(1)]
    batch = packed([first, second, replace(first)])
    assert batch["prompt_index"] == [0, 1, 0] and batch["image_index"] == [[0], [1], [0]]


def test_without_any_picture_there_are_no_picture_fields():
    batch = packed([rollout([1], [[5]], [], [])])
    assert set(batch) == {
        *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "sampling_per_token_logps"),
        *("prompt_index", "prompt_images"),
    }


def test_a_rollout_without_picture_next_to_one_with():
    batch = packed([rollout([1], [[5]], [], []), direct()])
    assert batch["image_index"] == [[], [0]] and batch["prompt_images"] == [0, 1]


def test_unknown_log_probabilities_become_nan_and_nothing_else_does():
    one = looked()
    one.logprobs[6] = None
    logps = packed([one, direct()])["sampling_per_token_logps"]
    assert logps.isnan().nonzero().tolist() == [[0, 6]]


def test_padding_to_a_multiple_keeps_the_sides():
    batch = packed([direct()], pad_to_multiple_of=8)
    assert batch["prompt_ids"].tolist() == [[0, 0, 0, 0, 1, 91, 90, 92]]
    assert batch["prompt_mask"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    assert batch["completion_ids"].tolist() == [[5, 6, 0, 0, 0, 0, 0, 0]]
    assert batch["tool_mask"].tolist() == batch["completion_mask"].tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    assert batch["sampling_per_token_logps"].shape == (1, 8)


def wrong_turn(tokens: tuple[int, ...]) -> list[Turn]:
    return [Turn("", tokens, (0.0,) * len(tokens), True)]


MISALIGNED = {
    "a mask entry too few": (direct, {"loss_mask": [1]}, "2 completion tokens, 1 mask entries and 2 log"),
    "a log-probability too many": (direct, {"logprobs": [0.0] * 3}, "2 completion tokens, 2 mask .* and 3 log"),
    "trained and not sampled": (direct, {"turns": wrong_turn((5,))}, "not the sampled ones"),
    "sampled and not trained": (direct, {"loss_mask": [1, 0]}, "not the sampled ones"),
    "trained on tool text": (looked, {"loss_mask": [1, 1, 0, 0, 0, 0, 1, 1]}, "not the sampled ones"),
    "sampled in another order": (direct, {"turns": wrong_turn((6, 5))}, "not the sampled ones"),
    "sampled placeholder": (
        direct,
        {"completion_ids": [5, PIC], "turns": wrong_turn((5, PIC)), "images": [1, 1]},
        "sampled the image placeholder 90",
    ),
    "a placeholder too many": (direct, {"prompt_ids": [PIC, PIC]}, r"runs of \[2\] tokens.* make \[1\]"),
    "no placeholder": (direct, {"prompt_ids": [1]}, r"runs of \[\] tokens.* make \[1\]"),
    "no picture": (direct, {"images": []}, r"runs of \[1\] tokens.* make \[\]"),
    "pictures swapped": (looked, {"images": [2, 1]}, r"runs of \[1, 2\] tokens.* make \[2, 1\]"),
    "same total, other runs": (
        lambda: rollout([PIC, PIC, 1, PIC], [[5]], [], [1, 2]),
        {},
        r"runs of \[2, 1\] tokens.* make \[1, 2\]",
    ),
}


@pytest.mark.parametrize(("build", "change", "message"), MISALIGNED.values(), ids=MISALIGNED)
def test_whatever_does_not_fit_is_refused_with_the_rows_id(build, change, message):
    with pytest.raises(AlignmentError, match=f"row id 'r7': .*{message}"):
        packed([looked(), replace(build(), **change)])


def test_placeholder_runs():
    assert placeholder_runs([90, 90, 1, 90, 91, 92, 90, 90, 90], 90) == [2, 1, 3]
    assert placeholder_runs([], 90) == placeholder_runs([1, 2], 90) == []


TEXT = st.lists(st.integers(1, 9), min_size=1, max_size=5)
PICTURE = st.integers(1, 4)


@st.composite
def rollouts(draw) -> Rollout:
    def shown(image: int) -> list[int]:
        return [*draw(TEXT), START, *[PIC] * image, END, *draw(TEXT)]

    first = draw(st.lists(PICTURE, max_size=2))
    prompt = [token for image in first for token in shown(image)] + draw(TEXT)
    later = draw(st.lists(PICTURE, max_size=3))
    turns = [draw(TEXT) for _ in range(len(later) + 1)]
    return rollout(prompt, turns, [shown(image) for image in later], first + later)


@given(st.lists(rollouts(), min_size=1, max_size=4), st.sampled_from([None, 4]))
def test_what_was_packed_can_be_read_back(group, multiple):
    batch = packed(group, pad_to_multiple_of=multiple)
    for row, one in enumerate(group):
        prompt, completion = batch["prompt_mask"][row].bool(), batch["completion_mask"][row].bool()
        assert batch["prompt_ids"][row][prompt].tolist() == one.prompt_ids
        assert batch["completion_ids"][row][completion].tolist() == one.completion_ids
        assert not batch["prompt_ids"][row][~prompt].any() and not batch["completion_ids"][row][~completion].any()
        loss = batch["tool_mask"][row].bool()
        assert batch["completion_ids"][row][loss].tolist() == [t for turn in one.turns for t in turn.token_ids]
        assert batch["sampling_per_token_logps"][row][loss].tolist() == [p for t in one.turns for p in t.logprobs]
        assert not (loss & ~completion).any()
        shown = batch["image_index"][row] if "image_index" in batch else []
        assert [int(batch["image_grid_thw"][image, 2]) for image in shown] == one.images
        assert [batch["pixel_values"][image].flatten().tolist() for image in shown] == [[n] * n for n in one.images]
        assert placeholder_runs(one.prompt_ids, PIC) == one.images[: batch["prompt_images"][row]]
    assert len({tuple(one.prompt_ids) for one in group}) <= len(set(batch["prompt_index"])) <= len(group)
    widths = {batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]}
    assert not multiple or all(width % multiple == 0 for width in widths)
