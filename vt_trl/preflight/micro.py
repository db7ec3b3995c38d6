"""What goes through the model at a time: the rows, tokens and pictures of one micro-batch, padded or packed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vt_trl.forward import split
from vt_trl.forward.support import TESTED
from vt_trl.preflight.activations import MicroBatch, Packing
from vt_trl.preflight.episodes import Episode

if TYPE_CHECKING:
    from vt_trl.preflight.setup import Setup

Load = Literal["longest", "typical", "mean"]


@dataclass(frozen=True)
class Branch:
    """One rollout after its prompt: tokens, those that go through the head, and pictures of tool replies."""

    tokens: int
    labelled: int
    patches: int
    images: float


@dataclass(frozen=True)
class Work:
    """One micro-batch: all of it, and its largest forward (:class:`vt_trl.speed.SpeedSettings`,
    ``max_packed_tokens``)."""

    whole: MicroBatch
    part: MicroBatch


def can_pack(config: PretrainedConfig, attention: str) -> bool:
    """Whether the packed forward takes such a model (:func:`vt_trl.forward.support.why_not_packed`)."""
    text = config.get_text_config()
    sliding = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    return config.model_type in TESTED and attention in ALL_ATTENTION_FUNCTIONS and not sliding


def work(setup: Setup, load: Load, training: bool = True) -> Work:
    """One micro-batch of a training step, or with ``training`` off one of a pass without gradient.

    - ``longest``: every rollout as long as the settings allow.
    - ``typical``: a group that needs most, since a whole group shares one fate where its picture is too small: every
      rollout asks; one of them is the longest of its generation (``Workload.tail``), the others are average. Padded,
      all are as long as that one.
    - ``mean``: the average over all micro-batches, for operations and seconds.
    """
    mean = setup.mean_branch
    if load == "longest":
        longest, others = setup.longest, _branch(setup, setup.longest)
    else:
        longest = setup.padded
        others = mean if load == "mean" else _branch(setup, setup.routes[-1][1])
    first = mean if load == "mean" else _branch(setup, longest)
    samples = setup.args.per_device_train_batch_size
    branches = [first] + [others] * (samples - 1)
    if setup.packed:
        made = _packed(setup, longest, branches, _prompts(setup, training))
    else:
        filling = [mean if load == "mean" else first] * samples  # pictures are not padded
        made = _padded(setup, longest, filling, _prompts(setup, training))
    if training and not setup.tower_in_update:
        made = Work(*(replace(one, patches=0, images=0) for one in (made.whole, made.part)))
    return made


def _branch(setup: Setup, episode: Episode) -> Branch:
    labelled = episode.loss_tokens if setup.args.loss_tokens_only else episode.completion
    return Branch(episode.completion, labelled, episode.reply_patches, episode.reply_images)


def _prompts(setup: Setup, training: bool) -> int:
    """How many prompts a micro-batch has. Those of a training step keep groups together with
    ``balance_micro_batches`` only; passes take rollouts in the order of their groups."""
    samples, group = setup.args.per_device_train_batch_size, setup.args.num_generations
    if training and not setup.args.balance_micro_batches:
        return min(samples, setup.groups)
    torn = samples % group and group % samples  # then a micro-batch may begin and end inside a group
    return min(setup.groups, samples, math.ceil(samples / group) + bool(torn))


def _padded(setup: Setup, episode: Episode, branches: Sequence[Branch], prompts: int) -> Work:
    patches, images = _pictures(setup, episode, branches, prompts)
    labelled = sum(branch.labelled for branch in branches)
    batch = MicroBatch(len(branches), episode.tokens, labelled, patches, images, joined=True)
    return Work(batch, batch)


def _packed(setup: Setup, episode: Episode, branches: Sequence[Branch], prompts: int) -> Work:
    limit, count = setup.args.max_packed_tokens, len(branches)
    groups: list[list[int]] = [[] for _ in range(prompts)]
    for row in range(count):
        groups[row * prompts // count].append(row)
    parts = [list(range(count))]
    if limit is not None:
        lengths = [episode.prompt + branch.tokens for branch in branches]
        parts = split(groups, lengths, [episode.prompt] * count, limit)
    made = []
    for part in parts:
        inside = [[branches[row] for row in group if row in part] for group in groups]
        made.append(_row(setup, episode, [group for group in inside if group]))
    return Work(_joined(made), max(made, key=lambda one: one.tokens))


def _row(setup: Setup, episode: Episode, groups: Sequence[Sequence[Branch]]) -> MicroBatch:
    """One packed row: the last token of a prompt stands in its branches, the last of a branch predicts nothing."""
    known, segments = max(0, episode.prompt - 1), []
    branches = [branch for group in groups for branch in group]
    for group in groups:
        segments += [(known, known)] + [(branch.tokens, known + branch.tokens) for branch in group]
    patches, images = _pictures(setup, episode, branches, len(groups))
    packing = Packing(tuple(segments), setup.gathers_keys)
    length = sum(queries for queries, _ in segments)
    labelled = sum(branch.labelled for branch in branches)
    return MicroBatch(1, length, labelled, patches, images, False, packing, joined=True)


def _joined(rows: Sequence[MicroBatch]) -> MicroBatch:
    """Several packed rows as one: what they keep together."""
    if len(rows) == 1:
        return rows[0]
    segments = tuple(segment for row in rows for segment in row.packing.segments)
    sums = [sum(getattr(row, name) for row in rows) for name in ("length", "labelled", "patches", "images")]
    return MicroBatch(1, *sums, False, replace(rows[0].packing, segments=segments), joined=True)


def _pictures(setup: Setup, episode: Episode, branches: Sequence[Branch], prompts: int) -> tuple[int, float]:
    """Patches and pictures the tower sees of a micro-batch."""
    if not (setup.args.share_vision and setup.args.share_images):
        prompts, shared = len(branches), False
    else:
        shared = setup.same_replies
    replies = [(branch.patches, branch.images) for branch in branches]
    if shared:  # some member of every group asks
        replies = [(episode.reply_patches, episode.reply_images)] * prompts
    patches, images = (sum(numbers) for numbers in zip(*replies, strict=True))
    return prompts * episode.prompt_patches + patches, prompts * episode.prompt_images + images
