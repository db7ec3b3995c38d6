"""The one multi-turn loop: rows in, finished rollouts out. Training, evaluation, demo and play all use it.

A row is reset once and its pictures are prepared once; each member of the group is a fork. A member's next turn is
submitted as soon as its own turn has ended, so a backend that can interleave never waits for the slowest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from vt_trl.chat import ChatEncoder, Encoded
from vt_trl.envs.base import Environment, check_pictures, message
from vt_trl.errors import DataError
from vt_trl.generation.base import Backend, Request, Sample, SamplingSettings
from vt_trl.generation.tensor_parallel import EngineGroup
from vt_trl.types import Done, Fault, Message, Observation, Region, Rollout, RolloutStatus, Turn


@dataclass(frozen=True)
class Limits:
    """Token limits: sampled tokens of one turn, tokens of a completion (tool text and images too), and the context.

    ``sampled``: tokens of all turns together, tool text and images not counted.
    """

    turn: int
    completion: int
    context: int | None = None
    sampled: int | None = None


@dataclass(frozen=True)
class Step:
    """A turn that has just ended, of the ``index``-th rollout.

    ``shown``: what the environment answered, empty at the end; ``rollout``: the whole of it, once it has ended.
    """

    index: int
    turn: Turn
    shown: tuple[Message, ...]
    rollout: Rollout | None


@dataclass
class Episode:
    """An episode under way: what has been said so far, as tokens and as messages."""

    environment: Environment
    row: dict[str, Any]
    member: int  # of its group, from 0
    prompt: Encoded
    messages: list[Message]
    prompt_messages: int
    images: list[Image.Image]
    limits: Limits
    completion_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    visual_tokens: int = 0
    asked: bool = False
    attempted: bool = False
    regions: list[Region] = field(default_factory=list)
    parts: dict[int, Region] = field(default_factory=dict)
    spoken: tuple[int, ...] = ()  # tokens of the turn under way

    def sampled(self, sample: Sample) -> None:
        self.spoken += sample.token_ids
        self.completion_ids += sample.token_ids
        self.loss_mask += [1] * len(sample.token_ids)
        self.logprobs += sample.logprobs

    def end_turn(self, text: str, finished: bool) -> None:
        ids, self.spoken = self.spoken, ()
        self.turns.append(Turn(text, ids, tuple(self.logprobs[len(self.logprobs) - len(ids) :]), finished))
        self.messages.append(message("assistant", text))

    def blame(self, faults: tuple[Fault, ...]) -> None:
        self.turns[-1] = replace(self.turns[-1], faults=faults)

    def told(self, reply: Encoded) -> None:
        self.completion_ids += reply.token_ids
        self.loss_mask += [0] * len(reply.token_ids)
        self.logprobs += [0.0] * len(reply.token_ids)
        self.images += reply.images
        self.visual_tokens += reply.visual_tokens


class RolloutRunner:
    """Runs episodes of one environment on one backend.

    ``encoder`` turns messages into ids; ``stop_ids`` are the tokens that end a turn. Raises ``DataError`` for a row
    that cannot start (unreadable picture, prompt longer than the context), naming the row.
    """

    def __init__(
        self,
        environment: Callable[[], Environment],
        backend: Backend,
        encoder: ChatEncoder,
        stop_ids: Iterable[int],
        limits: Limits,
    ):
        self.environment = environment
        self.backend = backend
        self.group: EngineGroup = getattr(backend, "group", EngineGroup())
        self.encoder = encoder
        self.stop_ids = set(stop_ids)
        self.limits = limits

    def run(
        self,
        rows: Sequence[dict[str, Any]],
        group_size: int,
        settings: SamplingSettings,
        on_finished: Callable[[Rollout], Any] = lambda rollout: None,
        on_refused: Callable[[dict[str, Any], DataError], Any] | None = None,
    ) -> list[Rollout]:
        """``group_size`` rollouts of each row, those of a row side by side: ``len(rows) * group_size`` in all.

        ``on_finished`` is called with each rollout as soon as it ends, in no particular order, while others still run.
        ``on_refused`` is called with each row that cannot start and why; such a row has no rollouts then. Without it
        the error is raised. Processes that share an engine play the rows of all in step, and each gets its own.
        """
        everyone, own = self.group.share(rows)
        started = [self._start_or_refuse(row, group_size, on_refused) for row in everyone]
        episodes = [episode for members in started for episode in members]
        first = sum(map(len, started[: own.start]))
        mine = range(first, first + sum(map(len, started[own])))
        finished: dict[int, Rollout] = {}
        with closing(self._steps(episodes, settings)) as steps:
            for step in steps:
                if step.rollout is not None and step.index in mine:
                    finished[step.index] = step.rollout
                    on_finished(step.rollout)
        return [finished[index] for index in mine]

    def steps(self, rows: Sequence[dict[str, Any]], settings: SamplingSettings) -> Iterator[Step]:
        """Every turn of one rollout per row as it ends. Close the iterator to give the rest up."""
        return self._steps([self._start(row, 1)[0] for row in rows], settings)

    def watch(self, row: dict[str, Any], settings: SamplingSettings) -> Iterator[Rollout]:
        """One rollout as it goes on: first its opening, then all of it after each turn; only the last has a status.

        Close the iterator to give the rest up.
        """
        [episode] = self._start(row, 1)
        yield self._record(episode)
        with closing(self._steps([episode], settings)) as steps:
            for step in steps:
                yield step.rollout or self._record(episode)

    def _steps(self, episodes: Sequence[Episode], settings: SamplingSettings) -> Iterator[Step]:
        left = set(range(len(episodes)))
        self.backend.begin(settings)
        try:
            for index, episode in enumerate(episodes):
                self._submit(index, episode, settings.seed)
            for sample in self.backend.completed():
                index = sample.request_id
                episode = episodes[index]
                if self._goes_on(episode, sample):
                    self._submit(index, episode, settings.seed)
                    continue
                said = len(episode.messages) + 1
                done = self._advance(episode, sample)
                if done is None:
                    self._submit(index, episode, settings.seed)
                    yield Step(index, episode.turns[-1], tuple(episode.messages[said:]), None)
                else:
                    left.remove(index)
                    yield Step(index, episode.turns[-1], (), self._record(episode, done))
        finally:
            self.backend.end()
        if left:
            raise RuntimeError(f"The backend ended with {len(left)} of {len(episodes)} rollouts unfinished.")

    def _start_or_refuse(
        self,
        row: dict[str, Any],
        group_size: int,
        on_refused: Callable[[dict[str, Any], DataError], Any] | None,
    ) -> list[Episode]:
        try:
            return self._start(row, group_size)
        except DataError as error:
            if on_refused is None:
                raise
            on_refused(row, error)
            return []

    def _start(self, row: dict[str, Any], group_size: int, limits: Limits | None = None) -> list[Episode]:
        first = self.environment()
        check_pictures(first, row)
        observation = first.reset(row)
        messages = list(observation.messages)
        prompt = self.encoder.prompt(messages)
        room = None if self.limits.context is None else self.limits.context - len(prompt.token_ids)
        if room is not None and room < 1:
            raise DataError(
                f"row id {row.get('id')!r}: the prompt has {len(prompt.token_ids)} tokens "
                f"({prompt.visual_tokens} of them visual), which leaves nothing of the context of "
                f"{self.limits.context}; raise vllm_max_model_length or lower max_pixels in environment_args."
            )
        return [
            Episode(
                first.fork(),
                row,
                member,
                prompt,
                list(messages),
                len(messages),
                list(prompt.images),
                limits or self.limits,
                visual_tokens=prompt.visual_tokens,
                asked=observation.granted,
                attempted=observation.called,
            )
            for member in range(group_size)
        ]

    @staticmethod
    def _room(episode: Episode) -> int:
        """Tokens that still fit into the completion and the context, sampled or told."""
        used, limits = len(episode.completion_ids), episode.limits
        room = limits.completion - used
        if limits.context is not None:
            room = min(room, limits.context - len(episode.prompt.token_ids) - used)
        return room

    @staticmethod
    def _unsampled(episode: Episode) -> int:
        """Tokens that the turn may still sample, when there is room for them."""
        limits, turn = episode.limits, episode.limits.turn - len(episode.spoken)
        return turn if limits.sampled is None else min(turn, limits.sampled - sum(episode.loss_mask))

    def _submit(self, index: int, episode: Episode, seed: int | None) -> None:
        room = min(self._unsampled(episode), self._room(episode))
        ids = (*episode.prompt.token_ids, *episode.completion_ids)
        own_seed = None if seed is None else turn_seed(seed, episode.row.get("id"), episode.member, ids)
        stop = episode.environment.stop_texts
        self.backend.submit(Request(index, ids, tuple(episode.images), room, own_seed, stop))

    def _goes_on(self, episode: Episode, sample: Sample) -> bool:
        """Take in what was sampled; True when a stop text came where no turn ends, and there is room to go on."""
        episode.sampled(sample)
        if not self._stopped_early(episode, sample):
            return False
        return min(self._unsampled(episode), self._room(episode)) > 0

    def _stopped_early(self, episode: Episode, sample: Sample) -> bool:
        if not sample.finished or not episode.environment.stop_texts or sample.token_ids[-1] in self.stop_ids:
            return False
        return episode.environment.goes_on(self.encoder.decode(episode.spoken, self.stop_ids))

    def _advance(self, episode: Episode, sample: Sample) -> Done | None:
        """Hand a sampled turn to the environment; None when the episode goes on."""
        finished = sample.finished and not self._stopped_early(episode, sample)
        text = self.encoder.decode(episode.spoken, self.stop_ids)
        episode.end_turn(text, finished)
        outcome: Observation | Done = episode.environment.step(text, truncated=not finished)
        episode.blame(outcome.faults)
        episode.attempted = episode.attempted or outcome.called
        if isinstance(outcome, Done):
            return outcome
        if self._unsampled(episode) < 1:
            return Done(RolloutStatus.CONTEXT_LIMIT, faults=outcome.faults, detail="no token is left for another turn")
        reply = self.encoder.reply(outcome.messages)
        if len(reply.token_ids) >= self._room(episode):
            return Done(
                RolloutStatus.CONTEXT_LIMIT,
                faults=outcome.faults,
                detail=f"the tool's reply has {len(reply.token_ids)} tokens; raise max_completion_length",
            )
        episode.parts |= outcome.parts(len(episode.images))
        episode.told(reply)
        episode.messages += outcome.messages
        episode.asked = episode.asked or outcome.granted
        episode.regions += outcome.regions
        return None

    @staticmethod
    def _record(episode: Episode, done: Done | None = None) -> Rollout:
        """What an episode holds by now; nothing that happens to it later changes the record."""
        return Rollout(
            row=episode.row,
            prompt_ids=list(episode.prompt.token_ids),
            completion_ids=list(episode.completion_ids),
            loss_mask=list(episode.loss_mask),
            logprobs=list(episode.logprobs),
            images=list(episode.images),
            messages=list(episode.messages),
            prompt_messages=episode.prompt_messages,
            turns=list(episode.turns),
            status=None if done is None else done.status,
            answer=None if done is None else done.answer,
            asked=episode.asked,
            attempted=episode.attempted,
            detail="" if done is None else done.detail,
            visual_tokens=episode.visual_tokens,
            regions=list(episode.regions),
            parts=dict(episode.parts),
        )


def turn_seed(seed: int, row_id: Any, member: int, token_ids: Sequence[int]) -> int:
    """The seed of one turn (63 bits): another one for another row, member of its group, or context, and no other."""
    digest = hashlib.blake2b(repr((seed, row_id, member, tuple(token_ids))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
