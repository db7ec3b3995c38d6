"""A loop's recipe: its stages, in order, one block of which may be repeated in rounds. Read and checked here."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from vt_trl.errors import ConfigError, did_you_mean
from vt_trl.yaml_file import read_yaml

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED = {
    "none",
    "previous",
    "last",
    "best",
    "values",
    "defaults",
    "launch",
    "rounds",
    "round",
    "seed",
    "folder",
    "env",
}
WHEN = ("first", "later", "last", "not_last")


@dataclass(frozen=True)
class Stage:
    """One entry of ``stages``.

    ``run``: ``train``, ``sft``, ``prepare STEP``, another command with an ``--out``, or ``module NAME``. ``recipe``: a
    YAML that ``set`` overrides, for train and sft. ``in_rounds``: numbers, or one of WHEN; None: all. ``launch``:
    options of ``accelerate launch``, in place of the recipe's; ``{}``: a plain process. ``resumes``: for a module,
    that it goes on by itself with what a killed run left in its folder.
    """

    name: str
    run: str
    recipe: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    in_rounds: list[int] | str | None = None
    launch: dict[str, Any] | None = None
    env: dict[str, str] = field(default_factory=dict)
    resumes: bool = False

    def runs_in(self, number: int, rounds: int) -> bool:
        """Whether the stage belongs to a round (from 1)."""
        if isinstance(self.in_rounds, list):
            return number in self.in_rounds
        last = number == rounds
        return {"first": number == 1, "later": number > 1, "last": last, "not_last": not last}.get(
            self.in_rounds, True
        )


@dataclass(frozen=True)
class Best:
    """Which round is the best: by a metric of an evaluating stage. ``of``: the stage whose output it judges."""

    stage: str
    of: str
    metric: str = "accuracy"
    lower: bool = False


@dataclass(frozen=True)
class LoopRecipe:
    """A whole recipe. ``before`` and ``after`` run once, ``block`` once per round."""

    path: Path
    folder: str
    before: list[Stage]
    block: list[Stage]
    after: list[Stage]
    rounds: int = 1
    seed: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    launch: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)
    best: Best | None = None

    @property
    def stages(self) -> list[Stage]:
        return [*self.before, *self.block, *self.after]


_KEYS = ("folder", "seed", "values", "launch", "defaults", "stages", "best")


def is_loop(settings: Mapping[str, Any]) -> bool:
    """Whether a YAML is a loop's recipe and not that of one run."""
    return isinstance(settings.get("stages"), list) or "extends" in settings


