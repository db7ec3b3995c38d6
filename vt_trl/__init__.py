"""vt_trl: train vision-language models to look only as closely as a question needs.

Names are imported on first use, so that ``vt-trl --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "VisionThinkPipeline": "vt_trl.pipeline",
    "VTGRPOConfig": "vt_trl.config",
    "VTGRPOTrainer": "vt_trl.trainer",
    "Environment": "vt_trl.envs",
    "DirectEnv": "vt_trl.envs",
    "ResizeEnv": "vt_trl.envs",
    "Done": "vt_trl.types",
    "Observation": "vt_trl.types",
    "Rollout": "vt_trl.types",
    "RolloutStatus": "vt_trl.types",
    "load_rows": "vt_trl.data",
    "train": "vt_trl.run",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
