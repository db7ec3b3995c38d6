"""Ten real steps of general VQA on a CPU, judged by a tiny local Qwen3 or through the OpenAI client.

    python -m demos.general --judge local
    python -m demos.general --judge openai

A tiny Qwen2.5-VL learns the form of an answer and a little reading; GRPO goes on from there, one turn per picture, and
``accuracy`` is what the judge says. The local judge is a tiny Qwen3 trained here to compare two strings. The endpoint
for the OpenAI client is the server that the tests use, on this machine; with OPENAI_BASE_URL set, it is yours.
Writes ``report.json`` into the recipe's output folder.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.judge_server import JudgeServer

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ROWS = 512
WARM_ROWS = 2000
WARM_STEPS = 80  # enough for the form; about half of the letters are still misread


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demos.general", description=__doc__.splitlines()[0])
    parser.add_argument("--judge", choices=["local", "openai"], default="local")
    parser.add_argument("--out", type=Path, default=Path("runs/general"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm-steps", type=int, default=WARM_STEPS, help="steps of the policy's warm start")
    parser.add_argument("--judge-model", type=Path, default=None, help="a tiny judge that is there already")
    return parser.parse_args(argv)


def make_policy(out: Path, prompts: dict[str, str], seed: int, steps: int) -> Path:
    """The stand-in for an instruction-tuned checkpoint, made once."""
    from demos.reading.task import make_dataset
    from demos.reading.warmstart import WarmStart, warm_start
    from vt_trl.data import episode_row

    path = out / "policy"
    if not (path / "done").exists():
        rows = [episode_row(row) for row in make_dataset(WARM_ROWS, 0.0, 1000 + seed)]
        warm_start(path, rows, prompts, WarmStart(steps=steps, rows=WARM_ROWS, kinds=("direct",)), seed)
        (path / "done").touch()
    return path


def make_rows(out: Path, seed: int) -> Path:
    from demos.reading.task import make_dataset

    path = out / "rows"
    if not path.exists():
        make_dataset(ROWS, 0.0, 2000 + seed).save_to_disk(path)
    return path


def make_judge(out: Path, seed: int) -> Path:
    from vt_trl.tiny_judge import build_tiny_judge

    path = out / "judge"
    if not (path / "done").exists():
        build_tiny_judge(path, seed=seed)
        (path / "done").touch()
    return path


def summary(trainer: Any) -> dict[str, Any]:
    """What happened, step by step; and in the last step, how often the judge said what comparing the strings says."""
    from vt_trl.judges.reward import last_answer

    history = [log for log in trainer.state.log_history if "loss" in log]
    names = ("loss", "grad_norm", "accuracy", "unjudged", "judge/cases", "judge/asked", "judge/failed")
    pairs = list(zip(trainer.last_rollouts, trainer.recorder.last_records, strict=True))
    same = [r.correct == (last_answer(rollout.turns[-1].text) == rollout.row["answer"][0]) for rollout, r in pairs]
    return {
        "steps": trainer.state.global_step,
        "last_step_agreement_with_equal_strings": sum(same) / len(same),
        **{name: [round(float(log[name]), 4) for log in history] for name in names},
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the demo; returns the report."""
    options = parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from demos.reading.stages import provenance
    from vt_trl.run import train
    from vt_trl.yaml_file import read_yaml

    torch.set_num_threads(options.threads)
    recipe = RECIPES / f"general_smoke_{options.judge}.yaml"
    prompts = read_yaml(recipe)["environment_args"]["prompts"]
    settings: dict[str, Any] = {
        "model": make_policy(options.out, prompts, options.seed, options.warm_steps),
        "dataset": make_rows(options.out, options.seed),
        "output_dir": options.out / options.judge,
        "seed": options.seed,
    }
    if options.judge == "local":
        judge = options.judge_model or make_judge(options.out, options.seed)
        settings["judge_args"] = json.dumps({"model": str(judge), "backend": "transformers", "device": "cpu"})
    own_server = options.judge == "openai" and not os.environ.get("OPENAI_BASE_URL")
    with JudgeServer() if own_server else nullcontext() as server:
        if own_server:
            os.environ["OPENAI_BASE_URL"] = server.base_url
            os.environ.setdefault("OPENAI_API_KEY", "none")
        try:
            overrides = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
            trainer = train(recipe, overrides)
        finally:
            if own_server:
                del os.environ["OPENAI_BASE_URL"]
    report = summary(trainer) | {"judge": options.judge, **provenance()}
    path = options.out / options.judge / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report, path)
    return report


def show(report: dict[str, Any], path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Ten steps of GRPO, accuracy judged by {report['judge']}")
    columns = [name for name, values in report.items() if isinstance(values, list)]
    for name in ("step", *columns):
        table.add_column(name)
    for step, values in enumerate(zip(*(report[name] for name in columns), strict=True), start=1):
        table.add_row(str(step), *(f"{value:g}" for value in values))
    console = Console()
    console.print(table)
    share = report["last_step_agreement_with_equal_strings"]
    console.print(f"Last step: the judge agreed with plain string comparison on {share:.1%}. {path}", highlight=False)


if __name__ == "__main__":
    main()
