"""Running the units of a step, here or in worker processes, and going on where a killed run stopped."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from datasets import Features
from rich.progress import track

from data_prep.shards import WORK, UnitWriter, open_manifest, side_part, write_manifest
from vt_trl.errors import ConfigError, DataError
from vt_trl.rows import FEATURES
from vt_trl.sources import MANIFEST

Work = Callable[[Any, UnitWriter], None]


def run_units(
    out: Path,
    units: Sequence[Any] | Callable[[Path], Sequence[Any]],
    work: Work,
    *,
    made_of: Mapping[str, Any],
    workers: int = 0,
    features: Features = FEATURES,
    title: str = "rows",
    keep: Sequence[str] = (),
) -> dict[str, Any]:
    """Write ``out`` from its units and return the complete manifest; units that are there already are not run again.

    ``units``, or a function that gets a work folder and makes them, once the output folder is ours alone.
    ``work(unit, writer)`` writes the rows of one unit. With ``workers`` processes it has to be a function of a module
    (or a ``partial`` of one); with 0 it runs here. ``made_of``: all that the output depends on. ``keep``: side files
    that exist even when no unit wrote a line. Raises what ``work`` raises, :class:`ConfigError` when the folder is
    another run's or in use, and :class:`DataError` when a worker dies; started again, the run goes on.
    """
    if workers < 0:
        raise ConfigError(f"workers is {workers}; it must be 0 (this process) or more.")
    out = Path(out)
    with locked(out):
        manifest = open_manifest(out, made_of)
        if manifest["complete"]:
            shutil.rmtree(out / WORK)
            return manifest
        for stale in (*out.glob(".*.tmp"), *(out / WORK).glob(".*.tmp")):
            stale.unlink(missing_ok=True)
        units = units(out / WORK) if callable(units) else units
        write_manifest(out, manifest)  # from now on the folder is known to be ours
        missing = [number for number in range(len(units)) if str(number) not in manifest["units"]]
        job = partial(_one, out, features, work)
        for number, record in track(_results(job, missing, units, workers), title, len(missing), disable=not missing):
            manifest["units"][str(number)] = record
            write_manifest(out, manifest)
        _finish(out, manifest, len(units), keep)
        return manifest


def totals(manifest: Mapping[str, Any]) -> Counter[str]:
    """All counts of a manifest, ``rows`` among them, added up over its units."""
    total: Counter[str] = Counter()
    for unit in manifest["units"].values():
        total.update({"rows": unit["rows"], **unit["counts"]})
    return total


def results(function: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[tuple[int, Any]]:
    """``(number, function(item))`` as they come, from this process or from ``workers`` others."""
    if not workers:
        yield from ((number, function(item)) for number, item in enumerate(items))
        return
    context = multiprocessing.get_context("forkserver")  # a fork of this process could inherit a lock that is held
    context.set_forkserver_preload(["data_prep.units"])
    with ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool:
        futures = {pool.submit(function, item): number for number, item in enumerate(items)}
        try:
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool as error:
            raise DataError("a worker process died, perhaps of memory; run the command again with fewer") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def in_order(numbered: Iterator[tuple[int, Any]], count: int) -> list[Any]:
    """All results in the order of their items, with a progress bar."""
    found = dict(track(numbered, "look", count))
    return [found[number] for number in range(count)]


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second run out of the folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / WORK).mkdir(exist_ok=True)
    with (out / WORK / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{str(out)!r} is being written by another run; wait for it.") from error
        try:
            yield
        finally:
            if not (out / MANIFEST).exists():  # nothing came of it
                shutil.rmtree(out / WORK)
                if not any(out.iterdir()):
                    out.rmdir()


def _results(
    job: Callable[[tuple[int, Any]], dict], missing: Sequence[int], units: Sequence[Any], workers: int
) -> Iterator[tuple[int, dict]]:
    for place, record in results(job, [(number, units[number]) for number in missing], workers):
        yield missing[place], record


def _one(out: Path, features: Features, work: Work, numbered: tuple[int, Any]) -> dict[str, Any]:
    number, unit = numbered
    with UnitWriter(out, number, features) as writer:
        work(unit, writer)
    return writer.publish()


def _finish(out: Path, manifest: dict[str, Any], units: int, keep: Sequence[str]) -> None:
    """Join the side files in the order of the units; the manifest says complete only when they are whole."""
    names = {name for unit in manifest["units"].values() for name in unit["sides"]}
    for name in sorted({*names, *keep}):
        temporary = out / f".{name}.{os.getpid()}.tmp"
        with temporary.open("wb") as joined:
            for number in range(units):
                if name in manifest["units"][str(number)]["sides"]:
                    with side_part(out, name, number).open("rb") as part:
                        shutil.copyfileobj(part, joined)
        os.replace(temporary, out / name)
    manifest["units"] = {str(number): manifest["units"][str(number)] for number in range(units)}
    manifest["complete"] = True
    write_manifest(out, manifest)
    shutil.rmtree(out / WORK)


def _end_with_parent() -> None:
    """End this worker when the run is killed: nobody would read its results."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()
