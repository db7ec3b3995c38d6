"""``vt-trl preflight RECIPE [options] [--key value ...]``"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vt_trl.preflight import Machine, Workload, preflight
from vt_trl.preflight.launch import SHARDINGS


def parser() -> argparse.ArgumentParser:
    # Without abbreviations: `--model` is a line of the recipe, not short for `--model-config`.
    parser = argparse.ArgumentParser("vt-trl preflight", description="Will it fit?", allow_abbrev=False)
    parser.add_argument("recipe", help="a YAML file, see recipes/README.md; `--key value` overrides a line of it")
    parser.add_argument("--gpu-gib", type=float, help="memory of one GPU in GiB (default: of the GPU here)")
    parser.add_argument("--config-file", help="YAML of accelerate, as for `accelerate launch --config_file`")
    parser.add_argument("--processes", type=int, help="processes of the job, one per GPU")
    parser.add_argument("--machines", type=int, help="machines of the job")
    parser.add_argument("--sharding", choices=SHARDINGS, help="what the processes divide")
    parser.add_argument("--model-config", help="folder with the model's config.json, instead of the recipe's model")
    parser.add_argument("--picture", type=_size, default=Workload.picture, help="average picture, WIDTHxHEIGHT")
    parser.add_argument("--turn", type=int, default=Workload.turn_tokens, help="average sampled tokens per turn")
    parser.add_argument("--asks", type=float, default=Workload.asks, help="share of rollouts that ask")
    parser.add_argument("--mfu", type=float, default=Machine.mfu, help="assumed share of peak operations per second")
    return parser


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the preflight; the exit status is 1 when typical rollouts do not fit."""
    result = preflight(
        options.recipe,
        overrides,
        gpu_gib=options.gpu_gib,
        processes=options.processes,
        sharding=options.sharding,
        model_config=options.model_config,
        config_file=options.config_file,
        machines=options.machines,
        workload=Workload(options.picture, options.turn, options.asks),
        machine=Machine(mfu=options.mfu),
    )
    return 1 if result.estimate.fits_typically is False else 0


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    try:
        return int(width), int(height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 1024x768") from None
