"""What a stage depends on, as hashes of content: when they are the same, a finished stage need not run again.

Counted are its settings, the stages whose output it takes (their own hash, and the content of what it takes), every
file and folder its settings name, the launch, and the seed. Not counted: Python code, of ours and of the user's
(``module:Class``), the versions of packages, and what a name on the Hub stands for today; they are noted, though.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vt_trl.loop.plan import Plan, Planned, places
from vt_trl.whole import write_whole

# Notes, logs and what only a resumed run needs: they hold times and places, or change while nothing that counts does.
_NOTES = {"README.md", "vt_trl_run.json", "vt_trl_files.json", "trainer_state.json", "training_args.bin"}
_FIGURES = {"metrics.json", "results.json"}
_FOLDERS = {"completions", "__pycache__", "runs"}
_HEADS = ("checkpoint-", ".")
CACHE = ".hashes.json"


class Hashes:
    """Hashes of files, remembered with size and time of change, so that a file of many GB is read once."""

    def __init__(self, folder: Path):
        self.path = folder / CACHE
        try:
            self.known: dict[str, list[Any]] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there yet, or not whole: then all files are read again
            self.known = {}

    def of(self, place: Path) -> str:
        """Of a file, or of a folder's files that count, by name and content; ``absent`` where there is nothing."""
        if place.is_file():
            return self._file(place)
        found = hashlib.sha256()
        files = list(files_of(place))
        for path in files:
            found.update(f"{path.relative_to(place)}\0{self._file(path)}\n".encode())
        return found.hexdigest() if files else "absent"

    def _file(self, path: Path) -> str:
        stat = path.stat()
        key, state = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        known = self.known.get(key)
        if known is None or known[:2] != state:
            with path.open("rb") as stream:
                known = [*state, hashlib.file_digest(stream, "sha256").hexdigest()]
            self.known[key] = known
        return known[2]

    def save(self) -> None:
        write_whole(self.path, json.dumps(self.known))


def files_of(folder: Path) -> Iterator[Path]:
    """The files of a folder that count, in order."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name not in _FOLDERS and not path.name.startswith(_HEADS):
                yield from files_of(path)
        elif path.name not in _NOTES | _FIGURES and not path.name.startswith("."):
            yield path


def inputs_of(one: Planned, plan: Plan, hashes: Hashes, best: int | None, prints: dict[str, str]) -> dict[str, Any]:
    """All that the output of a stage depends on, as JSON values. ``prints``: fingerprints of the stages before it."""
    settings, symbols = one.settings(best), one.settings(best, symbols=True)
    stages = plan.folder / "stages"
    found: dict[str, str] = {}
    for _, place in (*places({**settings, one.kind.output: None}), *places(one.launched())):
        path = Path(place).expanduser()
        if path.is_relative_to(stages):
            found[f"<{path.relative_to(stages)}>"] = hashes.of(path)
        elif path.exists():
            found[place] = hashes.of(path)
    return {
        "run": one.stage.run,
        "settings": symbols,
        "launch": one.launched(symbols=True),
        "env": one.stage.env,
        "files": found,
        "stages": {name: prints[name] for name in one.uses},
    }


def fingerprint(inputs: dict[str, Any]) -> str:
    """16 hex digits that stand for the inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]


def hub_names(one: Planned, best: int | None) -> dict[str, str | None]:
    """Names on the Hub among the places of a stage, with the commit that lies in the cache (None: none does)."""
    from huggingface_hub import constants

    found: dict[str, str | None] = {}
    for name, place in places({**one.settings(best), one.kind.output: None}):
        if name in ("model", "dataset", "eval_dataset", "data", "filter_model") and not Path(place).exists():
            for kind in ("models", "datasets"):
                reference = Path(constants.HF_HUB_CACHE) / f"{kind}--{place.replace('/', '--')}" / "refs" / "main"
                if reference.is_file():
                    found[place] = reference.read_text(encoding="utf-8").strip()
            found.setdefault(place, None)
    return found
