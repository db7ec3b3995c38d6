"""Bytes per number: of weights, gradients, optimizer states and activations, as launcher and settings make them."""

from __future__ import annotations

from dataclasses import dataclass

from vt_trl.config import VTGRPOConfig
from vt_trl.preflight.launch import Launch
from vt_trl.recipe import RunArguments

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Optimizer states in bytes per trained weight, fp32 weights. 8-bit: one byte per state and one fp32 scale per 256
# (bitsandbytes, "8-bit Optimizers via Block-wise Quantization", Dettmers et al. 2022). Adafactor keeps row and column
# sums.
_STATES = {
    "adamw": 8.0,
    "ademamix": 12.0,
    "lion": 4.0,
    "rmsprop": 4.0,
    "adagrad": 4.0,
    "stable_adamw": 8.0,
    "sgd": 0.0,
    "adafactor": 0.05,
}
_BLOCK_SCALE = 4 / 256


@dataclass(frozen=True)
class Precision:
    """Bytes per number on one rank.

    ``compute`` is the type of matrix products; ``residual`` that of the language model's residual stream, which stays
    fp32 where autocast computes on fp32 weights; ``casts`` tells that autocast converts inputs and weights on the way.
    """

    frozen: int
    trained: int
    gradient: int
    state: float  # optimizer states, with the fp32 copy that DeepSpeed keeps of 16-bit weights
    compute: int
    residual: int
    adapter_input: int  # type of what an adapter's first matrix multiplies
    casts: bool
    adapter_casts: bool


def precision(run: RunArguments, args: VTGRPOConfig, launch: Launch) -> Precision:
    """The types a run computes and stores in.

    - Plain and DDP: weights are stored as ``dtype``; autocast computes in 16 bits when ``bf16`` or ``fp16`` is set;
      adapters are fp32 (peft's ``autocast_adapter_dtype``).
    - DeepSpeed with ``bf16``: 16-bit weights and gradients, fp32 weights and both Adam states with the optimizer: 16
      bytes per weight (ZeRO, Rajbhandari et al. 2020, section 3.1). TRL keeps adapters at ``dtype`` under ZeRO-3.
    - FSDP2: accelerate stores trained weights in fp32 and gathers them in 16 bits; gradients and states are fp32.
    """
    half = args.bf16 or args.fp16
    stored = BYTES[run.dtype]
    adapter = run.lora != "none"
    states = state_bytes(args.optim)
    if launch.sharding in ("zero2", "zero3"):
        weight = 2 if half else stored
        master = 4.0 if half else 0.0
        return Precision(weight, weight, weight, states + master, weight, weight, weight, False, False)
    if launch.sharding == "fsdp2":
        compute = 2 if half else stored
        return Precision(stored, 4, 4, states, compute, compute, compute, False, False)
    casts = half and stored == 4
    trained = 4 if adapter else stored
    # Adam's moments have the type of their weight; plain bf16 training is refused by run.py, yet can be asked about.
    state = states if trained == 4 else states / 2
    compute = 2 if half else stored
    return Precision(
        frozen=stored,
        trained=trained,
        gradient=trained,
        state=state,
        compute=compute,
        residual=stored,
        adapter_input=compute if half else 4,
        casts=casts,
        adapter_casts=adapter and (compute != 4 or stored != 4),
    )


def state_bytes(optim: object) -> float:
    """Bytes of optimizer state per fp32 weight for a name that transformers knows; AdamW's for one not listed."""
    name = str(getattr(optim, "value", optim))
    family = next((key for key in sorted(_STATES, key=len, reverse=True) if key in name), "adamw")
    full = _STATES[family]
    if "8bit" in name or name == "adamw_bnb_8bit":
        return full / 4 * (1 + _BLOCK_SCALE)
    if "4bit" in name:
        return full / 8 * (1 + 2 * _BLOCK_SCALE)
    return full
