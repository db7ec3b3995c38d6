"""What a loop on a CPU begins with: a tiny checkpoint, questions to be learnt by heart, and traces of the answers.

A stage of the smoke recipes (``run: module vt_trl.tiny_start``), or

    python -m vt_trl.tiny_start --out runs/start --environment resize

The traces are the gold replies of the environment: every other question takes all the looks there are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vt_trl.commands.options import json_option

SIDE = 112  # pixels: 16 visual tokens in full
HIDDEN = 64


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vt_trl.tiny_start", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", required=True, type=Path, help="folder for model, rows and traces")
    parser.add_argument("--environment", default="direct", help="whose gold replies the traces are")
    parser.add_argument("--environment-args", default="{}", help="its settings as JSON, as in a recipe")
    parser.add_argument("--rows", type=int, default=8, help="questions, at most 36")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the pictures")
    return parser


def write_start(out: Path, environment: str, settings: dict[str, Any], rows: int, seed: int) -> None:
    """Write ``out/model``, ``out/rows`` and ``out/traces``; the same options write the same files."""
    from vt_trl.boxes import Sight
    from vt_trl.envs import make_environment
    from vt_trl.errors import ConfigError
    from vt_trl.tiny import build_tiny

    answers = "0123456789abcdefghijklmnopqrstuvwxyz"
    if not 1 <= rows <= len(answers):
        raise ConfigError(f"--rows is {rows}; it is a number from 1 to {len(answers)}.")
    player = make_environment(environment, settings, Sight())()
    asked, shown = [], []
    for number in range(rows):
        looks = number % 2 == 1
        question = f"{'Look up' if looks else 'Say'} {answers[number]}"
        row = {"id": f"q{number}", "question": question, "answer": [answers[number]]}
        player.reset(row | {"image": _picture(seed, number)})
        gold = player.gold_replies(row | {"image": _picture(seed, number)})
        asked.append(row)
        shown.append(row | {"replies": gold[-1 if looks else 0]})
    texts = [text for text in dataclasses.asdict(player.prompts).values() if isinstance(text, str)]
    phrases = [*texts, *(row["question"] for row in asked), *(reply for one in shown for reply in one["replies"])]
    build_tiny(out / "model", seed=seed, corpus=phrases, hidden_size=HIDDEN)
    for name, lines in (("rows", asked), ("traces", shown)):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, line in enumerate(lines):
            _picture(seed, number).save(folder / f"{number}.png")
            line["image"] = f"{number}.png"
        (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _picture(seed: int, number: int) -> Any:
    """Noise, so that no two pictures are alike."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng((seed, number))
    return Image.fromarray(random.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    settings = json_option(options.environment_args, "--environment-args")
    write_start(options.out, options.environment, settings, options.rows, options.seed)


if __name__ == "__main__":
    main()
