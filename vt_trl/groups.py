"""Scored groups, and dynamic sampling: a group that teaches nothing is dropped, or replaced by a new one.

A group teaches nothing when all its rewards are equal (its advantages are 0) or when one of them could not be had.
VisionThink generates until a step has its number of good groups (Section 4.1); so does ``dynamic_sampling: refill``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch

from vt_trl.errors import SamplingShortfall
from vt_trl.metrics import ZERO_STD
from vt_trl.rewards import group_advantages, group_penalty, keep_when_right
from vt_trl.types import Rollout

if TYPE_CHECKING:
    from vt_trl.trainer import VTGRPOTrainer

logger = logging.getLogger(__name__)


class Fate(StrEnum):
    """Why a group trains or does not."""

    GOOD = "good"
    ZERO_STD = "zero_std"  # all rewards are equal
    UNJUDGED = "unjudged"  # a reward could not be had


@dataclass
class Group:
    """The G rollouts of one prompt and their scores: ``parts`` (G, F), everything else (G,).

    ``correct`` and ``reward`` are NaN where a judge failed; ``advantage`` stays 0 until the group is chosen.
    """

    rollouts: list[Rollout]
    parts: torch.Tensor
    correct: torch.Tensor
    penalty: torch.Tensor
    reward: torch.Tensor
    advantage: torch.Tensor = field(init=False)
    extra: list[dict[str, Any]] = field(init=False)  # what reward functions gave to log_extra, per rollout

    def __post_init__(self) -> None:
        self.advantage = torch.zeros(len(self.rollouts))
        self.extra = [{} for _ in self.rollouts]

    @property
    def fate(self) -> Fate:
        if self.reward.isnan().any():
            return Fate.UNJUDGED
        return Fate.ZERO_STD if len(self.reward) > 1 and self.reward.std() < ZERO_STD else Fate.GOOD


def score_groups(trainer: VTGRPOTrainer, rollouts: Sequence[Rollout], group_size: int) -> list[Group]:
    """Score this process's rollouts, which lie group by group. A collective: all processes score as many."""
    inputs = [{**rollout.row, "rollout": rollout} for rollout in rollouts]
    prompts = [[m.as_dict() for m in r.messages[: r.prompt_messages]] for r in rollouts]
    completions = [[m.as_dict() for m in r.messages[r.prompt_messages :]] for r in rollouts]
    everyone = trainer._calculate_rewards(inputs, prompts, completions, [r.completion_ids for r in rollouts])
    parts = everyone[trainer.accelerator.process_index * len(rollouts) :][: len(rollouts)].float().cpu()
    correct = parts[:, trainer.correct_column]
    parts = keep_when_right(parts, trainer.reward_funcs, correct)
    asked = torch.tensor([rollout.asked for rollout in rollouts])
    args = trainer.args
    spent = None
    if args.penalty_on == "visual_tokens":
        spent = torch.tensor([one.visual_tokens - one.prompt_ids.count(trainer.image_token_id) for one in rollouts])
    penalty = group_penalty(
        args.penalty, correct > 0.5, asked, group_size, args.penalty_theta, args.penalty_amount, spent
    )
    # NaN in any part is a score nobody could give: the sum, and with it the group, stays unknown.
    reward = (parts * trainer.reward_weights.cpu()).sum(dim=1) - penalty
    pieces = zip(*(tensor.split(group_size) for tensor in (parts, correct, penalty, reward)), strict=True)
    groups = [Group(list(rollouts[n * group_size :][:group_size]), *piece) for n, piece in enumerate(pieces)]
    if args.log_completions:
        attach_extra(groups, trainer._pending_extra_logs)
    trainer._pending_extra_logs.clear()
    return groups


def attach_extra(groups: Sequence[Group], columns: Mapping[str, Sequence[Any]]) -> None:
    """Give each rollout what reward functions said of it: column -> one value per rollout, in the groups' order."""
    places = [extra for group in groups for extra in group.extra]
    for column, values in columns.items():
        if len(values) != len(places):
            raise ValueError(
                f"log_extra was given {len(values)} values for {column!r} in one scoring of {len(places)} rollouts; "
                f"give one per completion, and a name of its own in each reward function."
            )
        for extra, value in zip(places, values, strict=True):
            extra[column] = value


def set_advantages(trainer: VTGRPOTrainer, groups: Sequence[Group], group_size: int) -> None:
    """Fill in the advantages of the groups that a step consists of. A collective, for a scale over the whole batch."""
    accelerator = trainer.accelerator
    reward = torch.cat([group.reward for group in groups])
    everyone = accelerator.gather(reward.to(accelerator.device)).cpu()
    own = group_advantages(everyone, group_size, trainer.scale_rewards)[accelerator.process_index * len(reward) :]
    for group, advantage in zip(groups, own.split(group_size), strict=False):
        group.advantage = advantage


