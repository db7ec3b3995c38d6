"""What can go wrong: a setting, the data, or something a run depends on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with the nearest of the known names, to append to a sentence; empty when none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class ConfigError(ValueError):
    """A setting that cannot work. The message says what was set, why it cannot work and what to do."""


class DataError(ValueError):
    """A data set, a row or a picture that cannot be used.

    ``reason`` is the message alone; ``row`` (0-based) and ``id`` say where, when that is known, and lead the message:
    ``row 17 (id 'x'): cannot read the image: ...``.
    """

    def __init__(self, reason: str, *, row: int | None = None, id: str | None = None) -> None:
        super().__init__(reason)  # only positional arguments here, so that the error survives pickling by a worker
        self.reason, self.row, self.id = reason, row, id

    def __str__(self) -> str:
        return where(self.row, self.id) + self.reason

    def at(self, row: int | None = None, id: str | None = None) -> DataError:
        """The same error with a place; a place that is known already is kept."""
        return DataError(self.reason, row=row if self.row is None else self.row, id=id if self.id is None else self.id)


def where(row: int | None, id: str | None) -> str:
    """``row 17 (id 'x'): ``, or as much of it as is known."""
    name = "" if id is None else f"id {id!r}"
    if row is None:
        return f"{name}: " if name else ""
    return f"row {row} ({name}): " if name else f"row {row}: "


class JudgeOutage(RuntimeError):
    """Too many verdicts could not be had. The message holds the share, the last error and what to do; never a key."""


class EngineOutage(RuntimeError):
    """The engine that samples turns cannot be reached or has given up. The message says where it is and what to do."""


class SamplingShortfall(RuntimeError):
    """Dynamic sampling did not find enough groups that teach something, and was told to stop then."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. The message names the last complete one and what to do."""


class StageFailed(RuntimeError):
    """A stage of a loop ended with an error. The message says which, why, and how to go on."""
