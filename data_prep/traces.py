"""Cold-start traces: a strong model plays the environment of training, and what is right and well-formed is kept.

A trace is a row with ``replies``: one (an answer at once) or two (a call for the full picture, then an answer). Wrong
and malformed tries are rejected, counted by reason, and kept in ``rejected.jsonl``. `vt-trl sft` trains on the rest.

    vt-trl prepare traces --dataset ROWS --model gpt-4o --out FOLDER
    vt-trl prepare traces --dataset ROWS --writer local --model Qwen/Qwen2.5-VL-72B-Instruct --out FOLDER
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep import main
from data_prep.trace_options import add_trace_options, run_traces
from data_prep.work import model_print
from vt_trl.commands.options import json_option
from vt_trl.errors import ConfigError

if TYPE_CHECKING:
    from data_prep.rationales import RationaleFilters
    from data_prep.writers import Writer
    from vt_trl.boxes import Sight


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vt-trl prepare traces", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_trace_options(parser, environment="resize", attempts=2, samples=1, hygiene=None)
    parser.add_argument("--out", required=True, type=Path, help="folder for the traces")
    add_writer_options(parser)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument(
        "--no-steer", action="store_true", help="do not tell the writer which route rows with needs_full want"
    )
    parser.add_argument(
        "--filter-model", default=None, help="also ask this model whether looks show something and texts are logical"
    )
    parser.add_argument("--filter-args", default="{}", help="JSON: settings of its endpoint; never a key")
    return parser


def add_writer_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Who plays the environment."""
    parser.add_argument("--writer", choices=("openai", "local"), default="openai", help="an endpoint, or a checkpoint")
    parser.add_argument("--model", required=required, help="name at the endpoint, or id or folder of a checkpoint")
    parser.add_argument(
        "--endpoint-args",
        default="{}",
        help="JSON: api, base_url, concurrency, requests_per_minute, prices, ...; never a key",
    )
    parser.add_argument("--backend", default="auto", help="of a local writer: auto, vllm or transformers")
    parser.add_argument("--dtype", default="auto", help="of a local writer: auto, bfloat16, float16 or float32")
    parser.add_argument("--max-batch", type=int, default=64, help="of a local writer: sequences at a time")
    parser.add_argument("--max-turn-tokens", type=int, default=2048, help="tokens of one reply at most")


def run(options: argparse.Namespace) -> None:
    """Write traces; a run that was killed or stopped goes on when it is started again.

    Raises ConfigError, DataError, and JudgeOutage when the writer or the judge cannot be reached.
    """
    from data_prep.speaking import Prices, spent
    from vt_trl.envs import make_environment

    args = json_option(options.environment_args, "--environment-args")
    plain = make_environment(options.environment, args, sight_of(options))
    prices = Prices.of(json_option(options.endpoint_args, "--endpoint-args").get("prices"), "--endpoint-args")
    filters = make_filters(options)
    try:
        run_traces(
            options,
            lambda: make_writer(options, plain, steered=not options.no_steer),
            plain,
            step="traces",
            written_by=options.model,
            steered=not options.no_steer,
            filters=filters,
            spent=lambda counts: {"writer": spent(counts, "writer", options.model, prices)},
        )
    finally:
        if filters:
            filters.close()


def sight_of(options: argparse.Namespace) -> Sight | None:
    """How a local writer sees pictures; of one behind an endpoint it is what ``boxes`` in its settings says."""
    from vt_trl.generation.standalone import Checkpoint, open_parts

    return None if options.writer == "openai" else open_parts(Checkpoint(options.model)).sight


def make_writer(options: argparse.Namespace, plain: Any, steered: bool) -> Writer:
    """The writer of the options; ``steered``: it is told which route a row wants."""
    from data_prep.speaking import EndpointSpeaker
    from data_prep.writers import EndpointWriter, LocalWriter, Steered
    from vt_trl.generation.base import SamplingSettings
    from vt_trl.generation.standalone import Checkpoint, open_runner
    from vt_trl.rollout import Limits

    if options.samples > 1 and not options.temperature:
        raise ConfigError(
            f"--samples is {options.samples} and --temperature {options.temperature}: without a temperature all "
            f"samples of a row are equal. Set --temperature 0.7, say, or --samples 1."
        )
    environment = (lambda: Steered(plain())) if steered else plain
    if options.writer == "openai":
        settings = json_option(options.endpoint_args, "--endpoint-args")
        settings.pop("prices", None)
        speaker = EndpointSpeaker(
            options.model,
            "the writer is openai",
            "--endpoint-args",
            options.temperature,
            options.max_turn_tokens,
            **settings,
        )
        return EndpointWriter(speaker, environment, options.seed)
    checkpoint = Checkpoint(options.model, backend=options.backend, dtype=options.dtype, max_batch=options.max_batch)
    turns = environment().max_turns
    limits = Limits(options.max_turn_tokens, options.max_turn_tokens * turns + 8192)  # and the full picture
    about = {"writer": "local", "model": model_print(options.model), "temperature": options.temperature}
    about |= {"max_turn_tokens": options.max_turn_tokens, "seed": options.seed}
    about |= {"backend": "vllm" if checkpoint.uses_vllm else "transformers", "dtype": checkpoint.torch_dtype}
    settings = SamplingSettings(temperature=options.temperature, seed=options.seed)
    return LocalWriter(partial(open_runner, checkpoint, environment, limits), settings, about)


def make_filters(options: argparse.Namespace) -> RationaleFilters | None:
    """The filters on looks and texts, where they are wanted."""
    from data_prep.rationales import RationaleFilters

    if options.filter_model is None:
        return None
    return RationaleFilters(options.filter_model, **json_option(options.filter_args, "--filter-args"))


if __name__ == "__main__":
    main(parser(), run)
