"""Arithmetic, traffic and, under stated assumptions, seconds of one optimizer step. Nothing here is measured.

Forward: 2 operations per weight and token, 4 q L per token and layer for attention over L positions (half of it where
the kernel skips what causality hides), 2 V h per position that goes through the head (Kaplan et al. 2020,
arXiv 2001.08361, table 1; PaLM, Chowdhery et al. 2022, appendix B). Backward: as much again for the inputs and as much
for trained weights. Checkpointing: one more forward of the layers. Padding is counted where it is computed, and a
shared prompt as often as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from vt_trl.preflight.activations import MicroBatch, Training
from vt_trl.preflight.counts import Counts, Widths
from vt_trl.preflight.launch import Launch


@dataclass(frozen=True)
class Machine:
    """Assumptions about the hardware and how well it is used; all of them can be replaced.

    ``peak``: dense 16-bit operations per second (NVIDIA's data sheet of the H100 SXM); ``mfu``: share of it that
    passes and updates reach; ``bandwidth``: bytes per second of the GPU's memory, and ``mbu`` the share of it that
    decoding reaches; ``network``: bytes per second and GPU between machines (one 400 Gbit/s card each), ``link``
    within one (NVLink, about 90% of its 450 GB/s per direction).
    """

    name: str = "H100 SXM"
    peak: float = 989e12
    mfu: float = 0.3
    bandwidth: float = 3.35e12
    mbu: float = 0.5
    network: float = 50e9
    link: float = 400e9

    def __str__(self) -> str:
        return (
            f"{self.name}, {self.mfu:.0%} of {self.peak / 1e12:.0f} TFLOP/s in passes and updates, {self.mbu:.0%} of "
            f"{self.bandwidth / 1e12:.2f} TB/s in decoding, {self.link / 1e9:.0f} GB/s between GPUs of a machine, "
            f"{self.network / 1e9:.0f} GB/s per GPU between machines"
        )


@dataclass(frozen=True)
class Forward:
    """Operations of one forward: language layers, vision tower, head."""

    language: float
    vision: float
    head: float

    @property
    def total(self) -> float:
        return self.language + self.vision + self.head


def forward_flops(w: Widths, counts: Counts, batch: MicroBatch, attention: str = "sdpa") -> Forward:
    """Operations of one forward of ``batch``. SDPA with a mask computes what the mask hides."""
    share = 1 if batch.padded and attention in ("sdpa", "eager") else 0.5
    pairs = batch.packing.pairs if batch.packing else share * batch.tokens * batch.length
    language = batch.tokens * 2 * counts.language + 4 * w.layers * w.queries * pairs
    per_picture = batch.patches / max(1, batch.images)
    windowed = (w.vision_layers - w.full_attention) * w.window
    reach = 4 * w.vision_hidden * (w.full_attention * per_picture + windowed)
    vision = batch.patches * (2 * counts.vision + reach)
    return Forward(float(language), float(vision), 2.0 * batch.labelled * w.vocabulary * w.hidden)


def update_flops(forward: Forward, t: Training, head_trained: bool) -> float:
    """Operations of forward and backward of a micro-batch."""
    again = 1 if t.checkpointing else 0
    language = forward.language * (1 + again + 1 + (1 if t.language else 0))
    vision = forward.vision
    if t.vision_graph:
        vision *= 1 + again + 1 + (1 if t.vision else 0)
    head = forward.head * (1 + 1 + 1 + (1 if head_trained else 0))  # the fused head computes its tiles again
    return language + vision + head


def traffic(counts: Counts, launch: Launch, compute: int) -> tuple[float, float, float]:
    """Bytes a rank receives (per pass without gradient, per micro-batch trained, per optimizer step)."""
    others = (launch.processes - 1) / launch.processes
    whole, gradients = counts.total * compute * others, counts.trained * compute * others
    if launch.sharding == "zero3":
        return whole, 2 * whole + gradients, 0.0
    if launch.sharding == "fsdp2":
        return whole, 2 * whole, gradients
    if launch.sharding == "zero2":
        return 0.0, gradients, whole
    return 0.0, 0.0, 2 * gradients


def decode_seconds(
    w: Widths, counts: Counts, rollouts: int, sampled: float, context: float, cache: int, machine: Machine
) -> float:
    """Sampling ``rollouts`` of ``sampled`` tokens with a cache of ``cache`` tokens: every iteration reads the language
    model and the cached context of all sequences that run (Pope et al. 2022, arXiv 2211.05102, section 2)."""
    running = max(1, min(rollouts, cache // max(1, round(context))))
    iterations = rollouts * sampled / running
    weights = 2 * (counts.language + w.vocabulary * w.hidden)
    read = weights + running * context * 2 * w.keys_and_values
    computed = weights * running / (machine.peak * machine.mfu)
    return iterations * (read / (machine.bandwidth * machine.mbu) + computed)