def without_loss(groups: Sequence[Group], mode: str) -> torch.Tensor:
    """True (N,) where a group carries no loss: it was not judged or, unless ``off``, its rewards are all equal."""
    dropped = {Fate.UNJUDGED} if mode == "off" else {Fate.UNJUDGED, Fate.ZERO_STD}
    sizes = torch.tensor([len(group.rollouts) for group in groups])
    return torch.tensor([group.fate in dropped for group in groups]).repeat_interleave(sizes)


def effective_share(trainer: VTGRPOTrainer, dropped: torch.Tensor) -> float:
    """Share of all processes' rollouts whose group carries loss. A collective."""
    counts = torch.tensor([(~dropped).sum().item(), len(dropped)], device=trainer.accelerator.device)
    kept, total = trainer.accelerator.gather(counts).view(-1, 2).sum(dim=0).tolist()
    return kept / total


class Refiller:
    """Generates until every process has its groups: ``collect`` is one step's worth.

    All processes go through the same number of rounds and generate as many groups in each, the largest number that
    any of them lacks, so that nobody waits for a collective that others have left. What a process then has too many is
    kept for its next batch if the weights are still the same by then, or dropped.
    """

    def __init__(self, trainer: VTGRPOTrainer):
        self.trainer, self.args = trainer, trainer.args
        self._surplus: list[Group] = []
        self._surplus_step = -1
        self._batches_of_step = Counter[int]()

    def collect(self, inputs: list[dict[str, Any]], group_size: int) -> tuple[list[Group], list[Group]]:
        """The groups of this step and those left out, for the records. Raises SamplingShortfall if asked to."""
        trainer, wanted = self.trainer, len(inputs) // group_size
        step = trainer.state.global_step
        batch = self._batches_of_step[step]
        self._batches_of_step = Counter({step: batch + 1})
        kept = self._surplus if self._surplus_step == step else []
        stale, self._surplus = [] if kept else self._surplus, []
        made = trainer.make_groups(inputs, group_size)
        good = [group for group in [*made, *kept] if group.fate is Fate.GOOD]
        rounds = 1
        while rounds <= self.args.dynamic_sampling_rounds and (lack := self._most(wanted - len(good))):
            rows = [row for row in self._rows(lack, batch, rounds) for _ in range(group_size)]
            more = trainer.make_groups(rows, group_size)
            made += more
            good += [group for group in more if group.fate is Fate.GOOD]
            rounds += 1
        fates = Counter(group.fate for group in made)
        trainer.recorder.add_numbers(
            "train",
            {
                "groups/rounds": rounds,
                "groups/generated": len(made),
                "groups/rejected_zero_std": fates[Fate.ZERO_STD],
                "groups/rejected_unjudged": fates[Fate.UNJUDGED],
                "groups/surplus": max(0, len(good) - wanted),
                "groups/surplus_stale": len(stale),
            },
        )
        if self._most(wanted - len(good)):
            self._fall_short(wanted, len(good), rounds)
        if self.args.dynamic_sampling_surplus == "keep":
            self._surplus, self._surplus_step = good[wanted:], step
        # Bad groups fill the places for which no good one was found; they carry no loss.
        bad = [group for group in made if group.fate is not Fate.GOOD]
        chosen = [*good[:wanted], *bad][:wanted]
        used = {id(group) for group in (*chosen, *self._surplus)} | {id(group) for group in kept}
        return chosen, [*stale, *(group for group in made if id(group) not in used)]

    def _most(self, lack: int) -> int:
        """What the process lacks that lacks most; the same number everywhere. A collective."""
        mine = torch.tensor([max(0, lack)], device=self.trainer.accelerator.device)
        return int(self.trainer.accelerator.gather(mine).max())

    def _rows(self, count: int, batch: int, rounds: int) -> list[dict[str, Any]]:
        """Rows for a round, other ones on each process. They follow from seed, step and round alone: a resumed run
        draws the same ones."""
        dataset, accelerator = self.trainer.train_dataset, self.trainer.accelerator
        key = torch.tensor([self.args.seed, self.trainer.state.global_step, batch, rounds])
        generator = torch.Generator().manual_seed(int((key * torch.tensor([1, 1_000_003, 7_919, 101])).sum()))
        order = torch.randperm(len(dataset), generator=generator).tolist()
        first = accelerator.process_index * count
        return [dataset[order[(first + number) % len(order)]] for number in range(count)]

    def _fall_short(self, wanted: int, found: int, rounds: int) -> None:
        said = (
            f"After {rounds} rounds of generation a process has {min(found, wanted)} of {wanted} groups whose rewards "
            f"differ (here; another one may lack more)."
        )
        if self.args.dynamic_sampling_shortfall == "stop":
            raise SamplingShortfall(
                f"{said} dynamic_sampling_shortfall is stop. The data may be too easy or too hard for the policy: "
                f"look at groups/all_right and groups/all_wrong, raise dynamic_sampling_rounds, or set it to fewer."
            )
        logger.warning(f"{said} The step goes on with fewer groups, its loss normalised to them.")
