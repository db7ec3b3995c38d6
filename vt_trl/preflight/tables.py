"""The tables of docs/scaling.md: ``python -m vt_trl.preflight.tables docs/scaling.md [--config FOLDER]``.

Every number in them comes from the preflight; a test makes them anew and compares.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoConfig, PretrainedConfig

from vt_trl.errors import ConfigError
from vt_trl.preflight import Estimate, Machine, PixelLimits, Preflight, estimate, preflight
from vt_trl.preflight.advice import CONFIG, Advice
from vt_trl.preflight.estimate import PARTS, Load
from vt_trl.preflight.show import gib

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SEVEN = "Qwen/Qwen2.5-VL-7B-Instruct"
MFUS = (0.2, 0.3, 0.4)

# What differs from the 7B model in the published config.json of Qwen/Qwen2.5-VL-3B-Instruct.
_THREE_TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "layer_types": ["full_attention"] * 36,
}


@dataclass(frozen=True)
class Row:
    """A recipe on some hardware. ``gpu``: GiB that such a GPU reports, somewhat less than its name says."""

    hardware: str
    gpu: float
    recipe: str
    processes: int = 1
    sharding: str = "none"
    machines: int = 1
    three: bool = False
    overrides: tuple[str, ...] = ()

    def preflight(self, seven: PretrainedConfig, *extra: str) -> Preflight:
        return preflight(
            RECIPES / f"{self.recipe}.yaml",
            (*self.overrides, *extra),
            self.gpu,
            self.processes,
            self.sharding,
            three_billion(seven) if self.three else seven,
            machines=self.machines,
            limits=PixelLimits(),  # of the published processors of both models
            console=Console(quiet=True),
        )


HARDWARE = (
    Row("1 x 24 GB", 23.5, "efficient_lora"),
    Row("1 x 24 GB", 23.5, "efficient_lora", three=True),
    Row("1 x 40 GB", 39.4, "efficient_lora"),
    Row("1 x 40 GB", 39.4, "efficient_lora", three=True),
    Row("1 x 40 GB", 39.4, "general_qwen3_lora"),
    Row("1 x 80 GB", 79.0, "efficient_lora"),
    Row("1 x 80 GB", 79.0, "general_qwen3_lora"),
    Row("8 x 80 GB", 79.0, "efficient_lora", 8, overrides=("--gradient_accumulation_steps", "1")),
    Row("8 x 80 GB", 79.0, "efficient_full", 8, "zero3"),
    Row("8 x 80 GB", 79.0, "efficient_full", 8, "fsdp2"),
    Row("8 x 80 GB", 79.0, "general_gpt4o", 8, "zero3"),
    Row("8 x 80 GB", 79.0, "general_qwen3_full", 8, "zero3"),
)

# 512 rollouts per update as in the paper: 32 processes x 16 x 1, or x 2 x 8.
_PAPER = ("--gradient_accumulation_steps", "1")
_SMALLER = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "8")
PLAN = (
    Row("4 x 8 H100", 79.0, "efficient_full", 32, "zero3", 4, overrides=_PAPER),
    Row("4 x 8 H100", 79.0, "efficient_full", 32, "zero3", 4, overrides=_SMALLER),
    Row("4 x 8 H100", 79.0, "general_gpt4o", 32, "zero3", 4, overrides=_PAPER),
)


def three_billion(seven: PretrainedConfig) -> PretrainedConfig:
    """The configuration of Qwen2.5-VL-3B, from that of the 7B model."""
    values = seven.to_dict()
    values["text_config"] |= _THREE_TEXT
    values["vision_config"] |= {"out_hidden_size": 2048}
    values["tie_word_embeddings"] = values["text_config"]["tie_word_embeddings"] = True
    return type(seven).from_dict(values)


def hardware_table(seven: PretrainedConfig) -> str:
    """Recipes as shipped on common hardware, and what to change where they do not fit."""
    lines = _head("hardware", "recipe", "typical", "longest", "to fit typical rollouts", "to fit the longest, too")
    for row in HARDWARE:
        result = row.preflight(seven)
        words = [f"`{row.recipe}`"] + ["3B model"] * row.three
        words += [row.sharding.replace("none", "DDP")] * (row.processes > 1)
        peaks = [_peak(load) for load in (result.estimate.typical, result.estimate.longest)]
        hopeless = result.needed is not None and not result.needed.enough
        safe = "-" if hopeless else _changes(result.safe)
        lines.append(_line(row.hardware, ", ".join(words), *peaks, _changes(result.needed), safe))
    return "\n".join(lines)


@dataclass(frozen=True)
class Plan:
    """A row of the paper plan after the changes with which typical rollouts fit."""

    row: Row
    overrides: tuple[str, ...]
    estimate: Estimate

    @classmethod
    def make(cls, row: Row, seven: PretrainedConfig) -> Plan:
        needed = row.preflight(seven).needed
        words = needed.overrides() if needed else []
        return cls(row, (*row.overrides, *words), row.preflight(seven, *words).estimate)

    @property
    def name(self) -> str:
        """The recipe, samples per micro-batch and micro-batches per update."""
        args = self.estimate.setup.args
        return f"`{self.row.recipe}`, {args.per_device_train_batch_size} x {args.gradient_accumulation_steps}"


def memory_tables(plans: Sequence[Plan]) -> str:
    """GiB per rank and phase."""
    blocks = []
    for plan in plans:
        row, loads = plan.row, (plan.estimate.typical, plan.estimate.longest)
        place = f"{row.processes} processes on {row.machines} machines, {row.sharding}"
        blocks += [f"**`{row.recipe}`**, {place}, with `{' '.join(plan.overrides)}`:", ""]
        parts = [part for part in PARTS if any(phase.parts[part] for load in loads for phase in load.phases)]
        blocks += _head("GiB per rank", *parts, "typical", "longest")
        for typical, longest in zip(*(load.phases for load in loads), strict=True):
            cells = [gib(typical.parts[part]) for part in parts]
            blocks.append(_line(typical.name, *cells, gib(typical.total), gib(longest.total)))
        blocks.append("")
    return "\n".join(blocks).strip()


def token_table(plans: Sequence[Plan]) -> str:
    """Rollouts and tokens of one optimizer step, all ranks together; operations and traffic of one rank."""
    lines = _head("recipe", "rollouts", "visual", "text", "sampled", "computed", "PFLOP per rank", "GB received")
    for plan in plans:
        tokens, seconds = plan.estimate.tokens, plan.estimate.seconds
        counts = (tokens.rollouts, tokens.visual, tokens.text, tokens.sampled, tokens.computed)
        numbers = [f"{plan.row.processes * number:,.0f}" for number in counts]
        numbers += [f"{seconds.operations / 1e15:.2f}", f"{seconds.received / 1e9:.0f}"]
        lines.append(_line(plan.name, *numbers))
    return "\n".join(lines)


def time_table(plans: Sequence[Plan]) -> str:
    """Seconds per optimizer step at several assumed shares of the peak."""
    lines = _head("recipe", "assumed MFU", "generation", "passes", "update", "seconds per step", "steps per hour")
    for plan in plans:
        for mfu in MFUS:
            seconds = estimate(replace(plan.estimate.setup, machine=Machine(mfu=mfu))).seconds
            cells = (seconds.generation, seconds.passes, seconds.update, seconds.total)
            numbers = [f"{number:.1f}" for number in cells]
            lines.append(_line(plan.name, f"{mfu:.0%}", *numbers, f"{3600 / seconds.total:.0f}"))
    return "\n".join(lines)


def with_tables(text: str, seven: PretrainedConfig) -> str:
    """``text`` with what stands between each pair of markers replaced. Raises ConfigError without the markers."""
    plans = [Plan.make(row, seven) for row in PLAN]
    tables = {
        "hardware": hardware_table(seven),
        "memory": memory_tables(plans),
        "tokens": token_table(plans),
        "time": time_table(plans),
    }
    for name, table in tables.items():
        start, end = f"<!-- preflight table: {name} -->", f"<!-- end of preflight table: {name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ConfigError(f"The text has no pair of markers {start} and {end}.")
        text = f"{before}{start}\n{table}\n{end}{after}"
    return text


def _head(*names: str) -> list[str]:
    return [_line(*names), "|" + "---|" * len(names)]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _peak(load: Load) -> str:
    return f"{gib(load.peak.total)} ({load.peak.name})"


def _changes(advice: Advice | None) -> str:
    if advice is None:
        return "nothing"
    words = []
    for change in advice.changes:
        value: Any = change.value
        if change.setting == "environment_args":
            value = f"max_pixels {value['max_pixels']}"
        elif isinstance(value, dict):
            value = json.dumps(value)
        words.append(f"launch with `{value}`" if change.setting == CONFIG else f"`{change.setting}`: {value}")
    return "; ".join(words) + ("" if advice.enough else " (nothing milder fits)")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vt_trl.preflight.tables", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a text with the markers")
    parser.add_argument("--config", default=SEVEN, help="folder or name of the 7B model's configuration")
    options = parser.parse_args(argv)
    text = with_tables(options.file.read_text(encoding="utf-8"), AutoConfig.from_pretrained(options.config))
    options.file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
