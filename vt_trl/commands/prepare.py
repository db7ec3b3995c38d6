"""``vt-trl prepare STEP ...``: the steps of :mod:`data_prep`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from data_prep import STEPS


class _Step(argparse.Action):
    """Takes the step's name and all that follows it, which the step's own parser reads at once."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:  # noqa: ANN001 - argparse's signature
        name, *rest = values
        if name not in STEPS:
            parser.error(f"there is no step {name!r}; choose from {', '.join(STEPS)}")
        namespace.step = importlib.import_module(STEPS[name].module)
        namespace.options = namespace.step.parser().parse_args(rest)


def parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:<10}{step.help}" for name, step in STEPS.items())
    parser = argparse.ArgumentParser(
        "vt-trl prepare",
        description=f"Make rows to train on.\n\nsteps:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("step", nargs=argparse.PARSER, action=_Step, help="and its options; see STEP --help")
    return parser


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int | None:
    return options.step.run(options.options)
