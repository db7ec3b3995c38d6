"""What the trainer keeps of its rollouts when ``log_completions`` is set: a table per logged step.

``OUTPUT_DIR/completions/completions_00010.parquet`` holds the last generation batch of step 10 (of all processes),
``eval_00010.parquet`` the evaluation at that step. A resumed run writes the same names again.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from PIL import Image
from trl.trainer.utils import print_prompt_completions_sample

from vt_trl.groups import Group
from vt_trl.metrics import RolloutRecord
from vt_trl.transcripts.record import PictureEncoder, Transcript
from vt_trl.transcripts.table import write_transcripts

logger = logging.getLogger(__name__)

FOLDER = "completions"
# Columns of a tracker's table, before dialogue and rewards.
TRACKED = (
    *("step", "id", "source", "group", "member", "status", "asked", "correct"),
    *("answer", "verdict", "verdict_reason"),
)
_NAMES = {"train": "completions_{:05d}.parquet", "eval": "eval_{:05d}.parquet"}


class TranscriptLog:
    """Gathers transcripts at each log, writes them, and hands them to the trackers that take tables.

    At most ``log_completions_rollouts`` rollouts of a step are kept, whole groups, from each process its share, and
    pictures of at most ``log_completions_pixels`` pixels. What is left out is counted in the file's metadata and in
    the logs. A folder that cannot be written to is warned of once; the training goes on.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.args = trainer, trainer.args
        self._groups: dict[str, list[tuple[Group, Sequence[RolloutRecord]]]] = {"train": [], "eval": []}
        self._seen: Counter[str] = Counter()
        self.last: list[Transcript] = []  # of the latest write, all processes'
        self._warned = False

    def add(self, mode: str, groups: Sequence[Group], records: Sequence[RolloutRecord]) -> None:
        """Keep this process's groups until the next log: the last batch in training, all up to the limit else."""
        if not self.args.log_completions:
            return
        if mode == "train":
            self._groups[mode], self._seen[mode] = [], 0
        size = len(groups[0].rollouts)
        room = max(1, self.args.log_completions_rollouts // (size * self.trainer.accelerator.num_processes))
        pairs = [(group, records[n * size :][:size]) for n, group in enumerate(groups)]
        self._groups[mode] += pairs[: max(0, room - len(self._groups[mode]))]
        self._seen[mode] += len(groups) * size

    def write(self, mode: str) -> dict[str, float]:
        """Write the table of a step; returns numbers for the log. A collective. Nothing to write is no table."""
        if not self.args.log_completions:
            return {}
        encoder = PictureEncoder(self.args.log_completions_pixels)
        own = self._transcripts(mode, encoder)
        everyone = gather_object([(own, self._seen[mode], encoder.shrunk)])
        self._groups[mode], self._seen[mode] = [], 0
        transcripts = self._within_limit([one for part, _, _ in everyone for one in part])
        self.last = transcripts
        if not transcripts:
            return {}
        seen, shrunk = sum(seen for _, seen, _ in everyone), sum(shrunk for _, _, shrunk in everyone)
        facts = {"rollouts": len(transcripts), "left_out": seen - len(transcripts), "pictures_shrunk": shrunk}
        if self.trainer.accelerator.is_main_process:
            self._save(mode, transcripts, facts | {"max_pixels": encoder.max_pixels})
        return {f"transcripts/{name}": float(value) for name, value in facts.items()}

    def _transcripts(self, mode: str, encoder: PictureEncoder) -> list[Transcript]:
        step = self.trainer.state.global_step
        return [
            Transcript.of(rollout, record, encoder, extra, step=step, mode=mode, member=member)
            for group, records in self._groups[mode]
            for member, (rollout, record, extra) in enumerate(zip(group.rollouts, records, group.extra, strict=True))
        ]

    def _within_limit(self, transcripts: list[Transcript]) -> list[Transcript]:
        """Whole groups up to the limit, one at least: with many processes even one group each can be too many."""
        kept: list[Transcript] = []
        for _, members in groupby(transcripts, lambda one: one.group):
            members = list(members)
            if kept and len(kept) + len(members) > self.args.log_completions_rollouts:
                break
            kept += members
        return kept

    def _save(self, mode: str, transcripts: list[Transcript], facts: Mapping[str, Any]) -> None:
        step = self.trainer.state.global_step
        path = Path(self.args.output_dir, FOLDER, _NAMES[mode].format(step))
        try:
            write_transcripts(path, transcripts, {"step": step, "mode": mode, **facts})
        except OSError as error:
            if not self._warned:
                logger.warning(
                    f"The rollouts of step {step} could not be written to {path.parent}: {error}. The training goes "
                    f"on; this is said once. Free space or mend the folder: later steps are tried again."
                )
            self._warned = True

    def show(self, mode: str) -> None:
        """The last ``write`` for Weights & Biases and trackio, and on the terminal; on the main process only."""
        if not (self.last and self.trainer.accelerator.is_main_process):
            return
        if self.args.num_completions_to_print:
            self._print(self.args.num_completions_to_print)
        name = "completions" if mode == "train" else "eval_completions"
        chosen = [one for one in self.last if not (self.args.log_unique_prompts and one.member)]
        shown = max(len(one.images) for one in chosen) if self.args.log_multimodal else 0
        for tracker in _trackers(self.args.report_to):
            rows = [_cells(one, tracker, shown) for one in chosen]
            table = tracker.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
            tracker.log({name: table, "train/global_step": self.trainer.state.global_step})

    def _print(self, count: int) -> None:
        """TRL's table on the terminal."""
        spoken = [[{"role": turn.role, "content": turn.text} for turn in one.turns] for one in self.last]
        prompts = [sum(turn.status == "prompt" for turn in one.turns) for one in self.last]
        rewards = {name: [one.rewards[name] or 0.0 for one in self.last] for name in self.last[0].rewards}
        print_prompt_completions_sample(
            [turns[:end] for turns, end in zip(spoken, prompts, strict=True)],
            [turns[end:] for turns, end in zip(spoken, prompts, strict=True)],
            rewards,
            [one.advantage or 0.0 for one in self.last],
            self.trainer.state.global_step,
            count,
            extra={"status": [one.status for one in self.last]},
        )


def _cells(transcript: Transcript, tracker: Any, shown: int) -> dict[str, Any]:
    """A row of a tracker's table with ``shown`` columns of pictures: a list in a cell is not shown by all of them."""
    cells = {name: getattr(transcript, name) for name in TRACKED}
    cells |= {"dialogue": "\n\n".join(f"{turn.role}: {turn.text}" for turn in transcript.turns)}
    cells |= {name: getattr(transcript, name) for name in ("reward", "penalty", "advantage")}
    cells |= {f"rewards/{name}": score for name, score in transcript.rewards.items()}
    for number in range(shown):
        here = transcript.images[number : number + 1]
        cells[f"picture {number + 1}"] = tracker.Image(Image.open(io.BytesIO(here[0]))) if here else None
    return cells


def _trackers(report_to: Sequence[str]) -> list[Any]:
    """Those that take tables, of the trackers a run reports to."""
    found = []
    if "wandb" in report_to:
        import wandb

        found += [wandb] if wandb.run is not None else []
    if "trackio" in report_to:
        import trackio

        found.append(trackio)
    return found
