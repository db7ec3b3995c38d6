"""Seconds of one optimizer step on paper: operations and traffic, divided by assumed speeds. Never a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from vt_trl.preflight.flops import Forward, decode_seconds, forward_flops, traffic, update_flops
from vt_trl.preflight.micro import work
from vt_trl.preflight.setup import Setup


@dataclass(frozen=True)
class Seconds:
    """Seconds of one optimizer step; a generation is shared over the updates it serves. The judge is not in it.

    ``operations``: of one rank in passes and update; ``received``: bytes one rank receives for them.
    """

    generation: float
    passes: float
    update: float
    operations: float
    received: float

    @property
    def total(self) -> float:
        return self.generation + self.passes + self.update


def step_seconds(setup: Setup, cache: int) -> Seconds:
    """Seconds for the assumed workload on the assumed machine; ``cache``: tokens the key-value cache holds.

    A pass takes as long as the slower of computing and receiving, which overlap. Not in it: the judge, data loading,
    pushing weights to the engine, waking and sleeping.
    """
    args, counts, machine = setup.args, setup.counts, setup.machine
    updated = update_flops(_forward(setup, training=True), setup.training, counts.head_trained)
    passed = _forward(setup, training=False)
    per_pass, per_batch, per_step = traffic(counts, setup.launch, setup.precision.compute)
    speed = machine.network if setup.launch.machines > 1 else machine.link
    computing = machine.peak * machine.mfu

    def longer(operations: float, received: float) -> float:
        return max(operations / computing, received / speed)

    steps = args.gradient_accumulation_steps
    passes = int(setup.old_pass) + int(args.beta != 0)
    # A pass of the same frozen tower finds the features of the one before.
    again = setup.run.lora != "none" and setup.frozen_towers > 0
    towers = min(passes, 1) if again else passes
    forwards = args.steps_per_generation / setup.updates  # of each pass
    scored = forwards * (passes * (passed.language + passed.head) + towers * passed.vision)
    return Seconds(
        generation=_generation(setup, cache) / setup.updates,
        passes=longer(scored, passes * forwards * per_pass),
        update=steps * longer(updated, per_batch) + per_step / speed,
        operations=steps * updated + scored,
        received=steps * per_batch + per_step + passes * forwards * per_pass,
    )


def _forward(setup: Setup, training: bool) -> Forward:
    """Operations of the forwards of an average micro-batch."""
    batch = work(setup, "mean", training).whole
    return forward_flops(setup.widths, setup.counts, batch, setup.training.attention)


def _generation(setup: Setup, cache: int) -> float:
    """Prompts and pictures once per group, tool replies once per rollout that asks, then decoding."""
    counts, w, machine = setup.counts, setup.widths, setup.machine
    groups = setup.generated / setup.args.num_generations
    replies = setup.mean("reply_text") + setup.mean("reply_visual")
    language = 2 * counts.language * (groups * setup.routes[0][1].prompt + setup.generated * replies)
    vision = 2 * counts.vision * groups * setup.routes[-1][1].patches
    context = setup.mean("prompt") + setup.mean("completion") / 2
    sampled = setup.mean("sampled")
    decoding = decode_seconds(w, counts, setup.generated, sampled, context, cache, machine)
    longest = setup.padded.sampled - sampled  # the last rollouts run nearly alone
    decoding += decode_seconds(w, counts, 1, max(0.0, longest), setup.padded.tokens, setup.padded.tokens, machine)
    return (language + vision) / (machine.peak * machine.mfu) + decoding
