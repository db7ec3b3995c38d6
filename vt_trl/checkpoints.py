"""Checkpoints that are whole or not there: written aside, checked, then moved into place by one rename.

A process can be killed at any moment. What is half written lies in ``.saving`` and is thrown away by the next start; a
folder called ``checkpoint-N`` has been complete once, and its list of files says whether it still is.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from vt_trl.errors import CheckpointError, ConfigError
from vt_trl.whole import to_disk

logger = logging.getLogger(__name__)

MANIFEST = "vt_trl_files.json"  # name -> bytes of every file of a complete checkpoint
STAGING = ".saving"
_PREFIX = "checkpoint-"


def write_manifest(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Flush the files of a checkpoint (all there are, unless given) to the disk and list them with their sizes."""
    sizes = {}
    files = [path for path in folder.rglob("*") if path.is_file()] if files is None else files
    for path in sorted(path for path in files if path.name != MANIFEST):
        to_disk(path)
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    to_disk(manifest)


def problem_with(folder: Path) -> str | None:
    """Why a folder is no complete checkpoint; None when it is one."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, size in sizes.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Folders called ``checkpoint-N``, complete or not, by N."""
    found = [path for path in Path(output_dir).glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=_step)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint, or None; incomplete ones are named in the log and never loaded."""
    for path in reversed(checkpoints_in(output_dir)):
        problem = problem_with(path)
        if problem is None:
            return path
        logger.warning(f"{path} is skipped: {problem}.")
    return None


def resume_path(output_dir: str | Path, resume: str | bool | None) -> str | None:
    """What to resume from. ``true``: the newest complete checkpoint, or from the start when there is none yet.

    Raises ConfigError for a named checkpoint that is not complete.
    """
    text = str(resume).lower()
    if resume is None or text in ("false", "none", ""):
        return None
    if text == "true":
        found = last_checkpoint(output_dir)
        if found is None:
            logger.warning(
                f"resume_from_checkpoint is true, but {output_dir} has no complete checkpoint: a new start."
            )
        return None if found is None else str(found)
    problem = problem_with(Path(str(resume)))
    if problem is not None:
        raise ConfigError(
            f"resume_from_checkpoint is {resume!r}, which is no complete checkpoint: {problem}. Name another one, or "
            f"write true for the newest complete one."
        )
    return str(resume)


def clear_staging(output_dir: str | Path) -> None:
    """Throw away what a killed process left half written."""
    staging = Path(output_dir) / STAGING
    if staging.exists():
        logger.warning(f"{staging} holds a checkpoint that was never finished; it is removed.")
        shutil.rmtree(staging, ignore_errors=True)


def put_in_place(output_dir: str | Path, name: str) -> Path:
    """Move a finished checkpoint out of the staging folder: killed before, the old one is there; after, the new one.

    Raises CheckpointError, with the staging folder removed, when the disk does not take it.
    """
    output_dir = Path(output_dir)
    staged, final = output_dir / STAGING / name, output_dir / name
    try:
        write_manifest(staged)
        if final.exists():  # saved again after a resume at the same step
            shutil.rmtree(final)
        os.rename(staged, final)
        to_disk(output_dir)
    except OSError as error:
        raise not_saved(output_dir, error) from error
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)
    return final


def not_saved(output_dir: str | Path, error: BaseException) -> CheckpointError:
    """The error of a checkpoint that could not be written; what was written of it is removed."""
    shutil.rmtree(Path(output_dir) / STAGING, ignore_errors=True)
    last = last_checkpoint(output_dir)
    kept = f"The last complete checkpoint is {last}." if last else "There is no complete checkpoint yet."
    return CheckpointError(
        f"A checkpoint could not be written to {output_dir}: {error}. {kept} Make room (save_total_limit keeps only "
        f"the newest ones; save_only_model leaves out the optimizer) and go on with --resume_from_checkpoint true."
    )


def rotate(output_dir: str | Path, keep: int | None, protected: Iterable[str | None]) -> list[Path]:
    """Delete the oldest checkpoints beyond ``keep``, never the newest complete one nor ``protected``."""
    found = checkpoints_in(output_dir)
    if not keep or len(found) <= keep:
        return []
    safe = {Path(path).resolve() for path in protected if path}
    last = last_checkpoint(output_dir)
    safe |= {last.resolve()} if last else set()
    removed = []
    for path in found:
        if len(found) - len(removed) <= keep:
            break
        if path.resolve() not in safe:
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def _step(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))
