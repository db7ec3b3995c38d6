"""What is done of an evaluation, on disk: shards of rows, each whole or not there, with the settings they depend on.

``OUT/completions/MODEL--DATA--POLICY-00003.parquet`` is a table of transcripts (``vt-trl view OUT`` shows it); its
metadata hold the results, the settings and a digest of every row. A shard is played as one batch, so that a run that
goes on puts the same rows side by side as one that was never stopped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from vt_trl.errors import ConfigError, DataError
from vt_trl.evaluation.rows import Evaluation, RowResult
from vt_trl.metrics import RolloutRecord
from vt_trl.transcripts.log import FOLDER
from vt_trl.transcripts.record import PictureEncoder, Transcript
from vt_trl.transcripts.table import read_facts, write_transcripts
from vt_trl.types import Rollout
from vt_trl.whole import changes


@dataclass(frozen=True)
class Cell:
    """One model on one data set under one policy, by their names."""

    model: str
    data: str
    policy: str

    @property
    def slug(self) -> str:
        """Its name as part of a file's."""
        return "--".join(re.sub(r"[^\w.=]+", "_", name) for name in (self.model, self.data, self.policy))

    def __str__(self) -> str:
        return f"{self.model}, {self.data}, {self.policy}"


@dataclass(frozen=True)
class Shard:
    """Rows that were played together: their results, the seconds it took, and the session that did it."""

    results: list[RowResult]
    seconds: float
    session: str


def shard_path(out: Path, cell: Cell, number: int) -> Path:
    return out / FOLDER / f"{cell.slug}-{number:05d}.parquet"


def read_shard(path: Path, settings: Mapping[str, Any], digests: Sequence[str]) -> Shard | None:
    """A shard that is done; None where there is none yet.

    Raises ConfigError when it was made with other settings or other rows, and says which.
    """
    if not path.is_file():
        return None
    facts = _facts(path)
    told = changes(
        facts["settings"] | {"the rows": facts["digests"]},
        json.loads(json.dumps(settings)) | {"the rows": list(digests)},
    )
    if told:
        raise ConfigError(
            f"{path} was made with other settings: {told}. Results of both would be mixed: name another --out, or "
            f"remove that folder."
        )
    return Shard([RowResult(**one) for one in facts["results"]], facts["seconds"], facts["session"])


def write_shard(
    path: Path, cell: Cell, settings: Mapping[str, Any], digests: Sequence[str], done: Evaluation, session: str
) -> Shard:
    """Write a shard, whole or not at all, with a transcript of every row."""
    facts = {
        "cell": asdict(cell),
        "settings": dict(settings),
        "digests": list(digests),
        "results": [asdict(one) for one in done.results],
        "seconds": done.seconds,
        "session": session,
    }
    encoder = PictureEncoder()
    pairs = zip(done.results, done.rollouts, strict=True)
    write_transcripts(path, [_transcript(cell, one, rollout, encoder) for one, rollout in pairs], facts)
    return Shard(list(done.results), done.seconds, session)


def _transcript(cell: Cell, result: RowResult, rollout: Rollout | None, encoder: PictureEncoder) -> Transcript:
    named = {"model": cell.model, "data": cell.data}
    if rollout is None:
        lost = {"id": result.id, "source": result.source, "group": result.id, "detail": result.reason}
        return Transcript((), status=result.status, mode=cell.policy, extra=named, **lost)
    record = RolloutRecord.of(rollout, group=result.id, correct=result.correct, reward=float("nan"))
    record.penalty = record.advantage = float("nan")  # of training; a report shows a dash
    extra = named | {"verdict": result.verdict, "verdict_reason": result.reason or None}
    return Transcript.of(rollout, record, encoder, extra, mode=cell.policy)


def read_results(out: Path) -> dict[Cell, list[RowResult]]:
    """All results in an evaluation's folder, by cell, in the order of the rows. Raises DataError without any."""
    found: dict[Cell, list[RowResult]] = {}
    for path in sorted((out / FOLDER).glob("*.parquet")):
        facts = _facts(path)
        results = [RowResult(**one) for one in facts["results"]]
        found.setdefault(Cell(**facts["cell"]), []).extend(results)
    if not found:
        raise DataError(f"{out} holds no evaluation: there are no tables in {out / FOLDER}. Run `vt-trl evaluate`.")
    return found


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = read_facts(path)
        cell, known = facts["cell"], {one.name for one in fields(RowResult)}
        if set(cell) == {one.name for one in fields(Cell)} and all(set(one) == known for one in facts["results"]):
            return facts
        problem = "it was written by another version"
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise DataError(f"{path} is no shard of an evaluation ({problem}); remove it, and it is made anew.")
