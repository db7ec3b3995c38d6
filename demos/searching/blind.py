"""The search task with boxes that are written and never shown: the paper's ablation "without real crops"."""

from __future__ import annotations

from vt_trl.envs import ZoomEnv
from vt_trl.envs.album import View
from vt_trl.envs.base import message
from vt_trl.types import INSERTED, Fault, Observation

UNSEEN = "(no picture)"


class TextBoxEnv(ZoomEnv):
    """ZoomEnv that takes every good box for a look and shows no picture for it."""

    def grant(self, wanted: View, faults: tuple[Fault, ...]) -> Observation:
        shown = super().grant(wanted, faults)
        return Observation((message(INSERTED, UNSEEN),), faults, called=True, granted=True, regions=shown.regions)
