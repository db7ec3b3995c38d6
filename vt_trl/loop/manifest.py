"""What is known of a loop, in ``FOLDER/loop.json``: replaced as a whole after every change, never half there."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vt_trl.errors import ConfigError
from vt_trl.redact import environment_secrets, names_secret, without_keys
from vt_trl.whole import write_whole

FILE = "loop.json"
FORMAT = {"format": "vt_trl loop", "version": 1}
RUNNING, DONE, FAILED, INTERRUPTED = "running", "done", "failed", "interrupted"


@dataclass
class Record:
    """One stage. ``fingerprint`` stands for ``inputs``; ``output`` for the content it left; ``seconds`` add up over
    ``starts``. ``token`` is in the environment of its processes, so that they can be found again."""

    status: str
    run: str
    out: str
    fingerprint: str
    inputs: dict[str, Any] = field(default_factory=dict)
    hub: dict[str, str | None] = field(default_factory=dict)
    seed: int | None = None
    round: int | None = None
    command: list[str] = field(default_factory=list)
    log: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    starts: int = 0
    started: str = ""
    ended: str = ""
    seconds: float = 0.0
    exit: int | None = None
    output: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    token: str = ""


@dataclass
class Manifest:
    """All stages that ever began, what was set aside, and the best round."""

    folder: Path
    recipe: str = ""
    stages: dict[str, Record] = field(default_factory=dict)
    aside: list[dict[str, str]] = field(default_factory=list)
    best: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder, an empty one where there is none. Raises ConfigError for one that is not ours."""
        path = folder / FILE
        if not path.is_file():
            return cls(folder)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if {name: values.get(name) for name in FORMAT} != FORMAT:
                raise ValueError("it is of another format")
            known = {one.name for one in fields(Record)}
            stages = {
                name: Record(**{key: item for key, item in one.items() if key in known})
                for name, one in values["stages"].items()
            }
            return cls(folder, values["recipe"], stages, values["aside"], values["best"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}). Restore it; or remove it, and every stage runs again, with what is "
                f"there set aside."
            ) from error

    def write(self) -> None:
        """Replace the file, without keys."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stages = {name: asdict(one) for name, one in self.stages.items()}
        values = {**FORMAT, "recipe": self.recipe, "best": self.best, "stages": stages, "aside": self.aside}
        write_whole(self.folder / FILE, json.dumps(without_secrets(values), indent=1, ensure_ascii=False) + "\n")

    def set_aside(self, out: Path, name: str, why: str, remove: bool = False) -> Path | None:
        """Move an output that no longer belongs to its stage to ``aside/``, or remove it; returns where it is."""
        if not out.exists():
            return None
        to = None
        if remove:
            shutil.rmtree(out)
        else:
            to = free_name(self.folder / "aside" / name)
            to.parent.mkdir(parents=True, exist_ok=True)
            os.rename(out, to)
        self.aside.append(
            {"stage": name, "to": str(to.relative_to(self.folder)) if to else "", "why": why, "at": now()}
        )
        self.write()
        return to


def free_name(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, ... that does not exist."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def without_secrets(value: Any, name: str = "") -> Any:
    """JSON values without anything that looks like a key: a second look, for recipes are checked before."""
    if isinstance(value, Mapping):
        return {key: without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if value and names_secret(name) and name != "token":  # a stage's own mark, which opens nothing
        return "***"
    return without_keys(value, environment_secrets())


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second driver out of the folder; a killed one leaves no lock. Raises ConfigError when one is there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{folder} is being worked on by another `vt-trl loop`; wait for it, or give this one another "
                f"--folder. `vt-trl loop RECIPE --status` shows how far it is."
            ) from error
        yield
