"""Seed traces by distillation: a vision model describes the picture, a reasoner that reads no picture solves it.

Each question is solved several times from the description (OpenVLThinker, arXiv 2503.17352: 4), the shortest right
answer is kept, and its reflection is cut. The traces are those of `vt-trl prepare traces`, for `vt-trl sft`.

    vt-trl prepare distill --dataset ROWS --captioner-model gpt-4o --reasoner-model deepseek-reasoner --out FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep import main
from data_prep.trace_options import add_trace_options, run_traces
from vt_trl.commands.options import json_option
from vt_trl.errors import ConfigError

if TYPE_CHECKING:
    from data_prep.describing import DescribingWriter

_KINDS = ("openai", "local")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vt-trl prepare distill", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_trace_options(parser, environment="single", attempts=1, samples=4, hygiene="{}")
    parser.add_argument("--out", required=True, type=Path, help="folder for the traces")
    for name, what in (("captioner", "describes pictures"), ("reasoner", "answers from descriptions")):
        parser.add_argument(f"--{name}", choices=_KINDS, default="openai", help="an endpoint, or a checkpoint here")
        parser.add_argument(f"--{name}-model", required=True, help=f"who {what}: a name there, or an id or a folder")
        parser.add_argument(
            f"--{name}-args",
            default="{}",
            help="JSON: base_url, concurrency, prices, ... or backend, dtype, max_batch, ...; never a key",
        )
    parser.add_argument("--temperature", type=float, default=0.6, help="of the reasoner")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of one answer of the reasoner")
    parser.add_argument("--caption-tokens", type=int, default=1024, help="of one description")
    parser.add_argument("--caption-pixels", type=int, default=1_048_576, help="of the picture that is described")
    parser.add_argument("--show-question", action="store_true", help="tell the captioner what will be asked")
    return parser


def run(options: argparse.Namespace) -> None:
    """Write traces; a run that was killed or stopped goes on when it is started again.

    Raises ConfigError, DataError, and JudgeOutage when a model cannot be reached.
    """
    from data_prep.speaking import Prices, spent
    from vt_trl.envs import make_environment

    if options.samples > 1 and not options.temperature:
        raise ConfigError(
            f"--samples is {options.samples} and --temperature {options.temperature}: without a temperature all "
            f"samples of a row are equal. Set --temperature 0.6, say, or --samples 1."
        )
    environment = make_environment(options.environment, json_option(options.environment_args, "--environment-args"))

    def costs(counts: Mapping[str, int]) -> dict[str, Any]:
        found = {}
        for name, model in (("captioner", options.captioner_model), ("reasoner", options.reasoner_model)):
            option = f"--{name}-args"
            prices = Prices.of(json_option(getattr(options, f"{name}_args"), option).get("prices"), option)
            found[name] = spent(counts, name, model, prices)
        return found

    run_traces(
        options,
        lambda: make_writer(options, environment),
        environment,
        step="distill",
        written_by=f"{options.reasoner_model} from descriptions by {options.captioner_model}",
        spent=costs,
        usual={"as_seen": True},
    )


def make_writer(options: argparse.Namespace, environment: Any) -> DescribingWriter:
    """Both models, neither loaded yet."""
    from data_prep.describing import DescribingWriter
    from data_prep.speaking import make_role

    captioner = make_role(
        "captioner",
        options.captioner,
        options.captioner_model,
        json_option(options.captioner_args, "--captioner-args"),
        temperature=0.0,
        max_tokens=options.caption_tokens,
        max_pixels=options.caption_pixels,
    )
    reasoner = make_role(
        "reasoner",
        options.reasoner,
        options.reasoner_model,
        json_option(options.reasoner_args, "--reasoner-args"),
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )
    return DescribingWriter(captioner, reasoner, environment, options.caption_pixels, options.show_question)


if __name__ == "__main__":
    main(parser(), run)
