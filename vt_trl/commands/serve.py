"""``vt-trl serve MODEL [--upstream URL] [--port N] ...``"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vt_trl.commands.options import add_model_options, json_option, model_settings
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
    parser.add_argument("--policy", default=None, help="two-turn, zoom, look, always-full, ... (default: as trained)")
    add_model_options(parser)
    parser.add_argument("--max-batch", type=int, default=32, help="episodes under way at a time")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-requests", type=int, default=256, help="in flight; more are answered with 429")
    limits.add_argument("--timeout", type=float, default=300.0, help="seconds until 504")
    limits.add_argument("--max-image-bytes", type=int, default=20 * 2**20)
    limits.add_argument("--max-image-pixels", type=int, default=None, help="as declared (default: 89 million)")
    limits.add_argument("--max-body-bytes", type=int, default=32 * 2**20)
    limits.add_argument("--shutdown-seconds", type=int, default=60, help="for requests in flight when it is ended")
    limits.add_argument(
        "--allow-image-hosts",
        nargs="+",
        default=(),
        metavar="HOST",
        help="fetch https images from these (default: none)",
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
    from vt_trl.images import MAX_DECODED_PIXELS
    from vt_trl.inference import PolicyModel
    from vt_trl.policies import parse_policy, trained_policy
    from vt_trl.serving.app import Service
    from vt_trl.serving.engine import LocalEngine
    from vt_trl.serving.limits import ServeLimits
    from vt_trl.serving.pictures import Pictures
    from vt_trl.serving.upstream import UpstreamEngine

    limits = ServeLimits(
        image_bytes=options.max_image_bytes,
        image_pixels=options.max_image_pixels or MAX_DECODED_PIXELS,
        body_bytes=options.max_body_bytes,
        requests=options.max_requests,
        seconds=options.timeout,
    )
    key = os.environ.get(KEY)
    if key is not None and not key.strip():
        raise ConfigError(f"{KEY} is empty; set a key, or unset it to let everybody in.")
    if options.max_batch < 1:
        raise ConfigError(f"--max-batch is {options.max_batch}; it counts episodes and must be 1 or more.")
    pictures = Pictures(limits, options.allow_image_hosts)
    model = PolicyModel(options.model, max_batch=options.max_batch, **model_settings(options))
    policy = parse_policy(options.policy) if options.policy else trained_policy(model.notes.environment)
    arguments = json_option(options.environment_args, "--environment-args")
    environment = policy.environment(model.settings_for(policy, arguments), model.sight)
    if options.upstream:
        at_server = options.upstream_model or options.model
        engine = UpstreamEngine(options.upstream, at_server, environment, model, options.timeout)
    else:
        engine = LocalEngine(model.runner(environment), model.sampling, options.max_batch)
    name = options.name or options.model.rstrip("/").rpartition("/")[2]
    return Service(engine, name, limits, pictures, key)
