"""The recipes that are shipped, and how tests read them."""

from __future__ import annotations

from pathlib import Path

import yaml

from vt_trl.config import VTGRPOConfig
from vt_trl.loop.recipe import is_loop
from vt_trl.sft import VTSFTConfig

ROOT = Path(__file__).resolve().parents[1]
_ALL = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
LOOPS = [path for path in _ALL if is_loop(yaml.safe_load(path.read_text()))]
RECIPES = [path for path in _ALL if path not in LOOPS]  # of one run each
ON_A_CPU = ("--use_cpu", "true", "--bf16", "false")


def kind_of(path: Path) -> type:
    """The settings of the trainer that a recipe is for."""
    return VTSFTConfig if "sft" in path.stem.split("_") else VTGRPOConfig
