"""What environments with a tool have in common: counting turns, refusing calls, and how each kind of reply ends."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from vt_trl.envs.base import Environment, user
from vt_trl.envs.reply import Reply, ToolCall, parse_reply
from vt_trl.prompts import Prompts
from vt_trl.types import Done, Fault, Message, Observation, RolloutStatus


def end_of(parsed: Reply) -> Done:
    """The end of an episode whose last reply did not call a tool."""
    status = RolloutStatus.NO_ANSWER if parsed.answer is None else RolloutStatus.ANSWERED
    return Done(status, answer=parsed.answer, faults=parsed.faults)


class TurnsEnv(Environment):
    """Some turns, each a call or the answer. A call that cannot be run is explained and costs its turn.

    A subclass sets ``turn`` to 0 in ``reset``, says what a call asks for (:meth:`resolve`) and shows it
    (:meth:`grant`).
    """

    prompts: Prompts
    turn: int = 0

    @abstractmethod
    def resolve(self, call: ToolCall) -> tuple[Any, tuple[Fault, ...]]:
        """What a readable call asks for, None where it cannot be run, and what is wrong with it."""

    @abstractmethod
    def grant(self, wanted: Any, faults: tuple[Fault, ...]) -> Observation:
        """Show what :meth:`resolve` found."""

    def parse(self, reply: str) -> Reply:
        return parse_reply(reply)

    def refuse(self, faults: tuple[Fault, ...]) -> Message:
        return user(self.prompts.refusal(faults))

    def step(self, reply: str, truncated: bool = False) -> Observation | Done:
        self.turn += 1
        if truncated:
            return Done(RolloutStatus.TRUNCATED, faults=(Fault.TRUNCATED,))
        parsed = self.parse(reply)
        return self._call(parsed) if parsed.wants_call else end_of(parsed)

    def _call(self, parsed: Reply) -> Observation | Done:
        wanted, bad = (None, ()) if parsed.call is None else self.resolve(parsed.call)
        faults = parsed.faults + bad
        last = self.turn >= self.max_turns
        if wanted is None and not last:
            return Observation((self.refuse(faults),), faults, called=True)
        if wanted is None:
            return Done(RolloutStatus.MALFORMED_CALL, faults=faults, called=True)
        if last:
            return Done(RolloutStatus.TURN_LIMIT, faults=faults, called=True)
        return self.grant(wanted, faults)
