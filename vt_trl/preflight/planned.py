"""Reading a recipe as if it ran elsewhere: on more processes than there are here, or on a GPU that is not here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from vt_trl.config import VTGRPOConfig
from vt_trl.recipe import RunArguments, parse_recipe
from vt_trl.yaml_file import read_yaml


def parse_planned(recipe: str | Path, overrides: Sequence[str], processes: int) -> tuple[RunArguments, VTGRPOConfig]:
    """Read a recipe with every check it will meet on ``processes`` processes with a GPU each. Raises ConfigError."""
    given = given_settings(recipe, overrides)
    # transformers refuses bf16 where it sees neither a GPU nor use_cpu; a recipe with a use_cpu of its own keeps it.
    elsewhere = not torch.cuda.is_available() and "use_cpu" not in given
    with world_of(processes):
        run, args = parse_recipe(recipe, [*overrides, "--use_cpu", "true"] if elsewhere else overrides)
    if elsewhere:
        args.use_cpu = False
        if not given & {"bf16", "fp16"}:
            args.bf16 = True  # VTGRPOConfig's default on a GPU
    return run, args


def given_settings(recipe: str | Path, overrides: Sequence[str]) -> set[str]:
    """Names of the settings that a recipe and the command line set themselves."""
    words = (text[2:].partition("=")[0] for text in overrides if text.startswith("--"))
    return {*read_yaml(Path(recipe)), *words}


@contextmanager
def world_of(processes: int) -> Iterator[None]:
    """Let settings believe that ``processes`` processes run: sizes of generations and whole groups depend on it."""
    VTGRPOConfig.world_size = property(lambda args: processes)  # shadows the one of TrainingArguments
    try:
        yield
    finally:
        del VTGRPOConfig.world_size
