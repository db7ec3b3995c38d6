"""Selection with vLLM: it counts what transformers counts, a shard in one pass, and goes on after an interruption."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import picture
from helpers import SHORT_PROMPTS, answer, png
from parrot import make_parrot

from data_prep import select
from data_prep.work import Work
from vt_trl.data import load_rows
from vt_trl.envs import DirectEnv

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

SMALL = {"min_pixels": 3136, "prompts": SHORT_PROMPTS}
SIZE = (112, 112)
# Question, gold answer; the model always says 7 to "Say it", and to "Read it" only when it sees the full picture.
ROWS = [("Say it", "7"), ("Read it", "7"), ("Say it", "8"), ("Read it", "7"), ("Say it", "7"), ("Say it", "7")]
KINDS = {"low_is_enough": 2, "needs_full": 2, "neither": 1, "judge_failed": 0, "bad_row": 1}


@pytest.fixture
def parrot(tmp_path) -> Path:
    said = {("Say it", "low"): "7", ("Say it", "full"): "7", ("Read it", "low"): "8", ("Read it", "full"): "7"}
    lessons = []
    for (question, view), reply in said.items():
        row = {"id": "a", "image": picture(1, SIZE), "question": question, "answer": [reply]}
        lessons.append((DirectEnv(view, **SMALL), row, [answer(reply)]))
    return make_parrot(tmp_path / "parrot", lessons)


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Six rows with one picture; that of the last is broken."""
    root = tmp_path / "rows"
    root.mkdir()
    picture(1, SIZE).save(root / "good.png")
    (root / "bad.png").write_bytes(png((0, 0, 0))[:40])
    lines = []
    for number, (question, gold) in enumerate(ROWS):
        image = "good.png" if number < 5 else "bad.png"
        lines.append(json.dumps({"id": f"r{number}", "image": image, "question": question, "answer": gold}))
    (root / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


def options(dataset: Path, model: Path, out: Path, backend: str):
    words = ["--dataset", dataset, "--model", model, "--out", out, "--shard-rows", 2, "--max-turn-tokens", 24]
    words += ["--rollouts", 4, "--margin", 3, "--environment-args", json.dumps(SMALL), "--backend", backend]
    words += ["--temperature", 0.01, "--max-batch", 16, "--gpu-memory-utilization", 0.1]
    return select.parser().parse_args(list(map(str, words)))


def records(out: Path) -> list[dict]:
    return [json.loads(line) for path in sorted((out / "work").glob("0*.jsonl")) for line in path.open()]


def test_counts_are_those_of_transformers_also_after_an_interruption(dataset, parrot, tmp_path, monkeypatch):
    """So cold that both must draw the very same tokens; ``sampled`` is a digest of them."""
    from vt_trl.generation import standalone

    plain, out = tmp_path / "plain", tmp_path / "vllm"
    select.run(options(dataset, parrot, plain, "transformers"))
    assert json.loads((plain / "report.json").read_text())["rows_by_kind"] == KINDS

    passes, engines, open_runner, write = [], [], standalone.open_runner, Work.write

    def opened(*args):
        """The engine of the interrupted run serves the one that goes on, too."""
        if not engines:
            engines.append(open_runner(*args))
            run = engines[0].run
            engines[0].run = lambda rows, *more, **named: passes.append(len(rows)) or run(rows, *more, **named)
        return engines[0]

    def interrupted(work, shard, counts):
        if shard == 1:
            raise KeyboardInterrupt
        write(work, shard, counts)

    monkeypatch.setattr(standalone, "open_runner", opened)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Work, "write", interrupted)
        select.run(options(dataset, parrot, out, "vllm"))
    assert records(out) == records(plain)[:2] and passes == [4, 4]  # rows x resolutions, a shard in one pass
    select.run(options(dataset, parrot, out, "vllm"))
    assert passes[2:] == [4, 2]  # the first shard is not counted again; the last one has a row that cannot be used
    assert records(out) == records(plain)
    assert json.loads((out / "report.json").read_text())["settings"]["backend"] == "vllm"
    assert load_rows(out / "rows").to_list() == load_rows(plain / "rows").to_list()
    engines[0].backend.engine.close()
