"""Evaluation by the same rollout loop that trains: a model, rows, an environment; greedy unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vt_trl.chat import ChatEncoder
from vt_trl.envs import Environment
from vt_trl.families import family_of
from vt_trl.features import ImageFeatures
from vt_trl.generation.base import SamplingSettings
from vt_trl.generation.hf import HFBackend
from vt_trl.metrics import RolloutRecord, mean
from vt_trl.rewards import accuracy_reward
from vt_trl.rollout import Limits, RolloutRunner
from vt_trl.types import Rollout


@dataclass(frozen=True)
class Evaluation:
    """Rollouts and their records, in the order of the rows."""

    rollouts: list[Rollout]
    records: list[RolloutRecord]

    def rate(self, name: str, source: str | None = None) -> float:
        """Mean of a record's field (``correct``, ``asked``, ``visual_tokens``), over one ``data_source`` or all."""
        chosen = [record for record in self.records if source is None or record.source == source]
        return mean(float(getattr(record, name)) for record in chosen)


def make_runner(
    model: Any, processor: Any, environment: Callable[[], Environment], limits: Limits, max_batch: int = 128
) -> RolloutRunner:
    """A rollout loop on a plain model with the transformers backend."""
    tokenizer, family = processor.tokenizer, family_of(model.config)
    features = ImageFeatures(processor.image_processor)
    stop_ids = stop_ids_of(tokenizer, model.generation_config)
    backend = HFBackend.for_model(
        model,
        features,
        pad_id=tokenizer.pad_token_id,
        stop_ids=sorted(stop_ids),
        banned_ids=family.banned_ids(tokenizer, model.get_output_embeddings().weight.shape[0], stop_ids),
        image_token_id=tokenizer.convert_tokens_to_ids(family.image_token),
        max_batch=max_batch,
    )
    return RolloutRunner(environment, backend, ChatEncoder(tokenizer, family, features), stop_ids, limits)


def stop_ids_of(tokenizer: Any, generation_config: Any) -> set[int]:
    """The tokens that end a turn: those of the checkpoint's generation settings, and the tokenizer's own."""
    stop = generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(stop if isinstance(stop, Iterable) else [stop])} - {None}


@torch.no_grad()
def evaluate(
    runner: RolloutRunner,
    rows: Sequence[dict[str, Any]],
    settings: SamplingSettings | None = None,
    batch_size: int = 128,
    progress: Callable[[int], Any] = lambda count: None,
) -> Evaluation:
    """One rollout per row (decoded rows, see ``vt_trl.data.episode_row``), every row to the last one.

    ``progress`` is called with the number of rows just finished.
    """
    settings = settings or SamplingSettings(temperature=0.0)
    rollouts: list[Rollout] = []
    for start in range(0, len(rows), batch_size):
        part = list(rows[start : start + batch_size])
        runner.encoder.features.clear()
        rollouts += runner.run(part, 1, settings)
        progress(len(part))
    scores = accuracy_reward([[] for _ in rollouts], [rollout.row["answer"] for rollout in rollouts], rollout=rollouts)
    records = [
        RolloutRecord.of(rollout, group=str(index), correct=score > 0.5, reward=score)
        for index, (rollout, score) in enumerate(zip(rollouts, scores, strict=True))
    ]
    return Evaluation(rollouts, records)
