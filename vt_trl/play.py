"""Answer as the policy: a recipe's own environment and rewards, a person in place of the model, which is never loaded.

vt-trl play recipes/x.yaml --row 3
"""

from __future__ import annotations

import asyncio
import inspect
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vt_trl.config import VTGRPOConfig
from vt_trl.data import episode_row, load_rows
from vt_trl.dialogue import Dialogue
from vt_trl.envs import Environment, make_environment
from vt_trl.errors import ConfigError, DataError
from vt_trl.recipe import RunArguments, parse_recipe
from vt_trl.rewards import RewardFunction, make_rewards
from vt_trl.types import Done, ImagePart, Message, Observation, Rollout, Turn

HELP = (
    "You are the policy. Type a reply of one or more lines and end it with an empty line (a reply itself can hold "
    "none). End of input (Ctrl-D) leaves the session."
)
Ask, Show = Callable[[str], str], Callable[[str], Any]


def play(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    row: int = 0,
    folder: str | Path | None = None,
    ask: Ask = input,
    show: Show = print,
) -> dict[str, Any]:
    """Play one row of a recipe's data set by hand; returns what was shown at the end.

    Args:
        row: number of the row, from 0, in the order of the data set.
        folder: where pictures are saved as PNG; default: a new temporary folder, which is kept.
        ask: gives one line of the reply; raises EOFError to end the session, as ``input`` does.
        show: receives every text shown.

    Returns:
        ``finished``, ``pictures`` (paths) and ``turns`` (how many); and when the episode has ended ``status``,
        ``detail``, ``faults`` (a list per turn), ``answer``, ``gold``, ``parts`` and ``weights`` by reward name (a
        part is None when it could not be judged) and ``total`` (None then, too). The total is without a group
        penalty, which exists only between the rollouts of a group.

    Raises:
        ConfigError: for a recipe that cannot work or a row that is not there.
        DataError: for a data set or a row that cannot be used.
    """
    # Nothing is computed here: without this, bf16 in a recipe would be refused on a machine that cannot train it.
    run, args = parse_recipe(recipe, ["--use_cpu", "true", *overrides])
    environment = make_environment(args.environment, args.environment_args)()
    try:
        episode = _Episode(environment, _read_row(run, row, environment.max_pictures), folder, show)
    except DataError as error:
        raise error.at(row=row) from error
    show(HELP)
    rollout = episode.run(ask)
    result = {"finished": rollout is not None, "pictures": episode.pictures, "turns": len(episode.turns)}
    if rollout is None:
        show("\nThe session ended before the episode did; nothing is scored.")
        return result
    result |= _score(rollout, args)
    _show_end(result, show)
    return result


def _read_row(run: RunArguments, number: int, most_pictures: int) -> dict[str, Any]:
    rows = load_rows(run.dataset, run.dataset_split, run.max_rows)
    if not 0 <= number < len(rows):
        raise ConfigError(
            f"row is {number}, but {run.dataset!r} has {len(rows)} rows; give a number from 0 to {len(rows) - 1}."
        )
    return episode_row(rows[number], most_pictures)


