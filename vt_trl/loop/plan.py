"""From a loop's recipe to a flat list of stages, rounds unrolled, every reference and every option checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from vt_trl.errors import ConfigError, did_you_mean
from vt_trl.loop.recipe import LoopRecipe, Stage, read_loop
from vt_trl.loop.references import NONE, Reference, fill, references, resolve_values, value_of
from vt_trl.loop.stages import Kind, arguments, check_training, kind_of, launcher, processes, refuse_keys, seed_name
from vt_trl.yaml_file import read_yaml

_PLACES = {
    "model",
    "dataset",
    "eval_dataset",
    "data",
    "run",
    "source",
    "images",
    "filter_model",
    "reasoner",
    "captioner",
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TABLES = (".jsonl", ".json", ".csv", ".parquet", ".yaml", ".yml")


@dataclass(frozen=True)
class Planned:
    """A stage of the flat plan. ``id``: its name, in a round with the round in front (``r2.hard``).

    ``raw`` and ``launch`` still hold references; :meth:`settings` fills them. ``uses``: ids of the stages whose output
    it takes.
    """

    id: str
    stage: Stage
    kind: Kind
    round: int | None
    out: Path
    raw: dict[str, Any]
    launch: dict[str, Any]
    uses: tuple[str, ...]
    waits_for_best: bool
    resolve: Callable[[Reference, int | None, bool], Any] = field(compare=False, repr=False)

    def settings(self, best: int | None = None, symbols: bool = False) -> dict[str, Any]:
        """What the command is given. ``best``: the best round, where that is referred to.

        With ``symbols`` the outputs of stages are ``<id>``, so that nothing depends on where the folder lies.
        """
        filled = fill(self.raw, self._look_up(best, symbols), self.id)
        return filled if symbols else filled | {self.kind.output: str(self.out)}

    def launched(self, symbols: bool = False) -> dict[str, Any]:
        return fill(self.launch, self._look_up(None, symbols), f"{self.id}: launch")

    def _look_up(self, best: int | None, symbols: bool) -> Callable[[list[Reference], str], Any]:
        def look_up(alternatives: list[Reference], text: str) -> Any:
            for one in alternatives:
                found = self.resolve(one, best, symbols)
                if found is not None or one.name == NONE:
                    return found
            raise ConfigError(
                f"{self.id}: ${{{text}}} is nothing here; add an alternative, as in ${{{text} | x.out}}."
            )

        return look_up


@dataclass(frozen=True)
class Plan:
    """All stages in the order in which they run."""

    recipe: LoopRecipe
    stages: list[Planned]

    @property
    def folder(self) -> Path:
        return Path(self.recipe.folder)

    @cached_property
    def by_id(self) -> dict[str, Planned]:
        return {one.id: one for one in self.stages}

    def of_stage(self, name: str) -> list[Planned]:
        """A stage in all its rounds."""
        return [one for one in self.stages if one.stage.name == name]


def plan_loop(recipe: str | Path | LoopRecipe, overrides: Sequence[str] = (), check: bool = True) -> Plan:
    """Unroll a recipe. With ``check``, every command line and every setting of a trainer is checked, too.

    Raises ConfigError, which names the stage, for whatever could be known to go wrong before the first stage runs.
    """
    loop = recipe if isinstance(recipe, LoopRecipe) else read_loop(recipe, overrides)
    where = str(loop.path)
    known = {"seed": loop.seed, "folder": loop.folder, "rounds": loop.rounds}
    values = known | resolve_values(loop.values, known, where)
    names = _Names(loop, values)
    refuse_keys([loop.values, loop.launch, loop.defaults], where)
    runs = {one.run for one in loop.stages}
    for name in loop.defaults:
        if name not in runs:
            raise ConfigError(f"{where}: defaults has {name!r}, and no stage runs it.{did_you_mean(name, runs)}")
    planned = [_planned(loop, stage, number, names) for stage, number in _unrolled(loop)]
    if not planned:
        raise ConfigError(f"{where}: no stage runs in any round; look at in_rounds.")
    plan = Plan(loop, planned)
    for one in planned:
        one.settings(loop.rounds)  # raises for a reference that is nothing
        if check:
            check_stage(one, loop)
    return plan


def _unrolled(loop: LoopRecipe) -> Iterator[tuple[Stage, int | None]]:
    yield from ((one, None) for one in loop.before)
    for number in range(1, loop.rounds + 1):
        yield from ((one, number) for one in loop.block if one.runs_in(number, loop.rounds))
    yield from ((one, None) for one in loop.after)


def stage_id(name: str, number: int | None) -> str:
    return name if number is None else f"r{number}.{name}"


def _planned(loop: LoopRecipe, stage: Stage, number: int | None, names: _Names) -> Planned:
    where = f"{loop.path}: stage {stage.name!r}"
    kind = kind_of(stage.run, where)
    raw = _settings(loop, stage, number, kind, where)
    refuse_keys([raw, stage.launch, stage.env], where)
    refuse_keys(stage.env, where)
    launch = stage.launch if stage.launch is not None else (loop.launch if kind.trains else {})
    if launch and not kind.launches:
        raise ConfigError(f"{where}: it has `launch`, but {stage.run} runs in one process; remove it.")
    uses: list[str] = []
    best = False
    for alternatives in references([raw, launch], where):
        for one in alternatives:
            names.check(one, stage, number, where)
        found = next((one for one in alternatives if names.targets(one, number)), None)
        if found is not None and found.out:
            uses += [target for target in names.targets(found, number) if target not in uses]
            best |= found.scope == "best"
    return Planned(
        id=stage_id(stage.name, number),
        stage=stage,
        kind=kind,
        round=number,
        out=Path(loop.folder) / "stages" / stage_id(stage.name, number),
        raw=raw,
        launch=launch,
        uses=tuple(uses),
        waits_for_best=best,
        resolve=partial(names.value, number=number, where=where),
    )


def _settings(loop: LoopRecipe, stage: Stage, number: int | None, kind: Kind, where: str) -> dict[str, Any]:
    """Recipe, defaults of the kind, what the stage sets, and what the loop sees to."""
    if stage.recipe is not None and not kind.trains:
        raise ConfigError(f"{where}: recipe is for train and sft; give {stage.run} its options under `set`.")
    base = read_yaml(Path(stage.recipe)) if stage.recipe else {}
    given = base | loop.defaults.get(stage.run, {}) | stage.set
    ours = [name for name in (kind.output, "resume_from_checkpoint") if name in stage.set]
    if ours:
        raise ConfigError(f"{where}: {ours[0]} is the loop's to set; remove it, and write ${{{stage.name}.out}}.")
    if kind.trains:
        given |= {"output_dir": "", "resume_from_checkpoint": True}
    if "seed" not in given and seed_name(kind):
        given["seed"] = loop.seed + (number or 0)
    return given


class _Names:
    """What names in references stand for, in which round."""

    def __init__(self, loop: LoopRecipe, values: Mapping[str, Any]):
        self.loop, self.values = loop, values
        self.order = {one.name: number for number, one in enumerate(loop.stages)}
        self.block = {one.name: one for one in loop.block}

    def value(self, one: Reference, best: int | None, symbols: bool, *, number: int | None, where: str) -> Any:
        """The value of a reference; None for the output of a stage that does not run in that round."""
        if not one.out:
            return value_of(one, self.values, number, where)
        targets = self.targets(one, number)
        if one.scope == "best":
            targets = [stage_id(one.name, best)]
        if not targets:
            return None
        place = f"<{targets[-1]}>" if symbols else str(Path(self.loop.folder) / "stages" / targets[-1])
        return place + one.rest

    def targets(self, one: Reference, number: int | None) -> list[str]:
        """Ids of the stages whose output a reference may be; the last one is it. A value: its name."""
        if not one.out:
            return [one.name]
        if one.name not in self.block:
            return [one.name]
        ran = [n for n in range(1, self.loop.rounds + 1) if self.block[one.name].runs_in(n, self.loop.rounds)]
        if one.scope == "previous":
            ran = [n for n in ran if n == (number or 0) - 1]
        elif one.scope == "last":
            ran = ran[-1:]
        elif one.scope != "best":
            ran = [n for n in ran if n == number]
        found = [stage_id(one.name, n) for n in ran]
        if one.scope == "best" and self.loop.best:  # which round that is, its evaluations say
            judge = self.block[self.loop.best.stage]
            rounds = [n for n in range(1, self.loop.rounds + 1) if judge.runs_in(n, self.loop.rounds)]
            found = [stage_id(judge.name, n) for n in rounds] + found
        return found

    def check(self, one: Reference, stage: Stage, number: int | None, where: str) -> None:
        """Raise ConfigError for a reference to what does not exist, or not yet."""
        if not one.out:
            value_of(one, self.values, number, where)
            return
        if one.name not in self.order:
            raise ConfigError(f"{where}: ${{{one}}} names no stage.{did_you_mean(one.name, self.order)}")
        inside, target_inside = number is not None, one.name in self.block
        if one.scope and not target_inside:
            raise ConfigError(
                f"{where}: ${{{one}}}, but {one.name!r} stands outside the rounds: write ${{{one.name}.out}}."
            )
        if one.scope == "previous" and not inside:
            raise ConfigError(f"{where}: ${{{one}}} outside the rounds: write ${{last.{one.name}.out}}.")
        if one.scope in ("last", "best") and (inside or self.order[one.name] > self.order[stage.name]):
            raise ConfigError(
                f"{where}: ${{{one}}} is known after all rounds only; write ${{previous.{one.name}.out}}."
            )
        if one.scope == "best" and self.loop.best is None:
            raise ConfigError(f"{where}: ${{{one}}}, but the recipe has no `best` that says which round is the best.")
        if not one.scope and target_inside and not inside:
            raise ConfigError(
                f"{where}: ${{{one}}}, but {one.name!r} runs in every round: write ${{last.{one.name}.out}}"
                + (f" or ${{best.{one.name}.out}}." if self.loop.best else ".")
            )
        if one.scope != "previous" and self.order[one.name] >= self.order[stage.name]:
            self._refuse_later(one, stage, where)

    def _refuse_later(self, one: Reference, stage: Stage, where: str) -> None:
        path = self._path(one.name, stage.name, ())
        if path:
            raise ConfigError(f"{where}: stages wait for each other: {' -> '.join((stage.name, *path))}.")
        hint = f", or write ${{previous.{one.name}.out}}" if stage.name in self.block else ""
        raise ConfigError(f"{where}: ${{{one}}}, but {one.name!r} comes later; move it in front{hint}.")

    def _path(self, start: str, end: str, seen: tuple[str, ...]) -> tuple[str, ...]:
        """How a stage depends on another within a round; empty when it does not."""
        if start == end:
            return (start,)
        if start in seen:
            return ()
        stage = next(one for one in self.loop.stages if one.name == start)
        for alternatives in references([stage.set, self.loop.defaults.get(stage.run, {})], start):
            for one in alternatives:
                if one.out and one.scope != "previous" and one.name in self.order:
                    rest = self._path(one.name, end, (*seen, start))
                    if rest:
                        return (start, *rest)
        return ()


def check_stage(one: Planned, loop: LoopRecipe) -> None:
    """Every option and every setting of a stage, as its command would see them. Raises ConfigError."""
    where = f"{loop.path}: stage {one.id!r}"
    settings, launch = one.settings(loop.rounds), one.launched()
    launcher(launch, where)
    if one.kind.trains:
        check_training(one.kind, settings, processes(launch), where)
    else:
        arguments(one.kind.parser(), settings, where)
        _check_environment(settings, where)
    for name, place in places(settings):
        _check_place(name, place, Path(loop.folder), where)


def _check_environment(settings: Mapping[str, Any], where: str) -> None:
    name, given = settings.get("environment"), settings.get("environment_args")
    if isinstance(name, str) and not isinstance(given, str):
        from vt_trl.envs import make_environment

        try:
            make_environment(name, given)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error


def places(settings: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Settings that may name a file or a folder: those called so, and texts with a slash. ``NAME=PLACE`` is split."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from places(value, str(key))
    elif isinstance(settings, list):
        for value in settings:
            yield from places(value, name)
    elif isinstance(settings, str) and settings and len(settings) < 1024 and "\n" not in settings:
        place = settings
        if "=" in settings and not Path(settings).exists():
            place = settings.partition("=")[2]
        if name in _PLACES or "/" in place:
            yield name, place


def _check_place(name: str, place: str, folder: Path, where: str) -> None:
    """Raise ConfigError for a file or folder that is not there and cannot be a name on the Hub either."""
    path = Path(place).expanduser()
    if name not in _PLACES or path.exists() or path.is_relative_to(folder) or ":" in place:
        return
    if not _HUB_NAME.fullmatch(place) or place.startswith(".") or path.suffix in _TABLES:
        raise ConfigError(f"{where}: {name} is {place!r}, and there is no such file or folder.")
