"""The stages of the search demo, each a short function on a :class:`World` (one seed)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.progress import Progress

from demos.reading.stages import ProgressCallback
from demos.runs import overrides
from demos.searching.base import AFTER, BEFORE, Schooling, school
from demos.searching.blind import TextBoxEnv
from demos.searching.task import Sheet, frame_box, make_dataset, make_rows
from vt_trl.data import episode_row
from vt_trl.envs import make_environment
from vt_trl.evaluation import Evaluation, play_rows
from vt_trl.generation.base import SamplingSettings
from vt_trl.inference import PolicyModel
from vt_trl.types import RolloutStatus
from vt_trl.yaml_file import read_yaml

GRPO = Path(__file__).resolve().parents[2] / "recipes" / "demo_zoom.yaml"
SFT = GRPO.with_name("demo_zoom_sft.yaml")
TRAIN_ROWS, RATIONALES = 1024, 16  # so few that the warm start leaves something to learn
_SEEDS = {"school": 1000, "rationales": 2000, "train": 3000, "eval": 4000}  # disjoint; each depends on the run's seed
_STRIDE = 10_000
BLIND = f"{TextBoxEnv.__module__}:{TextBoxEnv.__name__}"


@dataclass(frozen=True)
class World:
    """Where the files of one seed lie, the base model that all seeds start from, and how many held-out rows are."""

    out: Path
    base: Path
    seed: int
    eval_count: int
    sheet: Sheet = Sheet()

    def rows(self, purpose: str, count: int, **settings: Any) -> list[dict[str, Any]]:
        return make_rows(count, _SEEDS[purpose] + _STRIDE * self.seed, sheet=self.sheet, **settings)

    @cached_property
    def eval_rows(self) -> list[dict[str, Any]]:
        """The held-out rows, decoded; drawn once, for a cell is measured twice."""
        return [episode_row(row) for row in make_dataset(self.rows("eval", self.eval_count))]

    @property
    def environment_args(self) -> dict[str, Any]:
        return read_yaml(GRPO)["environment_args"]


def make_base(path: Path, bar: Progress, seed: int = 0, sheet: Sheet | None = None, **settings: Any) -> None:
    """Train the stand-in for an instruction-tuned checkpoint and save it at ``path``."""
    schooling, sheet = Schooling(**settings), sheet or Sheet()
    task = bar.add_task("base model", total=schooling.steps, note="drawing pictures")
    count = schooling.rows // len(schooling.frames)
    drawn = []
    for number, frames in enumerate(schooling.frames):
        drawn += make_rows(count, _SEEDS["school"] + _STRIDE * seed + number, sheet, frames)

    def advance(done: int, losses: dict[str, float]) -> None:
        bar.update(task, completed=done, note=", ".join(f"{name} {loss:.2f}" for name, loss in losses.items()))

    zoom = make_environment("zoom", read_yaml(GRPO)["environment_args"])()
    school(path, [row | episode_row(row) for row in drawn], zoom, schooling, seed, advance, sheet)


def save_rationales(world: World) -> Path:
    """Rationales with one look, at the frame that was asked for, as `vt-trl prepare vlir` would write them."""
    folder = world.out / "rationales"
    if not folder.exists():
        rows = world.rows("rationales", RATIONALES)
        said = {"segments": [BEFORE.strip(), AFTER]}
        make_dataset([row | said | {"crops": frame_box(row, world.sheet)} for row in rows]).save_to_disk(folder)
    return folder


def save_train_rows(world: World) -> Path:
    folder = world.out / "train"
    if not folder.exists():
        make_dataset(world.rows("train", TRAIN_ROWS)).save_to_disk(folder)
    return folder


def run_sft(world: World, out: Path, environment: str, steps: int | None) -> None:
    """The cold start, by the path of ``vt-trl sft``."""
    from vt_trl.sft import sft

    settings = {"model": world.base, "dataset": save_rationales(world), "output_dir": out, "max_steps": steps}
    sft(SFT, overrides(**settings, environment=environment, seed=world.seed, disable_tqdm=True))


def run_grpo(world: World, model: Path, out: Path, environment: str, steps: int | None, bar: Progress, label: str):
    """GRPO by the path of ``vt-trl train``; returns the trainer."""
    from vt_trl.run import train

    settings = {"model": model, "dataset": save_train_rows(world), "output_dir": out, "max_steps": steps}
    given = overrides(**settings, environment=environment, seed=world.seed, disable_tqdm=True)
    return train(GRPO, given, callbacks=[ProgressCallback(bar, label)])


def measure(world: World, model_path: Path, environment: str, bar: Progress, label: str) -> dict[str, float]:
    """Greedy evaluation on the held-out rows.

    ``crop_hits``: share of the answered rows with a crop that holds the ink of the letter that was asked for;
    ``crop_area``: mean area of the crops as a share of the picture (a crop of everything would hit, too).
    """
    settings = read_yaml(GRPO)
    limits = {name: settings[name] for name in ("max_turn_tokens", "max_completion_length")}
    model = PolicyModel(model_path, dtype="float32", device="cpu", **limits)
    task = bar.add_task(label, total=world.eval_count, note="")
    runner = model.runner(make_environment(environment, world.environment_args, model.sight))
    played = play_rows(
        runner, world.eval_rows, SamplingSettings(temperature=0.0), progress=lambda count: bar.advance(task, count)
    )
    return _figures(played, world.sheet)


def _figures(played: Evaluation, sheet: Sheet) -> dict[str, float]:
    answered = [one for one in played.rollouts if one is not None and one.status is RolloutStatus.ANSWERED]
    crops = [region.box for one in played.rollouts if one is not None for region in one.regions]
    hits = [any(_holds(region.box, one.row["region"]) for region in one.regions) for one in answered]
    areas = [(x2 - x1) * (y2 - y1) / sheet.side**2 for x1, y1, x2, y2 in crops]
    return {
        "accuracy": played.rate("correct"),
        "request_rate": played.rate("asked"),
        "format_rate": played.rate("well_formed"),
        "answered": len(answered) / len(played.rollouts),
        "crop_hits": sum(hits) / len(hits) if hits else 0.0,
        "crop_area": sum(areas) / len(areas) if areas else 0.0,
        "visual_tokens": played.rate("visual_tokens"),
    }


def _holds(box: Sequence[float], ink: Sequence[float]) -> bool:
    return box[0] <= ink[0] and box[1] <= ink[1] and box[2] >= ink[2] and box[3] >= ink[3]
