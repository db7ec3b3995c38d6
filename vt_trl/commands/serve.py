"""``vt-trl serve MODEL [--upstream URL] [--port N] ...``"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vt_trl.errors import ConfigError

if TYPE_CHECKING:
    from vt_trl.serving.app import Service

KEY = "VT_TRL_API_KEY"
_HERE = ("127.0.0.1", "::1", "localhost")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "vt-trl serve", description="An OpenAI-compatible endpoint that plays whole episodes.", allow_abbrev=False
    )
    parser.add_argument("model", help="a folder or a Hub name; with --upstream its processor alone is loaded")
    parser.add_argument("--name", help="what clients call the model (default: the last part of MODEL)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--upstream", metavar="URL", help="a vLLM server's .../v1 that samples the turns")
    parser.add_argument("--upstream-model", help="the model's name there (default: MODEL)")
    parser.add_argument("--environment", default="resize", help="resize, direct, or module:Class")
    parser.add_argument("--environment-args", default="{}", help="its settings as JSON, as in the model's recipe")
    parser.add_argument("--max-turn-tokens", type=int, default=1024, help="sampled tokens of a turn")
    parser.add_argument("--max-completion-length", type=int, default=8192, help="tokens after the prompt, all told")
    parser.add_argument("--revision", default=None)
    parser.add_argument("--backend", default="auto", help="auto, vllm or transformers, in this process")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-batch", type=int, default=32, help="episodes under way at a time")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-requests", type=int, default=256, help="in flight; more are answered with 429")
    limits.add_argument("--timeout", type=float, default=300.0, help="seconds until 504")
    limits.add_argument("--max-image-bytes", type=int, default=20 * 2**20)
    limits.add_argument("--max-image-pixels", type=int, default=None, help="as declared (default: 89 million)")
    limits.add_argument("--max-body-bytes", type=int, default=32 * 2**20)
    limits.add_argument("--shutdown-seconds", type=int, default=60, help="for requests in flight when it is ended")
    limits.add_argument(
        "--allow-image-hosts", nargs="+", default=(), metavar="HOST", help="fetch https images from these (default: none)"
    )
    return parser


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    try:
        import uvicorn

        from vt_trl.serving.app import make_app
    except ImportError as error:
        raise ConfigError(f"vt-trl serve needs {error.name}: pip install 'vt-trl[serve]'.") from error
    service = make_service(options)
    if options.host not in _HERE and KEY not in os.environ:
        print(f"Everybody who can reach {options.host} can use this server; set {KEY}.", file=sys.stderr)
    uvicorn.run(
        make_app(service),
        host=options.host,
        port=options.port,
        timeout_graceful_shutdown=options.shutdown_seconds,
        server_header=False,
    )


def make_service(options: argparse.Namespace) -> Service:
    """Model, limits and key of a command line. Raises ConfigError for what cannot work."""
    from vt_trl.envs import make_environment
    from vt_trl.images import MAX_DECODED_PIXELS
    from vt_trl.serving.app import Service
    from vt_trl.serving.limits import ServeLimits
    from vt_trl.serving.pictures import Pictures

    limits = ServeLimits(
        image_bytes=options.max_image_bytes,
        image_pixels=options.max_image_pixels or MAX_DECODED_PIXELS,
        body_bytes=options.max_body_bytes,
        requests=options.max_requests,
        seconds=options.timeout,
    )
    if min(options.max_turn_tokens, options.max_completion_length, options.max_batch) < 1:
        raise ConfigError("--max-turn-tokens, --max-completion-length and --max-batch count; they must be 1 or more.")
    key = os.environ.get(KEY)
    if key is not None and not key.strip():
        raise ConfigError(f"{KEY} is empty; set a key, or unset it to let everybody in.")
    pictures = Pictures(limits, options.allow_image_hosts)
    environment = make_environment(options.environment, json_option(options.environment_args, "--environment-args"))
    engine = _upstream(options, environment) if options.upstream else _local(options, environment)
    name = options.name or options.model.rstrip("/").rpartition("/")[2]
    return Service(engine, name, limits, pictures, key)


def _local(options: argparse.Namespace, environment):
    from vt_trl.generation.standalone import Checkpoint, open_runner
    from vt_trl.rollout import Limits
    from vt_trl.serving.engine import LocalEngine

    checkpoint = Checkpoint(options.model, options.revision, options.backend, options.dtype, options.max_batch)
    limits = Limits(options.max_turn_tokens, options.max_completion_length)
    return LocalEngine(open_runner(checkpoint, environment, limits), options.max_batch)


def _upstream(options: argparse.Namespace, environment):
    from transformers import AutoProcessor

    from vt_trl.serving.upstream import UpstreamEngine

    try:
        processor = AutoProcessor.from_pretrained(options.model, revision=options.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model is {options.model!r}, whose processor does not load: {error}") from error
    model = options.upstream_model or options.model
    return UpstreamEngine(options.upstream, model, environment, processor, options.max_turn_tokens, options.timeout)
