"""Rollout and weight sync of :mod:`benchmarks.step`, on a vLLM engine in this process: our loop and TRL's own.

Turns have the lengths that the update is measured with, and pictures their sizes; the text of prompts is that of the
``resize`` environment, and for TRL that of its own tool template around the same words.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.rollout import timed
from benchmarks.rollout_parts import Plan, World, check
from benchmarks.rollout_trl import TRLLoop
from benchmarks.step_work import Sizes, load
from vt_trl.types import Rollout

SYNCS = 3  # weight syncs that are timed, of each kind


def measure_engine(
    checkpoint: Path, sizes: Sizes, rollouts: Mapping[str, Sequence[Rollout]], device: str, repeats: int
) -> dict[str, dict[str, dict[str, float]]] | None:
    """Seconds by request rate, phase (``rollout`` with its weight sync, and ``sync`` alone) and way.

    One group of each rate in ``rollouts``. None where vLLM is not installed. The engine stays until the process ends.
    """
    if find_spec("vllm") is None:
        return None
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; read where there is no GPU
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    load(checkpoint, device, dtype).save_pretrained(checkpoint)
    world = World(checkpoint, sizes.members)
    trl = TRLLoop(world)
    syncs = {"vt_trl": world.engine.sync_weights, "stock": trl.sync_weights}
    found = {}
    for rate, all_groups in rollouts.items():
        plan = Plan(tuple(tuple(len(turn.token_ids) for turn in one.turns) for one in all_groups[: sizes.members]))
        ways = {
            "vt_trl": lambda row, plan=plan: check(world.roll_out("free", row, plan), plan),
            "stock": lambda row, plan=plan: trl.roll_out(row, plan),
        }
        turns: list[dict[str, float]] = []
        for number in range(repeats + 1):
            row = world.row(number, 56 * sizes.columns, 56 * sizes.rows)
            turn = {way: timed(world, lambda act=act, row=row: act(row))["seconds"] for way, act in ways.items()}
            turns += [turn] if number else []  # the first one warms up
        found[rate] = {
            "rollout": {way: round(statistics.median(turn[way] for turn in turns), 3) for way in ways},
            "sync": {
                way: round(statistics.median(timed(world, sync)["seconds"] for _ in range(SYNCS)), 4)
                for way, sync in syncs.items()
            },
        }
    return found
