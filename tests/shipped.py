"""The recipes that are shipped, and how tests read them."""

from __future__ import annotations

from pathlib import Path

from vt_trl.config import VTGRPOConfig
from vt_trl.sft import VTSFTConfig

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
ON_A_CPU = ("--use_cpu", "true", "--bf16", "false")


def kind_of(path: Path) -> type:
    """The settings of the trainer that a recipe is for."""
    return VTSFTConfig if "sft" in path.stem.split("_") else VTGRPOConfig
