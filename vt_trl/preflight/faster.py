"""Remarks on time: what the settings leave to be computed more often than it has to be."""

from __future__ import annotations

from vt_trl.preflight.changes import changed
from vt_trl.preflight.estimate import Estimate, estimate
from vt_trl.preflight.micro import can_pack


def speed_remarks(estimated: Estimate) -> list[str]:
    """Why prompts are computed once per rollout, and whether a larger micro-batch fits and is faster on paper."""
    setup = estimated.setup
    if setup.packed:
        larger = larger_micro_batch(estimated)
        return [larger] if larger else []
    if not can_pack(setup.config, setup.training.attention):
        return [
            f"Prompts are computed once per rollout and padded: the packed forward does not take model_type "
            f"{setup.config.model_type} with attn_implementation {setup.run.attn_implementation}."
        ]
    after = estimate(changed(setup, share_prefix=True))
    return [
        f"share_prefix is off: {estimated.tokens.computed:,.0f} positions per step and rank instead of "
        f"{after.tokens.computed:,.0f}, {estimated.seconds.total:.0f} seconds instead of {after.seconds.total:.0f}."
    ]


def larger_micro_batch(estimated: Estimate) -> str | None:
    """More rollouts of a group in a micro-batch compute its prompt and pictures fewer times. Only where typical
    rollouts still fit, and the longest as well if they did."""
    setup, args = estimated.setup, estimated.setup.args
    samples = args.per_device_train_batch_size
    if not estimated.fits_typically:
        return None
    for factor in range(args.num_generations // samples, 1, -1):
        whole = args.num_generations % (samples * factor) == 0
        if not whole or args.gradient_accumulation_steps % factor or args.steps_per_generation % factor:
            continue
        larger = {
            "per_device_train_batch_size": samples * factor,
            "gradient_accumulation_steps": args.gradient_accumulation_steps // factor,
        }
        steps = args.steps_per_generation // factor
        after = estimate(changed(setup, **larger, steps_per_generation=steps))
        worse = not after.fits_typically or (estimated.fits and not after.fits)
        if not worse and after.seconds.total < estimated.seconds.total:
            words = ", ".join(f"{name}: {value}" for name, value in larger.items())
            return (
                f"Faster on paper with the same update: {words} ({after.seconds.total:.0f} seconds per step, not "
                f"{estimated.seconds.total:.0f}), since the prompt of a group is computed fewer times."
            )
    return None
