"""200 requests at a time to ``vt-trl serve`` with a tiny model: does everybody get the answer to their own question?

    python -m benchmarks.serve --json FILE

Every request has a picture and a question of its own. Its greedy tokens are computed beforehand, alone, by the rollout
loop; what the server gives back under load is compared token by token. ``lost``: requests without an answer;
``mixed``: answers with other tokens than their own; ``distinct``: different ones among the expected, without which a
mix-up could not be seen. Seconds are a client's, from sending a request to having read its answer, the wait included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.reporting import write
from demos.reading.stages import provenance
from vt_trl.envs import ResizeEnv
from vt_trl.generation.base import SamplingSettings
from vt_trl.generation.standalone import make_runner
from vt_trl.images import png_uri
from vt_trl.rollout import Limits, RolloutRunner
from vt_trl.tiny import build_tiny
from vt_trl.types import Done, Observation, RolloutStatus

CALL = '<think>Too small.</think><tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'
GREEDY = SamplingSettings(temperature=0.0)
_PROMPTS = {"system": "Tool", "task": "{question}", "before_image": "Full:", "after_image": "Go"}
_GAIN = 8.0


class TwoTurns(ResizeEnv):
    """Takes any first reply as a call and any second one as the answer: an untrained model makes neither move."""

    def step(self, reply: str, truncated: bool = False) -> Observation | Done:
        if self.turn == 0:
            return super().step(CALL)
        return Done(RolloutStatus.ANSWERED, answer=reply)


def make_restless(model: Any, gain: float = _GAIN) -> Any:
    """Larger weights in the text layers: as built, a tiny model repeats its last token whatever it is shown."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model.layers" in name and weight.ndim == 2:
                weight.mul_(gain)
    return model


def make_tiny_runner(folder: Path, turn_tokens: int = 6) -> RolloutRunner:
    """A rollout loop on a tiny random model whose tokens hang on picture and question."""
    build_tiny(folder, hidden_size=64)
    model = make_restless(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval())
    environment = {"prompts": _PROMPTS, "min_pixels": 56 * 56}
    limits = Limits(turn_tokens, 256)
    return make_runner(model, AutoProcessor.from_pretrained(folder), lambda: TwoTurns(**environment), limits)


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    noise = np.random.default_rng(seed).integers(0, 256, (count, 112, 112, 3), dtype=np.uint8)
    return [
        {"id": f"row-{number}", "image": Image.fromarray(pixels), "question": f"What is number {number}?"}
        for number, pixels in enumerate(noise)
    ]


def tokens_alone(runner: RolloutRunner, row: dict[str, Any]) -> list[list[int]]:
    """The sampled tokens of each turn, with nobody else in the batch."""
    runner.encoder.features.clear()
    (rollout,) = runner.run([row], 1, GREEDY)
    return [list(turn.token_ids) for turn in rollout.turns]


async def ask_all(url: str, rows: Sequence[dict[str, Any]]) -> list[tuple[list[list[int]] | None, float]]:
    """Tokens of each turn (None: no answer) and seconds, of all rows asked at once through the official client."""
    import httpx
    import openai

    connections = httpx.Limits(max_connections=len(rows))  # or the client would hold some back
    async with openai.AsyncOpenAI(
        base_url=url, api_key="none", max_retries=0, http_client=httpx.AsyncClient(limits=connections, timeout=600)
    ) as client:

        async def ask(row: dict[str, Any]) -> tuple[list[list[int]] | None, float]:
            picture = {"type": "image_url", "image_url": {"url": png_uri(row["image"])}}
            content = [picture, {"type": "text", "text": row["question"]}]
            began = time.perf_counter()
            try:
                reply = await client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": content}],
                    extra_body={"vt_trl": {"turns": True}},
                )
            except openai.OpenAIError as error:
                print(f"{row['id']}: {error}")
                return None, time.perf_counter() - began
            return [turn["token_ids"] for turn in reply.vt_trl["turns"]], time.perf_counter() - began

        return list(await asyncio.gather(*map(ask, rows)))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything the report says, but for machine, versions and date."""
    from vt_trl.serving.app import Service
    from vt_trl.serving.background import in_background
    from vt_trl.serving.engine import LocalEngine
    from vt_trl.serving.limits import ServeLimits
    from vt_trl.serving.pictures import Pictures

    with tempfile.TemporaryDirectory() as folder:
        runner = make_tiny_runner(Path(folder))
    rows = make_rows(options.requests, options.seed)
    expected = [tokens_alone(runner, row) for row in rows]
    limits = ServeLimits(requests=options.requests, seconds=600)
    service = Service(LocalEngine(runner, GREEDY, options.max_batch), "tiny", limits, Pictures(limits))
    with in_background(service) as (url, _):
        began = time.perf_counter()
        found = asyncio.run(ask_all(url, rows))
        seconds = time.perf_counter() - began
    p50, p99 = np.percentile([one for _, one in found], (50, 99))
    return {
        "requests": len(rows),
        "lost": sum(tokens is None for tokens, _ in found),
        "mixed": sum(tokens not in (None, own) for (tokens, _), own in zip(found, expected, strict=True)),
        "distinct": len({json.dumps(tokens) for tokens in expected}),
        "p50_seconds": round(float(p50), 2),
        "p99_seconds": round(float(p99), 2),
        "seconds": round(seconds, 2),
        "max_batch": options.max_batch,
        "threads": torch.get_num_threads(),
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200, help="all at the same time")
    parser.add_argument("--max-batch", type=int, default=32, help="as of vt-trl serve")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns the report."""
    options = parse_args(argv)
    torch.set_num_threads(1)
    report = measure(options) | provenance()
    report["versions"] |= {name: version(name) for name in ("fastapi", "uvicorn", "openai")}
    print(json.dumps(report, indent=2))
    write(report, options.json)
    return report


if __name__ == "__main__":
    main()
