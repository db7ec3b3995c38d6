"""``vt-trl ask --image PICTURE ... --question TEXT [--model MODEL] [--save-pictures FOLDER]``"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vt_trl.commands.options import add_model_options, json_option, model_settings

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"  # the base model of VisionThink (arXiv 2507.13348)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vt-trl ask", description="Ask a policy about a picture, and see its turns.")
    parser.add_argument("--image", required=True, nargs="+", help="picture files; several where the policy takes them")
    parser.add_argument("--question", required=True)
    parser.add_argument("--model", default=MODEL, help=f"a folder or a Hub name (default: {MODEL})")
    parser.add_argument("--policy", default=None, help="two-turn, zoom, look, always-full, ... (default: as trained)")
    parser.add_argument("--save-pictures", default=None, metavar="FOLDER", help="keep what the model saw, as PNG")
    add_model_options(parser)
    return parser


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from vt_trl.ask import ask
    from vt_trl.images import load_image

    # Before a model is loaded: a wrong name should not take minutes.
    images = [load_image(one) for one in options.image]
    ask(
        images,
        options.question,
        options.model,
        folder=options.save_pictures,
        policy=options.policy,
        environment_args=json_option(options.environment_args, "--environment-args"),
        **model_settings(options),
    )
