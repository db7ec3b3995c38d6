"""The stages of the demo's loop and of the two arms it is compared with, each a short method of :class:`World`.

They call what the commands call (`vt-trl prepare distill`, `sft`, `train`, `prepare traces`), but in one process: the
seconds of start-up per stage would be most of the time here. A stage that was finished is not run again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from data_prep import distill, traces
from demos.loop.base import WarmStart, warm_start
from demos.loop.reasoner import MODEL, ReasonerServer
from demos.loop.task import make_dataset
from demos.reading.stages import provenance
from demos.runs import kept, overrides
from vt_trl.yaml_file import read_yaml

__all__ = ["Sizes", "World", "make_base", "provenance"]

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SFT, GRPO = RECIPES / "demo_loop_sft.yaml", RECIPES / "demo_loop_grpo.yaml"
MEDIUM, HARD = (3,), (4,)  # digits in a picture
_SEEDS = {"eval": 3000, "seed": 4000, "medium": 5000, "hard": 6000, "pool": 7000}  # disjoint pictures


@dataclass(frozen=True)
class Sizes:
    """How much of everything. Every row count is of different pictures."""

    rounds: int = 3
    seed_rows: int = 64  # questions of which seed traces are written
    pool_rows: int = 256  # questions of which a trained model writes its own traces
    medium_steps: int = 20
    hard_steps: int = 20
    samples: int = 4  # tries per row when traces are written
    eval_rows: int = 400
    warm: WarmStart = WarmStart()


@dataclass
class World:
    """One seed: where its stages lie, and what they have cost so far."""

    out: Path
    base: Path
    seed: int
    sizes: Sizes
    say: Callable[[str], Any] = print

    def __post_init__(self) -> None:
        recipe = read_yaml(GRPO)
        self.batch, self.group = recipe["per_device_train_batch_size"], recipe["num_generations"]
        self.environment = recipe["environment_args"]
        self.limits = {key: recipe[key] for key in ("max_turn_tokens", "max_completion_length")}

    def stage(self, name: str, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The figures of a stage: read where it was finished, else made; an unfinished one starts over."""
        folder = self.out / name

        def logged() -> dict[str, Any]:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            log = folder.with_suffix(".log")
            with log.open("w", encoding="utf-8") as said, redirect_stdout(said), redirect_stderr(said):
                return work(folder)

        found = kept(folder.with_suffix(".json"), logged)
        single = {key: value for key, value in found.items() if not isinstance(value, list)}  # curves are on the page
        self.say(f"seed {self.seed}: {name} {single}")
        return found

    def rows(self, name: str, count: int) -> Path:
        """Rows of a purpose, drawn once; ``medium`` and ``hard`` by the digits in the picture."""
        kind = name.partition("-")[0]
        lengths = {"medium": MEDIUM, "hard": HARD}.get(kind, (*MEDIUM, *HARD))
        folder = self.out / "rows" / name
        if not folder.exists():
            number = int(name.partition("-")[2] or 0)
            make_dataset(count, lengths, 100_000 * number + _SEEDS[kind] + self.seed).save_to_disk(folder)
        return folder

    def all_rows(self) -> Path:
        """Every row that the loop has seen in any stage."""
        from datasets import concatenate_datasets, load_from_disk

        folder = self.out / "rows" / "all"
        if not folder.exists():
            parts = sorted(path for path in folder.parent.iterdir() if path.name != "eval")
            concatenate_datasets([load_from_disk(part) for part in parts]).save_to_disk(folder)
        return folder

    def only(self, rows: Path, kind: str) -> Path:
        """The medium or the hard ones among rows."""
        from datasets import load_from_disk

        folder = rows.with_name(f"{rows.name}-{kind}")
        if not folder.exists():
            sources = {f"{digits} digits" for digits in (MEDIUM if kind == "medium" else HARD)}
            stored = load_from_disk(rows)
            chosen = [number for number, source in enumerate(stored["data_source"]) if source in sources]
            stored.select(chosen).save_to_disk(folder)
        return folder

    def count(self, rows: Path) -> int:
        """Rows, or traces, in a folder."""
        from vt_trl.data import load_rows

        return len(load_rows(str(rows)))

    def distill(self, name: str, rows: Path) -> Path:
        """Seed traces: the base model describes, the scripted reasoner solves, right and short ones are kept."""

        def work(folder: Path) -> dict[str, Any]:
            os.environ.setdefault("OPENAI_API_KEY", "none")
            with ReasonerServer() as server:
                options = {
                    "captioner": "local",
                    "captioner-model": self.base,
                    "captioner-args": json.dumps({"backend": "transformers", "dtype": "float32", "device": "cpu"}),
                    "caption-tokens": 6,
                    "reasoner-model": MODEL,
                    "reasoner-args": json.dumps({"base_url": server.base_url, "concurrency": 8}),
                    "samples": self.sizes.samples,
                    "hygiene": json.dumps({"dedupe": False}),  # other pictures with the same digits are no duplicates
                }
                return self._traces(distill, rows, folder, options)

        self.stage(name, work)
        return self.out / name

    def own_traces(self, name: str, model: Path, rows: Path) -> Path:
        """Traces that a trained model writes itself; right ones are kept."""
        options = {
            "writer": "local",
            "model": model,
            "backend": "transformers",
            "dtype": "float32",
            "max-turn-tokens": self.limits["max_turn_tokens"],
            "attempts": 1,
            "samples": self.sizes.samples,
            "temperature": 0.7,
        }
        self.stage(name, lambda folder: self._traces(traces, rows, folder, options))
        return self.out / name

    def _traces(self, step: ModuleType, rows: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
        common = {
            "dataset": rows,
            "out": out,
            "environment": "single",
            "environment-args": json.dumps(self.environment),
            "seed": self.seed,
            "unit-rows": 128,
        }
        words = [f"--{key}={value}" for key, value in (common | options).items()]
        step.run(step.parser().parse_args(words))
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        return {"rows": report["rows"]["all"], "kept": report["rows"]["kept"], "tries": report["samples"]["all"]}

    def sft(self, name: str, traces: Path, examples: int | None = None) -> Path:
        """From the base model on traces; ``examples`` seen in all (the recipe's epochs where None)."""
        from vt_trl.sft import sft

        def work(folder: Path) -> dict[str, Any]:
            settings = {"model": self.base, "dataset": traces, "output_dir": folder, "seed": self.seed}
            size, count = read_yaml(SFT)["per_device_train_batch_size"], self.count(traces)
            per_epoch = -(-count // size)
            if examples is not None:
                settings["max_steps"] = examples // count * per_epoch - (-(examples % count) // size)
            trainer = sft(SFT, overrides(**settings, disable_tqdm=True))
            epochs, rest = divmod(trainer.state.global_step, per_epoch)
            seen = epochs * count + min(rest * size, count)
            return {"traces": count, "sequences": seen, "steps": trainer.state.global_step}

        self.stage(name, work)
        return self.out / name

    def grpo(self, name: str, model: Path, rows: Path, steps: int) -> Path:
        from vt_trl.run import train

        def work(folder: Path) -> dict[str, Any]:
            settings = {"model": model, "dataset": rows, "output_dir": folder, "seed": self.seed, "max_steps": steps}
            trainer = train(GRPO, overrides(**settings, disable_tqdm=True))
            curve = [round(log["accuracy"], 4) for log in trainer.state.log_history if "accuracy" in log]
            return {"sequences": self.batch * trainer.state.global_step, "accuracy": curve}

        self.stage(name, work)
        return self.out / name

    def measure(self, name: str, model: Path) -> dict[str, Any]:
        """Answers to the held-out rows, the same for every model of a seed: greedy, and sampled for ``reasons``."""
        from datasets import load_from_disk

        from vt_trl.envs import SingleEnv
        from vt_trl.evaluation import play_rows
        from vt_trl.generation.base import SamplingSettings
        from vt_trl.inference import PolicyModel

        def work(folder: Path) -> dict[str, Any]:
            opened = PolicyModel(model, dtype="float32", device="cpu", **self.limits)
            runner = opened.runner(lambda: SingleEnv(**self.environment))
            rows = load_from_disk(self.rows("eval", self.sizes.eval_rows))
            played = play_rows(runner, rows)
            found = {"accuracy": played.rate("correct")}
            found |= {f"accuracy_{n}_digits": played.rate("correct", f"{n} digits") for n in (*MEDIUM, *HARD)}
            found["reasons"] = steps_share(played)
            if model == self.base:
                sampled = play_rows(runner, rows, SamplingSettings(temperature=1.0, seed=self.seed))
                found |= {"sampled_accuracy": sampled.rate("correct"), "sampled_reasons": steps_share(sampled)}
            return {key: round(value, 4) for key, value in found.items()}

        return self.stage(name, work)

    def spent(self, *names: str) -> int:
        """Sequences that gradients were taken on in these stages."""
        return sum(json.loads((self.out / f"{name}.json").read_text())["sequences"] for name in names)


def steps_share(played: Any) -> float:
    """The share of replies with a sum written down."""
    return sum("=" in one.turns[-1].text for one in played.rollouts) / len(played.rollouts)


def make_base(path: Path, sizes: Sizes, progress: Callable[[int, float], Any], seed: int = 0) -> Path:
    """The base model, made once for all seeds."""
    if not (path / "done").exists():
        shutil.rmtree(path, ignore_errors=True)
        warm_start(path, read_yaml(SFT)["environment_args"]["prompts"], sizes.warm, seed, progress)
        (path / "done").touch()
    return path
