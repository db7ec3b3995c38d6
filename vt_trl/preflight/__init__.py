"""Will it fit? GPU memory per rank, tokens and seconds per step of a recipe, from the model's configuration alone.

    vt-trl preflight recipes/efficient_lora.yaml --gpu-gib 40
    python -m vt_trl.preflight recipes/efficient_full.yaml --config-file recipes/accelerate/zero3.yaml --gpu-gib 80

Nothing is loaded but a configuration file, and no GPU is needed. Read :mod:`vt_trl.preflight.estimate` first; what a
forward keeps is counted in :mod:`vt_trl.preflight.activations`, and ``benchmarks/preflight_check.py`` compares the
figures with real allocations.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, PretrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

from vt_trl.config import VTGRPOConfig
from vt_trl.errors import ConfigError
from vt_trl.preflight.advice import Advice, advise
from vt_trl.preflight.engines import GIB
from vt_trl.preflight.episodes import PixelLimits, Workload
from vt_trl.preflight.estimate import Estimate, estimate
from vt_trl.preflight.faster import speed_remarks
from vt_trl.preflight.flops import Machine
from vt_trl.preflight.launch import Launch, launch_from_environment, launch_from_file
from vt_trl.preflight.planned import given_settings, parse_planned
from vt_trl.preflight.setup import Setup
from vt_trl.preflight.show import peaks, show, verdict
from vt_trl.recipe import RunArguments

__all__ = [
    "Advice",
    "Estimate",
    "Launch",
    "Machine",
    "PixelLimits",
    "Preflight",
    "Setup",
    "Workload",
    "check_run",
    "estimate",
    "preflight",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preflight:
    """An estimate, what to change so that typical rollouts fit (``needed``) and so that even the longest do
    (``safe``), each None when nothing has to change, and remarks."""

    estimate: Estimate
    needed: Advice | None
    safe: Advice | None
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Whether even the longest rollouts fit; None when no GPU is known."""
        return self.estimate.fits


def preflight(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    gpu_gib: float | None = None,
    processes: int | None = None,
    sharding: str | None = None,
    model_config: PretrainedConfig | str | Path | None = None,
    *,
    config_file: str | Path | None = None,
    machines: int | None = None,
    limits: PixelLimits | None = None,
    workload: Workload | None = None,
    machine: Machine | None = None,
    console: Console | None = None,
) -> Preflight:
    """Estimate a recipe and print what it needs.

    Args:
        recipe, overrides: as for training; ``overrides`` are ``--key value``.
        gpu_gib: memory of one GPU in GiB; by default that of the GPU here, if there is one.
        processes, sharding, machines: as the launcher would set them (``none``, ``zero2``, ``zero3``, ``fsdp2``); they
            override ``config_file``, a YAML of accelerate. By default what this process was launched with.
        model_config: a configuration or a folder with one, instead of the recipe's ``model``.
        limits: of the image processor; by default those of the model.
        workload, machine: what an average rollout looks like, and how fast the hardware is assumed to be.
        console: where to print; None prints to the terminal.

    Raises ConfigError for a recipe or a model that does not load.
    """
    launch = launch_from_file(config_file) if config_file else launch_from_environment()
    told = {"processes": processes, "sharding": sharding, "machines": machines}
    launch = replace(launch, **{name: value for name, value in told.items() if value is not None})
    run, args = parse_planned(recipe, overrides, launch.processes)
    config, limits, notes = load_configuration(run, model_config, limits)
    setup = Setup(
        run=run,
        args=args,
        config=config,
        launch=launch,
        gpu_bytes=round(gpu_gib * GIB) if gpu_gib else None if args.use_cpu else gpu_bytes(),
        limits=limits,
        workload=workload or Workload(),
        machine=machine or Machine(),
        given=frozenset(given_settings(recipe, overrides)),
    )
    result = examine(setup, notes)
    show(result, console or Console())
    return result


def check_run(run: RunArguments, args: VTGRPOConfig, config: PretrainedConfig) -> Preflight | None:
    """The preflight at the start of a run, on the main process alone: its verdict in a few lines. It never stops a
    run, and returns None when nothing can be said."""
    if args.process_index != 0:
        return None
    try:
        launch = launch_from_environment()
        _, limits, notes = load_configuration(run, config)
        gpu = None if args.use_cpu else gpu_bytes()
        result = examine(Setup(run, args, config, launch, gpu, limits), notes)
    except Exception as error:  # an estimate must not be why a training run dies
        logger.warning("No preflight: %s", error)
        return None
    lines = verdict(result) if gpu else [f"GiB of memory: {peaks(result.estimate)}."]
    Console(stderr=True).print("\n".join(("Preflight:", *result.notes, *lines)), highlight=False)
    return result


def examine(setup: Setup, notes: Sequence[str] = ()) -> Preflight:
    """An estimate with advice and remarks."""
    estimated = estimate(setup)
    needed = advise(setup, "typical", estimated)
    hopeless = needed is not None and not needed.enough  # then the longest rollouts need no advice of their own
    return Preflight(
        estimate=estimated,
        needed=needed,
        safe=None if hopeless else advise(setup, "longest", estimated),
        notes=(*notes, *_remarks(estimated)),
    )


def _remarks(estimated: Estimate) -> list[str]:
    setup, remarks = estimated.setup, []
    run, args = setup.run, setup.args
    if run.lora == "none" and run.dtype != "float32" and setup.launch.sharding == "none":
        remarks.append(
            f"dtype {run.dtype} without an adapter is refused unless DeepSpeed or FSDP keeps fp32 weights: add "
            f"--config-file recipes/accelerate/zero3.yaml, or set dtype: float32."
        )
    longest = setup.longest
    if args.use_vllm and args.vllm_max_model_length and longest.tokens >= args.vllm_max_model_length:
        remarks.append(
            f"The longest rollouts end at vllm_max_model_length ({args.vllm_max_model_length}), before they have used "
            f"all turns."
        )
    if estimated.judge.note:
        remarks.append(estimated.judge.note)
    return remarks + speed_remarks(estimated)


def gpu_bytes() -> int | None:
    """Memory of the GPU of this process in bytes, or None without one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def load_configuration(
    run: RunArguments, source: PretrainedConfig | str | Path | None = None, limits: PixelLimits | None = None
) -> tuple[PretrainedConfig, PixelLimits, list[str]]:
    """Configuration of the model, size limits of its image processor, and remarks. Raises ConfigError."""
    place: Any = run.model if source is None or isinstance(source, PretrainedConfig) else source
    config = source
    if not isinstance(source, PretrainedConfig):
        try:
            config = AutoConfig.from_pretrained(place, revision=run.model_revision if source is None else None)
        except (OSError, ValueError) as error:
            raise ConfigError(f"The configuration of {str(place)!r} does not load: {error}") from error
    if limits is not None:
        return config, limits, []
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(place)
    except (OSError, ValueError):
        default = PixelLimits()
        remark = f"No image processor at hand; taken to accept up to {default.longest:,} pixels."
        return config, default, [remark]
    size = settings.get("size") or {}
    shortest = settings.get("min_pixels") or size.get("shortest_edge") or PixelLimits.shortest
    longest = settings.get("max_pixels") or size.get("longest_edge") or PixelLimits.longest
    return config, PixelLimits(shortest, longest), []
