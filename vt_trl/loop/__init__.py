"""A list of stages run one after the other, again and again: ``vt-trl loop RECIPE``, see ``docs/loop.md``.

A self-improvement loop (OpenVLThinker, arXiv 2503.17352) writes traces, fine-tunes on them, trains with rewards and
has the better model write the next traces. Here a stage is any ``vt-trl`` command that makes something; the recipe
names the stages, and one may use what another made. Read in this order: :mod:`~vt_trl.loop.recipe` (the YAML),
:mod:`~vt_trl.loop.references` (``${...}``), :mod:`~vt_trl.loop.plan` (rounds unrolled, everything checked),
:mod:`~vt_trl.loop.driver` (what runs, and when it runs again), :mod:`~vt_trl.loop.manifest` (what is known of it).
"""

from __future__ import annotations

from vt_trl.loop.driver import run_loop
from vt_trl.loop.plan import plan_loop

__all__ = ["plan_loop", "run_loop"]
