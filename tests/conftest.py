"""Shared fixtures: tiny checkpoints built in code, the real tokenizer files when they are at hand, no network."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="vt_trl_trackio_"))  # read when trackio is imported

import hypothesis
import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import png
from PIL import Image
from transformers import AutoConfig

# A slow machine is no failure: no test here is about time.
hypothesis.settings.register_profile("vt_trl", deadline=None)
hypothesis.settings.load_profile("vt_trl")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
FAMILY_NAMES = ("qwen2_5_vl", "qwen3_vl")
# Folders of ../shared/qwen that a family's files come from, later ones over earlier ones: Qwen3 has the vocabulary of
# Qwen2.5 with more added tokens, and its files there are without it.
TOKENIZERS = {
    "qwen2_5_vl": ("qwen2.5-vl-7b-instruct",),
    "qwen3_vl": ("qwen2.5-vl-7b-instruct", "qwen3-1.7b", "qwen3-vl-8b"),
}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real tokenizers and pictures; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, which is not part of the project")
    return SHARED


@pytest.fixture(scope="session")
def seven(shared):
    return AutoConfig.from_pretrained(shared / "qwen" / "qwen2.5-vl-7b-instruct")


@pytest.fixture(scope="session")
def eight(shared):
    return AutoConfig.from_pretrained(shared / "qwen" / "qwen3-vl-8b")


@pytest.fixture
def setup_of(seven):
    """A recipe as the preflight sees it: ``setup_of("efficient_lora", *overrides, launch=…, gpu=GiB)``."""
    from vt_trl.preflight import Launch, Setup
    from vt_trl.preflight.planned import parse_planned

    def make(recipe, *overrides, launch=None, gpu=None, **kwargs):
        launch = launch or Launch()
        path = Path(__file__).resolve().parents[1] / "recipes" / f"{recipe}.yaml"
        run, args = parse_planned(path, overrides, launch.processes)
        return Setup(run, args, seven, launch, None if gpu is None else round(gpu * 2**30), **kwargs)

    return make


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random checkpoint of each family: family name -> folder."""
    from vt_trl.tiny import build_tiny

    root = tmp_path_factory.mktemp("checkpoints")
    return {name: build_tiny(root / name, family=name, hidden_size=64) for name in FAMILY_NAMES}


@pytest.fixture(scope="session")
def checkpoint(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["qwen2_5_vl"]


@pytest.fixture(scope="session")
def real_checkpoints(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family name -> a tiny model with the family's real tokenizer, template and image limits."""
    from vt_trl.tiny import build_tiny

    root = tmp_path_factory.mktemp("real")
    made = {}
    for name, folders in TOKENIZERS.items():
        files = {file.name: file for folder in folders for file in (shared / "qwen" / folder).iterdir()}
        if len(folders) > 1:
            del files["chat_template.json"]  # the other family's
        (root / "files" / name).mkdir(parents=True)
        for file in files.values():
            shutil.copyfile(file, root / "files" / name / file.name)
        made[name] = build_tiny(root / name, family=name, hidden_size=64, tokenizer_dir=root / "files" / name)
    return made


@pytest.fixture(scope="session")
def receipts(shared: Path) -> Path:
    return shared / "realdata" / "sroie_receipts"


@pytest.fixture(scope="session")
def tiny_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained tiny judge: about a minute, once, whichever of several workers asks first."""
    from vt_trl.tiny_judge import build_tiny_judge

    if "PYTEST_XDIST_WORKER" not in os.environ:
        return build_tiny_judge(tmp_path_factory.mktemp("judge") / "tiny")
    shared = tmp_path_factory.getbasetemp().parent / "judge"
    with FileLock(f"{shared}.lock"):
        return shared if (shared / "done").exists() else _finished(build_tiny_judge(shared))


@pytest.fixture(scope="session")
def mind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-only model that knows nothing."""
    from minds import make_mind

    return make_mind(tmp_path_factory.mktemp("mind"))


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache folder of the test's own, for what remembers replies and hashes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _finished(folder: Path) -> Path:
    (folder / "done").touch()
    return folder


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def picture(seed: int = 0, size: tuple[int, int] = (112, 112)) -> Image.Image:
    """A noise picture, so that no two are alike."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_rows(count: int, size: tuple[int, int] = (112, 112)) -> list[dict]:
    return [
        {
            "id": f"row-{index}",
            "image": picture(index, size),
            "question": f"Which number is {index}?",
            "answer": [str(index)],
            "data_source": "easy" if index % 2 else "hard",
        }
        for index in range(count)
    ]


@pytest.fixture
def rows() -> list[dict]:
    return make_rows(4)


@pytest.fixture
def folder(tmp_path: Path):
    """A function that writes rows as ``data.jsonl`` next to three pictures, of red value 10, 11 and 12."""
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    for number in range(3):
        (root / "images" / f"{number}.png").write_bytes(png((10 + number, 0, 0)))

    def write(*rows: dict, name: str = "data.jsonl") -> Path:
        (root / name).write_text("\n".join(json.dumps(one) for one in rows), encoding="utf-8")
        return root

    return write


@pytest.fixture(scope="session")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that would write image placeholders and, kept from that, writes tool calls."""
    from published import make_caller

    return make_caller(tmp_path_factory.mktemp("caller"))


@pytest.fixture(scope="session")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run of four steps with three evaluations, best at the second; see published.finish."""
    from published import finish

    return finish(checkpoint, tmp_path_factory.mktemp("finished"))
