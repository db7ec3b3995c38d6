"""Which files a source consists of: a prepared set, a saved one, Parquet, tables next to pictures, or a Hub name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.reading import SUFFIXES
from vt_trl.errors import DataError
from vt_trl.images import local_path
from vt_trl.sources import MANIFEST, shard_files, table_file

_PICTURES = ("*.png", "*.jpg", "*.jpeg", "*.webp", "*.bmp", "*.gif", "*.tif", "*.tiff")
_SPLITS = ("train", "validation", "val", "dev", "test", "testmini")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Found:
    """The files of a source, all of one kind, and the folder that paths in them start from."""

    files: list[Path]
    root: Path

    def fingerprint(self) -> list[list[Any]]:
        """Name, bytes and time of each file: what the output of a step depends on."""
        stats = ((file, file.stat()) for file in self.files)
        return [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def find(source: str, split: str | None = None, files: str | None = None, revision: str | None = None) -> Found:
    """The files of a local path, or of a data set on the Hub, which is downloaded first.

    ``files``: a pattern such as ``train_*.json``, for folders with more than one table. Raises :class:`DataError`
    with what was found when that is not clear.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if not _HUB_NAME.fullmatch(source):
            raise DataError(f"{source!r} is no file or folder here, and no name on the Hub (OWNER/NAME)")
        path = _download(source, files, revision)
    if path.is_file():
        return Found([path], path.parent.absolute())
    found = _in_folder(path, split, files)
    kinds = sorted({file.suffix for file in found})
    if len(kinds) != 1 or kinds[0] not in SUFFIXES:
        raise DataError(f"{source!r} has files of the kinds {kinds}; choose one of {SUFFIXES} with --files '*.KIND'")
    return Found(found, path.absolute())


def _download(name: str, files: str | None, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [files, *_PICTURES] if files else [*(f"*{suffix}" for suffix in SUFFIXES), *_PICTURES]
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(f"cannot download {name!r} from the Hub: {str(error).splitlines()[0]}") from error


def _in_folder(folder: Path, split: str | None, files: str | None) -> list[Path]:
    if files:
        if Path(files).is_absolute() or ".." in Path(files).parts:
            raise DataError(f"--files {files!r} leaves the folder; give a pattern inside it")
        found = sorted(file for file in folder.glob(files) if file.is_file())
        return found or _nothing(folder, f"no file matches --files {files!r}")
    if (folder / MANIFEST).is_file():
        return shard_files(folder)
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(one.parent.name for one in folder.glob("*/state.json"))
        name = split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else "")
        if name not in splits:
            raise DataError(f"{str(folder)!r} has the splits {splits}; choose one with --split")
        folder = folder / name
    if (folder / "state.json").is_file():
        return _saved(folder)
    table = table_file(folder, split)
    if table is not None:
        return [table]
    for suffix in SUFFIXES:
        found = sorted(file for file in folder.rglob(f"*{suffix}") if not file.name.startswith("."))
        if found:
            return _one_set(found, folder, split)
    return _nothing(folder, "no table in it")


def _saved(folder: Path) -> list[Path]:
    """The files that ``save_to_disk`` names, in its order."""
    try:
        names = [one["filename"] for one in json.loads((folder / "state.json").read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read {str(folder / 'state.json')!r}: {error}") from error
    return [local_path(str(name), folder) for name in names]


def _one_set(found: list[Path], folder: Path, split: str | None) -> list[Path]:
    """The files of one split and one configuration; mixing two by accident would be worse than asking."""
    splits = {file: _split_of(file.relative_to(folder)) for file in found}
    wanted = split or ("train" if "train" in splits.values() else None)
    chosen = [file for file in found if wanted is None or wanted in _words(file.relative_to(folder))]
    if not chosen:
        raise DataError(f"{str(folder)!r} has no files of split {split!r}, only {_names(found, folder)}")
    if len({splits[file] for file in chosen}) > 1 or len({file.parent for file in chosen}) > 1:
        raise DataError(
            f"{str(folder)!r} holds more than one split or configuration ({_names(chosen, folder)}); choose with "
            "--split or --files"
        )
    if chosen[0].suffix not in (".parquet", ".arrow") and len(chosen) > 1:
        raise DataError(f"{str(folder)!r} has {len(chosen)} tables ({_names(chosen, folder)}); choose with --files")
    return chosen


def _words(path: Path) -> list[str]:
    return re.split(r"[^a-z0-9]+", str(path).lower())


def _split_of(path: Path) -> str | None:
    return next((word for word in _words(path) if word in _SPLITS), None)


def _names(files: Iterable[Path], folder: Path) -> str:
    names = [str(file.relative_to(folder)) for file in files]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _nothing(folder: Path, why: str) -> list[Path]:
    there = sorted(one.name for one in folder.iterdir())[:10]
    raise DataError(f"{str(folder)!r}: {why}; there are {there}")
