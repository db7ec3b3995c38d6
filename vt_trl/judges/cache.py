"""Each distinct case is asked about once: verdicts in memory, on disk, and under way."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import sqlite3
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cachetools import LRUCache
from diskcache import Cache, JSONDisk
from diskcache.core import MODE_PICKLE

from vt_trl.judges.base import Case, Judge, Judgement, Verdict

logger = logging.getLogger(__name__)

_IN_MEMORY = 200_000  # verdicts; older ones are still on disk
_ON_DISK = 2**30  # bytes


def default_folder(name: str = "judge") -> Path:
    """``$XDG_CACHE_HOME/vt_trl/judge``: outside every output folder, whose files may be pushed to the Hub."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vt_trl" / name


class _NeverPickle(JSONDisk):
    """JSON only. The base class would still unpickle an entry that somebody else marked as a pickle."""

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        if mode == MODE_PICKLE:
            raise ValueError("a pickled entry in the cache of verdicts")
        return super().fetch(mode, filename, value, read)


class JsonCache:
    """JSON values on disk by key, for several runs and processes. A full or broken disk costs the cache, not the run.

    ``what``: what it holds, for messages. Without a folder it holds nothing.
    """

    def __init__(self, folder: Path | None, what: str = "verdict"):
        self.folder, self.what = folder, what
        self._disk: Cache | None = None

    def open(self) -> None:
        if self.folder is not None and self._disk is None:
            try:
                self._disk = Cache(str(self.folder), disk=_NeverPickle, size_limit=_ON_DISK)
            except (OSError, sqlite3.Error) as error:
                self._give_up(error)

    def get(self, key: str) -> Any:
        """The value, or None. What cannot be read is ignored, and the log says so."""
        if self._disk is None:
            return None
        try:
            return self._disk.get(key)
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)
        except (ValueError, KeyError, TypeError) as error:
            self.ignore(error)
        return None

    def set(self, key: str, value: Any) -> None:
        if self._disk is None:
            return
        try:
            self._disk.set(key, value)
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    def ignore(self, error: Exception) -> None:
        """Say that an entry was not written by us."""
        logger.warning(f"An entry of the {self.what} cache {self.folder} cannot be read and is ignored: {error}")

    def close(self) -> None:
        if self._disk is not None:
            self._disk.close()
            self._disk = None

    def _give_up(self, error: Exception) -> None:
        what = f"{self.what}s".capitalize()
        logger.warning(f"The {self.what} cache {self.folder} is not used any more: {error}. {what} stay in memory.")
        self._disk = None


class CachedJudge(Judge):
    """A judge that asks ``inner`` about each distinct case once.

    A case that is being asked about is waited for, not asked again. Verdicts stay in memory for the run and, with
    ``folder``, on disk for other runs and processes; the key holds the case, the judge's settings and its prompt.
    A failure is remembered until :meth:`forget_failures`, and never written to disk.
    """

    def __init__(self, inner: Judge, folder: Path | None = None):
        self.inner = inner
        self.name, self.remote = inner.name, inner.remote
        self._prefix = ""
        self._settled: LRUCache[str, Judgement] = LRUCache(_IN_MEMORY)
        self._failed: dict[str, Judgement] = {}
        self._pending: dict[str, asyncio.Future[Judgement]] = {}
        self._counts: Counter[str] = Counter()
        self._disk = JsonCache(folder if inner.cached else None)

    def open(self) -> None:
        self.inner.open()
        settings = json.dumps(self.inner.fingerprint(), sort_keys=True)
        self._prefix = hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()
        self._disk.open()

    def fingerprint(self) -> dict[str, Any]:
        return self.inner.fingerprint()

    def counts(self) -> Counter[str]:
        """Cases ``asked`` of the judge and those ``from_disk``; and what the judge itself counts."""
        return self._counts + self.inner.counts()

    async def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        missing: dict[str, Case] = {}
        found: list[Judgement | asyncio.Future[Judgement]] = []
        for case in cases:
            known = self._settled.get(case.key) or self._failed.get(case.key) or self._read(case)
            if known is None and case.key not in self._pending:
                missing[case.key] = case
                self._pending[case.key] = asyncio.get_running_loop().create_future()
            found.append(known or self._pending[case.key])
        if missing:
            await self._ask(missing)
        return [one if isinstance(one, Judgement) else await one for one in found]

    def forget_failures(self) -> None:
        """Let failed cases be asked about again: a server that was down may be up in the next step."""
        self._failed.clear()

    async def close(self) -> None:
        self._disk.close()
        await self.inner.close()

    async def _ask(self, missing: dict[str, Case]) -> None:
        """Ask the judge and settle what is pending; when the judge itself breaks, so do all who wait."""
        self._counts["asked"] += len(missing)
        try:
            judgements = await self.inner.judge(list(missing.values()))
            if len(judgements) != len(missing):
                raise RuntimeError(f"{self.inner.name}: {len(judgements)} judgements for {len(missing)} cases")
        except BaseException as error:
            for key in missing:
                future = self._pending.pop(key)
                if isinstance(error, Exception):
                    future.set_exception(error)
                    future.exception()  # marks it as seen: nobody has to wait for it
                else:
                    future.cancel()
            raise
        for (key, case), judgement in zip(missing.items(), judgements, strict=True):
            if judgement.verdict is Verdict.FAILED:
                self._failed[key] = judgement
            else:
                self._settled[key] = judgement
                self._write(case, judgement)
            self._pending.pop(key).set_result(judgement)

    def _read(self, case: Case) -> Judgement | None:
        stored = self._disk.get(self._prefix + case.key)
        if stored is None:
            return None
        try:
            judgement = Judgement(Verdict(stored["verdict"]), str(stored["detail"]))
        except (ValueError, KeyError, TypeError) as error:  # not written by us
            self._disk.ignore(error)
            return None
        self._counts["from_disk"] += 1
        self._settled[case.key] = judgement
        return judgement

    def _write(self, case: Case, judgement: Judgement) -> None:
        self._disk.set(self._prefix + case.key, {"verdict": judgement.verdict.value, "detail": judgement.detail})
