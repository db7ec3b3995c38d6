"""How many processes run and what they share: from accelerate's environment, from its YAML, or as told."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vt_trl.errors import ConfigError

Sharding = Literal["none", "zero2", "zero3", "fsdp2"]
SHARDINGS: tuple[str, ...] = get_args(Sharding)


@dataclass(frozen=True)
class Launch:
    """What the launcher decides, one process per GPU.

    ``none`` with several processes is DDP: a whole copy each. ZeRO-2 divides gradients and optimizer states, ZeRO-3
    and FSDP2 the weights, too.
    """

    processes: int = 1
    sharding: Sharding = "none"
    machines: int = 1
    offload_optimizer: bool = False  # DeepSpeed's, or FSDP's offload_params, which moves states along
    offload_weights: bool = False
    reshard: bool = True  # FSDP2: give gathered weights back after the forward

    def __post_init__(self) -> None:
        if self.sharding not in SHARDINGS:
            raise ConfigError(f"sharding is {self.sharding!r}; use one of {', '.join(SHARDINGS)}.")
        if self.processes < 1:
            raise ConfigError(f"processes is {self.processes}; it must be 1 or more.")

    def __str__(self) -> str:
        processes = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        machines = f" on {self.machines} machines" if self.machines > 1 else ""
        whole = "a whole copy each" if self.processes > 1 else "nothing divided"
        return f"{processes}{machines}, {self.sharding if self.sharding != 'none' else whole}"

    @property
    def weight_shards(self) -> int:
        return self.processes if self.sharding in ("zero3", "fsdp2") else 1

    @property
    def state_shards(self) -> int:
        """Into how many parts gradients and optimizer states are divided."""
        return self.processes if self.sharding != "none" else 1


def launch_from_environment() -> Launch:
    """What ``accelerate launch`` or ``torchrun`` has set for this process; one process without sharding otherwise."""
    env = os.environ
    processes = int(env.get("WORLD_SIZE", 1))
    machines = max(1, processes // int(env.get("LOCAL_WORLD_SIZE", processes)))
    if env.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        settings: dict[str, Any] = {
            "zero_stage": env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2),
            "offload_optimizer_device": env.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"),
            "offload_param_device": env.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"),
            "deepspeed_config_file": env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"),
        }
        return _deepspeed(settings, processes, machines)
    if env.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        names = ("fsdp_version", "fsdp_offload_params", "fsdp_reshard_after_forward")
        return _fsdp({name: env.get(name.upper()) for name in names}, processes, machines)
    return Launch(processes, machines=machines)


def launch_from_file(path: str | Path) -> Launch:
    """What ``accelerate launch --config_file PATH`` sets. Raises ConfigError for a file that accelerate refuses."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    if not Path(path).is_file():
        raise ConfigError(f"{path} is no file; give a YAML as `accelerate launch --config_file` takes it.")
    try:
        config = load_config_from_file(str(path))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no configuration of accelerate: {error}") from error
    processes = max(1, config.num_processes)
    if config.distributed_type == DistributedType.DEEPSPEED:
        return _deepspeed(config.deepspeed_config, processes, config.num_machines)
    if config.distributed_type == DistributedType.FSDP:
        return _fsdp(config.fsdp_config, processes, config.num_machines)
    return Launch(processes, machines=config.num_machines)


def _deepspeed(settings: Mapping[str, Any], processes: int, machines: int) -> Launch:
    settings = dict(settings)
    file = settings.get("deepspeed_config_file")
    if file and file != "none":
        zero = json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {})
        settings["zero_stage"] = zero.get("stage", 0)
        for part in ("optimizer", "param"):
            settings[f"offload_{part}_device"] = zero.get(f"offload_{part}", {}).get("device")
    stage = int(settings.get("zero_stage") or 0)
    if stage not in (2, 3):
        raise ConfigError(f"zero_stage is {stage}; the preflight knows 2 and 3. Use one of them.")
    optimizer, weights = (settings.get(f"offload_{part}_device") or "none" for part in ("optimizer", "param"))
    return Launch(processes, f"zero{stage}", machines, optimizer != "none", weights != "none")


def _fsdp(settings: Mapping[str, Any], processes: int, machines: int) -> Launch:
    version = int(settings.get("fsdp_version") or 1)
    if version != 2:
        raise ConfigError(f"fsdp_version is {version}; the preflight knows 2. Set fsdp_version: 2.")
    offload = _true(settings.get("fsdp_offload_params"), False)
    reshard = _true(settings.get("fsdp_reshard_after_forward"), True)
    return Launch(processes, "fsdp2", machines, offload, offload, reshard)


def _true(value: Any, default: bool) -> bool:
    return default if value is None else str(value).lower() == "true"
