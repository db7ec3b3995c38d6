"""Work that survives a kill: one file per finished piece, and the settings it was done with next to it.

A piece is written beside its name and then renamed, so that it is there whole or not at all. Several processes may
work in one folder as long as each has pieces of its own: that is what it has beyond :mod:`data_prep.units`, where one
process writes rows and a manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vt_trl.errors import ConfigError, DataError
from vt_trl.whole import changes, write_whole

if TYPE_CHECKING:
    from datasets import Dataset


class Work:
    """Pieces of work in ``folder``, each a list of JSON objects.

    Raises ConfigError when the folder holds work that was done with other settings, and says which differ.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = json.loads(json.dumps(settings))  # as a file gives it back
        path = folder / "settings.json"
        if path.exists():
            self._check(path)
        else:
            write_whole(path, json.dumps(self.settings, indent=2) + "\n")

    def _check(self, path: Path) -> None:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is no JSON: {error}. Remove {self.folder} and start again.") from error
        changed = changes(before, self.settings)
        if changed:
            raise ConfigError(
                f"{self.folder} holds work done with other settings: {changed}. Counts made in two ways "
                f"cannot be mixed: set them back, or choose another output folder."
            )

    def path(self, piece: int) -> Path:
        return self.folder / f"{piece:06d}.jsonl"

    def is_done(self, piece: int) -> bool:
        return self.path(piece).exists()

    def write(self, piece: int, records: list[dict[str, Any]]) -> None:
        write_whole(self.path(piece), "".join(json.dumps(record) + "\n" for record in records))

    def read(self, piece: int) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path(piece).read_text(encoding="utf-8").splitlines()]


def digest(*parts: Any) -> str:
    """16 hex digits that stand for JSON values."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def rows_print(dataset: Dataset) -> str:
    """What a data set is known by: ids, questions and answers. Pictures that are files are not read for it."""
    return f"{len(dataset)} rows, {digest(*dataset.select_columns(['id', 'question', 'answer']).to_list())}"


def model_print(model: str) -> str:
    """The name of a model, and for a folder the sizes of its files and what its configuration says."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = sorted((file.name, file.stat().st_size) for file in folder.iterdir() if file.is_file())
    configs = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*config*.json"))]
    return f"{model}, {digest(files, configs)}"


def picture_bytes(image: Mapping[str, Any] | str) -> bytes:
    """The file of a loaded row's picture, embedded or at the path that loading has checked."""
    if isinstance(image, str):
        return Path(image).read_bytes()
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
