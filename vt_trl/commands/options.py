"""Options that several commands share."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vt_trl.errors import ConfigError


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded and how far it may write."""
    parser.add_argument(
        "--backend", default="auto", choices=("auto", "vllm", "transformers"), help="auto: vllm where it and a GPU are"
    )
    parser.add_argument(
        "--device", default=None, help="transformers: cpu, cuda, cuda:1 (default: a GPU if there is one)"
    )
    parser.add_argument("--dtype", default="auto", help="auto (bfloat16 on a GPU), bfloat16, float16, float32")
    parser.add_argument("--max-turn-tokens", type=int, default=None, help="of one turn (default: as trained, or 2048)")
    parser.add_argument("--max-completion-length", type=int, default=None, help="tokens of all turns and tool replies")
    parser.add_argument("--max-model-length", type=int, default=None, help="vllm: its context (default: 32768)")
    parser.add_argument("--environment-args", default="{}", help="as JSON, e.g. '{\"max_pixels\": 1000000}'")


def model_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What ``add_model_options`` was given, for :class:`vt_trl.inference.PolicyModel`; defaults are left to it."""
    names = ("backend", "device", "dtype", "max_turn_tokens", "max_completion_length", "max_model_length")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def json_option(text: str, option: str) -> dict[str, Any]:
    """A mapping from the command line. Raises ConfigError for anything else."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{option} is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{option} must map names to settings, e.g. '{{\"max_pixels\": 1000000}}'.")
    return value
