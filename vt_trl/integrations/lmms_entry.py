"""What lmms-eval finds at its entry point ``lmms_eval.models``; imports neither torch nor the model's module."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The model ``vt_trl``, which speaks lmms-eval's chat interface only."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vt_trl", chat_class_path="vt_trl.integrations.lmms_model.VisionThinkModel")