def read_extended(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML over the one that it ``extends``, a path from its own folder: values, launch and defaults are joined line
    by line, anything else is replaced."""
    given = read_yaml(path)
    below = given.pop("extends", None)
    if below is None:
        return given
    if not isinstance(below, str) or path.resolve() in seen:
        raise ConfigError(
            f"{path}: extends is {below!r}; it is the path of another recipe, which does not extend this."
        )
    found = read_extended(path.parent / below, (*seen, path.resolve()))
    for name, value in given.items():
        below = found.get(name)
        if name == "defaults" and isinstance(value, Mapping) and isinstance(below, Mapping):
            value = {**below, **{kind: {**(below.get(kind) or {}), **(one or {})} for kind, one in value.items()}}
        elif name in ("values", "launch") and isinstance(value, Mapping) and isinstance(below, Mapping):
            value = {**below, **value}
        found[name] = value
    return found


def read_loop(path: str | Path, overrides: Sequence[str] = ()) -> LoopRecipe:
    """Read a recipe and apply ``--key value`` overrides (see :func:`apply_overrides`).

    Raises ConfigError for keys that do not exist (with the nearest), for values of the wrong kind, for names that
    occur twice, and for a file that is no loop's recipe.
    """
    path = Path(path)
    given = read_extended(path)
    if not is_loop(given):
        raise ConfigError(
            f"{path} has no list of `stages`, so it is no recipe of a loop. One run's recipe is for `vt-trl train` or "
            f"`vt-trl sft`; docs/loop.md says how a loop's is written."
        )
    _check_keys(given, _KEYS, str(path))
    given = apply_overrides(given, overrides, str(path))
    before, block, after, rounds = _stages(given["stages"], str(path))
    recipe = LoopRecipe(
        path=path,
        folder=_text(given, "folder", str(path)),
        before=before,
        block=block,
        after=after,
        rounds=rounds,
        seed=_whole(given.get("seed", 0), "seed", 0, str(path)),
        values=_mapping(given.get("values"), "values", str(path)),
        launch=_mapping(given.get("launch"), "launch", str(path)),
        defaults={
            name: _mapping(one, f"defaults.{name}", str(path))
            for name, one in _mapping(given.get("defaults"), "defaults", str(path)).items()
        },
        best=_best(given.get("best"), block, str(path)),
    )
    _check_names(recipe)
    return recipe


def apply_overrides(given: dict[str, Any], overrides: Sequence[str], where: str) -> dict[str, Any]:
    """The settings with ``--key value`` put in their place; values are read as YAML, several words as a list.

    ``--folder X``, ``--rounds N``, ``--seed N``; ``--NAME VALUE`` of ``values`` (or ``--values.NAME``);
    ``--STAGE.OPTION VALUE``; ``--defaults.KIND.OPTION VALUE``; ``--launch.OPTION VALUE``.
    """
    given = copy.deepcopy(given)
    stages = {one.get("name"): one for one in _flat(given["stages"]) if isinstance(one, Mapping)}
    for name, value in _pairs(overrides):
        head, _, rest = name.partition(".")
        if name == "rounds":
            _block_of(given, where)["rounds"] = value
        elif name in ("folder", "seed"):
            given[name] = value
        elif head in ("values", "launch") and rest:
            given[head] = {**(given.get(head) or {}), rest: value}
        elif head == "defaults" and rest.partition(".")[2]:
            kind, _, option = rest.partition(".")
            given["defaults"] = given.get("defaults") or {}
            given["defaults"][kind] = {**(given["defaults"].get(kind) or {}), option: value}
        elif head in stages and rest:
            stages[head]["set"] = {**(stages[head].get("set") or {}), rest: value}
        elif not rest and name in (given.get("values") or {}):
            given["values"][name] = value
        else:
            known = ["rounds", "folder", "seed", *(given.get("values") or {})]
            hint = did_you_mean(head, stages) if rest else did_you_mean(name, known)
            raise ConfigError(
                f"{where}: --{name} is no setting of this loop.{hint} Write --STAGE.OPTION VALUE (stages: "
                f"{', '.join(map(str, stages))}), or one of {', '.join(f'--{one}' for one in known)}."
            )
    return given


def _pairs(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """``--key value ...`` or ``--key=value`` as names and values."""
    found: list[tuple[str, list[str]]] = []
    for word in overrides:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise ConfigError(f"The command line has {word!r} left over. Write overrides as `--key value`.")
    lone = next((name for name, words in found if not words), None)
    if lone is not None:
        raise ConfigError(f"--{lone} has no value. Write overrides as `--key value`.")
    try:
        read = [(name, [yaml.safe_load(word) for word in words]) for name, words in found]
    except yaml.YAMLError as error:
        raise ConfigError(f"A value on the command line is no YAML: {error}") from error
    return [(name, values[0] if len(values) == 1 else values) for name, values in read]


def _flat(entries: Sequence[Any]) -> list[Any]:
    return [
        inner
        for one in entries
        for inner in (one.get("stages") or [] if isinstance(one, Mapping) and "stages" in one else [one])
    ]


def _block_of(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = [one for one in given["stages"] if isinstance(one, Mapping) and "stages" in one]
    if not found:
        raise ConfigError(f"{where}: --rounds is set, but no stages are repeated; there is no `rounds` in it.")
    return found[0]


def _stages(entries: list[Any], where: str) -> tuple[list[Stage], list[Stage], list[Stage], int]:
    """What runs once before, in every round, and once after, and the number of rounds."""
    before: list[Stage] = []
    block: list[Stage] = []
    after: list[Stage] = []
    rounds, seen = 1, False
    for entry in entries:
        if isinstance(entry, Mapping) and "stages" in entry:
            if seen:
                raise ConfigError(f"{where}: stages has two blocks with rounds; one is what a loop has.")
            _check_keys(entry, ("rounds", "stages"), f"{where}: the block of rounds")
            rounds, seen = _whole(entry.get("rounds", 1), "rounds", 1, where), True
            block = [_stage(one, where) for one in entry["stages"] or []]
        else:
            (after if seen else before).append(_stage(entry, where))
    if not before and not block and not after:
        raise ConfigError(f"{where}: stages is empty, so there is nothing to run.")
    for one in (*before, *after):
        if one.in_rounds is not None:
            raise ConfigError(f"{where}: stage {one.name!r} has in_rounds, but it stands outside the rounds.")
    return before, block, after, rounds


def _stage(entry: Any, where: str) -> Stage:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: stages holds {entry!r}, which is no stage; a stage has a name and `run`.")
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _RESERVED:
        raise ConfigError(
            f"{where}: a stage is called {name!r}. A name is of small letters, digits and _, begins with a letter, "
            f"and is none of {', '.join(sorted(_RESERVED))}."
        )
    place = f"{where}: stage {name!r}"
    _check_keys(entry, tuple(one.name for one in fields(Stage)), place)
    in_rounds = entry.get("in_rounds")
    numbers = isinstance(in_rounds, list) and all(isinstance(one, int) and one >= 1 for one in in_rounds)
    if in_rounds is not None and not numbers and in_rounds not in WHEN:
        raise ConfigError(
            f"{place}: in_rounds is {in_rounds!r}.{did_you_mean(in_rounds, WHEN)} Use a list of rounds from 1, or "
            f"{', '.join(WHEN)}."
        )
    recipe = entry.get("recipe")
    if recipe is not None and not isinstance(recipe, str):
        raise ConfigError(f"{place}: recipe is {recipe!r}; it is the path of a YAML.")
    launch = entry.get("launch")
    env = _mapping(entry.get("env"), "env", place)
    return Stage(
        name=name,
        run=" ".join(_text(entry, "run", place).split()),
        recipe=recipe,
        set=_mapping(entry.get("set"), "set", place),
        in_rounds=in_rounds,
        launch=None if launch is None else _mapping(launch, "launch", place),
        env={key: str(value) for key, value in env.items()},
        resumes=bool(entry.get("resumes", False)),
    )


def _best(given: Any, block: Sequence[Stage], where: str) -> Best | None:
    if given is None:
        return None
    entry = _mapping(given, "best", where)
    _check_keys(entry, tuple(one.name for one in fields(Best)), f"{where}: best")
    names = [one.name for one in block]
    for key in ("stage", "of"):
        if entry.get(key) not in names:
            raise ConfigError(
                f"{where}: best.{key} is {entry.get(key)!r}, which is no stage of the rounds."
                f"{did_you_mean(entry.get(key), names)} Use one of {', '.join(names) or 'none: there are no rounds'}."
            )
    return Best(**entry)


def _check_names(recipe: LoopRecipe) -> None:
    names = [one.name for one in recipe.stages]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{recipe.path}: two stages are called {', '.join(twice)}; give each a name of its own.")
    both = sorted({*names} & {*recipe.values})
    if both:
        raise ConfigError(f"{recipe.path}: {', '.join(both)} is a stage and a value; rename one.")


def _check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known)
            raise ConfigError(f"{where}: {key!r} is unknown.{hint} Use {', '.join(known)}.")


def _mapping(value: Any, name: str, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where}: {name} is {value!r}; write it as `name: value` lines.")
    return dict(value)


def _text(given: Mapping[str, Any], name: str, where: str) -> str:
    value = given.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: {name} is {value!r}; it has to be a text.")
    return value


def _whole(value: Any, name: str, least: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{where}: {name} is {value!r}; it is a whole number from {least}.")
    return value
