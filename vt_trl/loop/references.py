"""``${...}`` in a loop's recipe: a value, the round, or what another stage has made. Looked up, never evaluated.

    ${base}                 a name under `values`; a list gives each round its own: ${rows[round]}
    ${round} ${rounds} ${seed} ${folder}
    ${sft.out}              the output folder of a stage: of this round, or of one outside the rounds
    ${previous.hard.out}    of the same stage one round earlier
    ${last.hard.out}        of the last round that has the stage
    ${best.hard.out}        of the best round, which is known when the evaluations are done
    ${previous.write.out | seeds.out/rows}    the first that exists: in round 1 there is no previous one
    ${previous.bands.out | none}    nothing at all, which leaves an option out
    $${                     the two characters ${

A reference alone keeps its type (a number stays one); within a text it becomes a part of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vt_trl.errors import ConfigError, did_you_mean

SCOPES = ("previous", "last", "best")
NONE = "none"
_REFERENCE = re.compile(r"\$\$\{|\$\{([^{}]*)\}")
_ONE = re.compile(
    r"(?:(?P<scope>[a-z]+)\.)??(?P<name>[A-Za-z]\w*)(?:(?P<out>\.out)(?P<rest>(?:/\w[\w.-]*)*))?(?P<index>\[round\])?"
)


@dataclass(frozen=True)
class Reference:
    """One alternative inside ``${...}``. ``scope``: previous, last, best or empty; ``out``: of a stage."""

    name: str
    scope: str = ""
    out: bool = False
    by_round: bool = False
    rest: str = ""  # a path inside the output

    def __str__(self) -> str:
        scope = f"{self.scope}." if self.scope else ""
        return f"{scope}{self.name}{'.out' if self.out else ''}{self.rest}{'[round]' if self.by_round else ''}"


def parse(text: str, where: str) -> list[Reference]:
    """The alternatives between ``${`` and ``}``. Raises ConfigError for what is no reference."""
    found = []
    for part in text.split("|"):
        match = _ONE.fullmatch(part.strip())
        if match is None or (match["scope"] and (match["scope"] not in SCOPES or not match["out"])):
            scope = match["scope"] if match else ""
            hint = did_you_mean(scope, SCOPES) if scope and match["out"] else ""
            raise ConfigError(
                f"{where}: ${{{text}}} is no reference.{hint} Write ${{name}} for a value, ${{stage.out}} for what a "
                f"stage made, or ${{previous.stage.out | other.out}}."
            )
        out, by_round, rest = bool(match["out"]), bool(match["index"]), match["rest"] or ""
        found.append(Reference(match["name"], match["scope"] or "", out, by_round, rest))
    return found


def references(value: Any, where: str) -> Iterator[list[Reference]]:
    """The alternatives of every ``${...}`` in a setting, however deep."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from references(item, where)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references(item, where)
    elif isinstance(value, str):
        for match in _REFERENCE.finditer(value):
            if match[1] is not None:
                yield parse(match[1], where)


def fill(value: Any, look_up: Callable[[list[Reference], str], Any], where: str) -> Any:
    """A setting with every ``${...}`` replaced by what ``look_up(alternatives, text)`` gives for it."""
    if isinstance(value, Mapping):
        return {key: fill(item, look_up, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [fill(item, look_up, where) for item in value]
    if not isinstance(value, str):
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole is not None and whole[1] is not None:
        return look_up(parse(whole[1], where), whole[1])

    def part(match: re.Match[str]) -> str:
        if match[1] is None:
            return "${"
        found = look_up(parse(match[1], where), match[1])
        if isinstance(found, Mapping | list):
            raise ConfigError(
                f"{where}: {match[0]} is {found!r}, which cannot be a part of the text {value!r}; write it alone."
            )
        return str(found)

    return _REFERENCE.sub(part, value)


def resolve_values(values: Mapping[str, Any], known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``values`` whose references to each other, and to ``known``, are filled. Raises ConfigError for a cycle.

    References to the round stay for later: see :func:`value_of`.
    """
    done: dict[str, Any] = {}

    def resolved(name: str, path: tuple[str, ...]) -> Any:
        if name in path:
            raise ConfigError(f"{where}: values refer to each other in a cycle: {' -> '.join((*path, name))}.")
        if name not in done:

            def look_up(alternatives: list[Reference], text: str) -> Any:
                (one,) = alternatives if len(alternatives) == 1 else (Reference(text, out=True),)
                if one.out or one.by_round or one.name == "round":
                    raise ConfigError(
                        f"{where}: values.{name} has ${{{text}}}; values are the same in all rounds and know no "
                        f"stage. Write it where it is used."
                    )
                if one.name in values:
                    return resolved(one.name, (*path, name))
                return value_of(one, known, None, f"{where}: values.{name}")

            done[name] = fill(values[name], look_up, f"{where}: values.{name}")
        return done[name]

    return {name: resolved(name, ()) for name in values}


def value_of(one: Reference, values: Mapping[str, Any], round_number: int | None, where: str) -> Any:
    """What a name that is no stage stands for. Raises ConfigError for an unknown one, with the nearest."""
    if one.name == NONE:
        return None
    if one.name == "round" and round_number is None:
        raise ConfigError(f"{where}: ${{round}} is used outside the rounds, where it is no number.")
    if one.name == "round":
        return round_number
    if one.name not in values:
        hint = did_you_mean(one.name, [*values, "round"])
        raise ConfigError(f"{where}: ${{{one}}} names no value.{hint} For what a stage made, write ${{{one}.out}}.")
    value = values[one.name]
    if value is None:
        raise ConfigError(f"{where}: ${{{one}}} is not set; write values.{one.name}, or add --{one.name} VALUE.")
    if not one.by_round:
        return value
    if not isinstance(value, list) or not value or round_number is None:
        raise ConfigError(f"{where}: ${{{one}}} needs a list under values.{one.name}, and a round; it is {value!r}.")
    return value[min(round_number, len(value)) - 1]  # the last one is for all later rounds, too
