"""Transcripts of a small run: what is kept of each rollout, what reaches the trackers, and no room on the disk."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import wandb
from conftest import picture
from helpers import CALL, Script, answer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import make_trainer
from trackio.sqlite_storage import SQLiteStorage
from transformers import AutoProcessor

from vt_trl.generation.base import ScriptedBackend
from vt_trl.judges import Judgement, make_judge_reward
from vt_trl.judges.base import Judge
from vt_trl.transcripts import PictureEncoder, Transcript, TranscriptTurn, read_transcripts, write_transcripts
from vt_trl.transcripts.table import read_facts

ATTACK = "<script>alert(1)</script>"
TRACKERS = ["tensorboard", "trackio", "wandb"]


class Equal(Judge):
    """Right when the prediction is the answer; says why."""

    async def judge(self, cases: list) -> list[Judgement]:
        return [Judgement.of(case.golds[0] == case.prediction, f"looked for {case.golds[0]}") for case in cases]


def plays(tokenizer: Any) -> Any:
    """Of 4 members: 0 is right at once, 1 asks and is right, 2 answers with a script, 3 makes no move."""

    def choose(member: int, pictures: int) -> str:
        number = str(member // 4)
        return [answer(number), CALL if pictures == 1 else answer(number), answer(ATTACK), ATTACK][member % 4]

    return lambda request: Script(tokenizer, lambda member, _: choose(member, len(request.images)))(request)


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory) -> Any:
    """Two steps of two groups of 4, with a judge and three trackers; the trainer afterwards."""
    out = tmp_path_factory.mktemp("seen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(out / "board"))
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(out))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        tokenizer = AutoProcessor.from_pretrained(checkpoint).tokenizer
        trainer = make_trainer(
            checkpoint, out / "run", rows=2, backend=ScriptedBackend(plays(tokenizer)), shuffle_dataset=False,
            per_device_train_batch_size=8, max_steps=2, max_turn_tokens=None, max_completion_length=400,
            reward_funcs=[make_judge_reward(Equal()), form], log_completions=True, report_to=TRACKERS,
            project="seen", run_name="one", save_strategy="steps", save_steps=2,
        )  # fmt: skip
        trainer.train()
        wandb.finish()
        yield trainer


def form(completions: list, **columns: Any) -> list[float]:
    return [0.5] * len(completions)


def tables(trainer: Any) -> list[Path]:
    return sorted(Path(trainer.args.output_dir, "completions").glob("*"))


def test_a_table_per_step_says_everything_of_each_rollout(run):
    assert [path.name for path in tables(run)] == ["completions_00001.parquet", "completions_00002.parquet"]
    seen = read_transcripts(tables(run)[1])
    assert [(one.id, one.member, one.step) for one in seen] == [(f"row-{n // 4}", n % 4, 2) for n in range(8)]
    assert [one.judged for one in seen] == ["right", "right", "wrong", "wrong"] * 2
    right, asks, attack, mute = seen[4:]
    assert (right.answer, right.gold, right.source, right.question) == ("1", ("1",), "easy", "Which number is 1?")
    assert (right.verdict, right.verdict_reason, mute.verdict_reason) == ("right", "looked for 1", "no answer")
    assert [turn.status for turn in asks.turns] == ["prompt", "prompt", "sampled", "told", "sampled"]
    assert json.loads(asks.turns[2].call) == {"name": "resize_image", "arguments": {"action": "resize"}}
    assert asks.asked and not right.asked and attack.answer == ATTACK
    assert (mute.status, mute.turns[-1].text, mute.turns[-1].faults[0]) == ("no_answer", ATTACK, "no_move")
    assert asks.rewards == {"judge_judge": 1.0, "form": 0.5}
    records = run.recorder.last_records
    assert [one.reward for one in seen] == pytest.approx([record.reward for record in records])
    assert [one.penalty for one in seen] == pytest.approx([record.penalty for record in records])
    assert [one.advantage for one in seen] == pytest.approx([record.advantage for record in records], abs=1e-6)
    assert len({one.group for one in seen[:4]}) == 1 and seen[0].group != seen[4].group


def test_pictures_are_those_the_model_saw(run):
    """112 x 112 pixels make 16 tokens; at half of each side 4."""
    asks = read_transcripts(tables(run)[1])[5]
    [low], [full] = asks.turns[1].pictures, asks.turns[3].pictures
    assert (low.width, low.height, low.tokens, low.index) == (56, 56, 4, 0)
    assert (full.width, full.height, full.tokens, full.index) == (112, 112, 16, 1)
    kept = Image.open(io.BytesIO(asks.images[1]))
    assert kept.tobytes() == picture(1, (112, 112)).tobytes() and asks.visual_tokens == 20
    told = asks.turns[3]
    assert told.text.startswith("Full:") and [type(part).__name__ for part in told.parts] == ["str", "Picture", "str"]


def test_datasets_shows_the_pictures(run):
    rows = datasets.load_dataset("parquet", data_files=[str(path) for path in tables(run)], split="train")
    assert len(rows) == 16
    assert [image.size for image in rows[5]["images"]] == [(56, 56), (112, 112)]


def test_numbers_and_pictures_reach_every_tracker(run):
    out = Path(run.args.output_dir).parent
    logged = [log["reward"] for log in run.state.log_history if "reward" in log]
    assert len(logged) == 2
    board = EventAccumulator(str(out / "board"))
    board.Reload()
    assert [event.value for event in board.Scalars("train/reward")] == pytest.approx(logged)
    [weights] = (out / "wandb").rglob("*.wandb")
    assert b"train/request_rate" in weights.read_bytes()
    shown = [json.loads(path.read_text()) for path in (out / "wandb").rglob("completions_*.table.json")]
    assert sorted({row[table["columns"].index("step")] for table in shown for row in table["data"]}) == [1, 2]
    staged = [path.read_bytes() for path in (out / "artifacts" / "staging").iterdir()]
    pictures = [Image.open(io.BytesIO(data)).size for data in staged if data.startswith(b"\x89PNG")]
    assert set(pictures) == {(56, 56), (112, 112)}  # on their way to the server
    local = SQLiteStorage.get_logs("seen", "one")
    assert [log["train/reward"] for log in local if "train/reward" in log] == pytest.approx(logged)
    rows = [log["completions"]["_value"] for log in local if "completions" in log][0]
    assert len(rows) == 8 and ATTACK in rows[2]["answer"] and rows[0]["picture 2"] is None
    assert "_type" in rows[1]["picture 1"] and "_type" in rows[1]["picture 2"]


def transcript(index: int = 0, data: bytes = b"", **changes: Any) -> Transcript:
    turns = (TranscriptTurn("user", "What?"), TranscriptTurn("assistant", f"<answer>{index}</answer>", "sampled"))
    return Transcript(turns, (data,) if data else (), id=f"row-{index}", group=str(index // 4), **changes)


def noise(side: int) -> bytes:
    return PictureEncoder()(picture(0, (side, side)))


def test_members_of_a_group_share_a_picture_on_disk(tmp_path):
    data = noise(700)
    path = write_transcripts(tmp_path / "new" / "t.parquet", [transcript(index, data) for index in range(8)])
    assert pq.ParquetFile(path).num_row_groups == 2
    assert len(data) > 100_000 and path.stat().st_size < 2.5 * len(data)  # two groups; 8 copies would be 8 times
    assert [one.images[0] == data for one in read_transcripts(path)] == [True] * 8


def test_a_table_read_is_the_table_written(tmp_path):
    given = [
        transcript(0, correct=None, reward=None, rewards={"a": None, "b": 0.5}, extra={"note": "x"}, step=3),
        transcript(1, noise(30), gold=("1", "one"), answer="", verdict="failed", verdict_reason="out", mode="eval"),
    ]
    assert read_transcripts(write_transcripts(tmp_path / "t.parquet", given, {"left_out": 3})) == given
    assert read_facts(tmp_path / "t.parquet") == {"left_out": 3}


def test_a_table_is_replaced_or_left_as_it_was(tmp_path, monkeypatch):
    path = write_transcripts(tmp_path / "t.parquet", [transcript(0)])
    write_transcripts(path, [transcript(1)])
    assert [one.id for one in read_transcripts(path)] == ["row-1"]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        write_transcripts(path, [transcript(2)])
    assert [one.id for one in read_transcripts(path)] == ["row-1"] and len(list(tmp_path.iterdir())) == 1


def test_large_pictures_are_jpeg_and_shrunk_only_beyond_the_limit():
    large = picture(0, (600, 300))
    encoder = PictureEncoder(max_pixels=80_000)
    kept = Image.open(io.BytesIO(encoder(large)))
    assert kept.size == (400, 200) and kept.format == "JPEG" and encoder.shrunk == 1
    assert encoder(large) is encoder(large) and encoder.shrunk == 1
    assert Image.open(io.BytesIO(PictureEncoder()(large))).size == (600, 300)


def test_an_unwritable_folder_is_warned_of_once_and_what_is_left_out_is_counted(checkpoint, tmp_path, caplog):
    """Room for 5 of 8 rollouts in groups of 4: one group is kept. Pictures of 3136 pixels go beyond 1000."""
    trainer = make_trainer(
        checkpoint, tmp_path, rows=2, per_device_train_batch_size=8, max_steps=2, log_completions=True,
        log_completions_rollouts=5, log_completions_pixels=1000, environment_args={"min_pixels": 784},
    )  # fmt: skip
    (tmp_path / "completions").write_text("no folder")
    with caplog.at_level(logging.WARNING, "vt_trl"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert sum("could not be written" in record.message for record in caplog.records) == 1
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["transcripts/left_out"] for log in logs] == [4, 4]
    assert [log["transcripts/rollouts"] for log in logs] == [4, 4]
    assert [log["transcripts/pictures_shrunk"] for log in logs] == [1, 1]
    (tmp_path / "completions").unlink()
    trainer.evaluate()
    [path] = (tmp_path / "completions").iterdir()
    assert path.name == "eval_00002.parquet" and read_facts(path)["left_out"] == 0
    assert {one.mode for one in read_transcripts(path)} == {"eval"} and len(read_transcripts(path)) == 2