class _Episode:
    """A dialogue with a person: what is said is shown, and pictures are saved."""

    def __init__(self, environment: Environment, row: dict[str, Any], folder: str | Path | None, show: Show):
        self.show = show
        self.folder = Path(folder or tempfile.mkdtemp(prefix="vt-trl-play-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pictures: list[Path] = []
        self.dialogue = Dialogue(environment, row)

    @property
    def turns(self) -> list[Turn]:
        return self.dialogue.turns

    def run(self, ask: Ask) -> Rollout | None:
        """Play to the end; None when the input ends first."""
        self._display(self.dialogue.messages)
        while (reply := _read_reply(ask)) is not None:
            outcome: Observation | Done = self.dialogue.say(reply)
            if isinstance(outcome, Done):
                return self.dialogue.rollout()
            if outcome.faults:
                self.show(f"\nFaults of this turn: {', '.join(outcome.faults)}")
            self._display(outcome.messages)
        return None

    def _display(self, messages: Sequence[Message]) -> None:
        for one in messages:
            self.show(f"\n--- {one.role} ---")
            for part in one.parts:
                self.show(self._save(part.image) if isinstance(part, ImagePart) else printable(part.text))

    def _save(self, image: Image.Image) -> str:
        path = self.folder / f"picture-{len(self.pictures) + 1}.png"
        image.save(path)
        self.pictures.append(path)
        return f"[picture {len(self.pictures)}: {image.width} x {image.height} px, saved as {path}]"


def _read_reply(ask: Ask) -> str | None:
    """Lines up to an empty one, or up to the end of input; None when the input ends before the first line."""
    lines: list[str] = []
    while True:
        try:
            line = ask("> ")
        except EOFError:
            return "\n".join(lines) if lines else None
        if line.strip():
            lines.append(line)
        elif lines:
            return "\n".join(lines)


def printable(text: str) -> str:
    """The text without control characters, with which a data set could command the terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def _score(rollout: Rollout, args: VTGRPOConfig) -> dict[str, Any]:
    rewards = dict(zip(args.rewards, make_rewards(args), strict=True))
    parts = {name: _call_reward(reward, rollout) for name, reward in rewards.items()}
    right = (parts[args.correctness_reward] or 0.0) > 0.5
    for name, reward in rewards.items():
        if getattr(reward, "only_when_right", False) and not right:
            parts[name] = 0.0
    weights = dict(zip(args.rewards, args.reward_weights, strict=True))
    known = None not in parts.values()
    return {
        "status": rollout.status.value,
        "detail": rollout.detail,
        "faults": [[fault.value for fault in turn.faults] for turn in rollout.turns],
        "answer": rollout.answer,
        "gold": rollout.row["answer"],
        "parts": parts,
        "weights": weights,
        "total": sum(weights[name] * score for name, score in parts.items()) if known else None,
    }


def _call_reward(reward: RewardFunction, rollout: Rollout) -> float | None:
    """One reward function with the arguments that TRL's trainer would give it; None: could not be judged."""
    reserved = ("prompt", "completion", "completion_ids")
    columns = {key: [value] for key, value in rollout.row.items() if key not in reserved}
    scores = reward(
        prompts=[[one.as_dict() for one in rollout.messages[: rollout.prompt_messages]]],
        completions=[[one.as_dict() for one in rollout.messages[rollout.prompt_messages :]]],
        completion_ids=[[]],
        rollout=[rollout],
        trainer_state=None,
        log_extra=_ignore,
        log_metric=_ignore,
        **columns,
    )
    score = asyncio.run(_wait(scores)) if inspect.isawaitable(scores) else scores
    return None if score[0] is None or math.isnan(score[0]) else float(score[0])


def _ignore(*_: Any, **__: Any) -> None:
    """Stands in for the trainer's logs."""


async def _wait(scores: Any) -> Any:
    return await scores


def _show_end(result: dict[str, Any], show: Show) -> None:
    show(f"\nStatus: {result['status']}" + (f" ({printable(result['detail'])})" if result["detail"] else ""))
    for number, faults in enumerate(result["faults"], start=1):
        show(f"Turn {number}: {', '.join(faults) or 'well-formed'}")
    for name, score in result["parts"].items():
        points = "could not be judged" if score is None else f"{score:g}"
        show(f"Reward {name}: {points} (weight {result['weights'][name]:g})")
    total = result["total"]
    total = "unknown, and in training the whole group would be dropped" if total is None else f"{total:g}"
    show(f"Total: {total} (no group penalty: a single rollout has no group to compare it with)")
    show(f"Answer: {'none' if result['answer'] is None else printable(result['answer'])}")
    show(f"Correct: {printable(' or '.join(result['gold']))}")
