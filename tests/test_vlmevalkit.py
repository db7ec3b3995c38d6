"""The launcher and the model for VLMEvalKit, on a stand-in with the interface of its ``run.py`` and ``BaseModel``."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import picture
from helpers import SHORT_PROMPTS

from vt_trl import VisionThinkPipeline
from vt_trl.errors import ConfigError
from vt_trl.integrations.vlmevalkit import chat_messages, main

ARGS = {"prompts": SHORT_PROMPTS, "min_pixels": 3136}
BASE = """
class BaseModel:
    INTERLEAVE = False

    def generate(self, message, dataset=None):
        return self.generate_inner(message, dataset)
"""
RUN = """
import argparse, json
from vlmeval.config import supported_VLM

parser = argparse.ArgumentParser()
parser.add_argument("--model", nargs="+")
parser.add_argument("--data", nargs="+")
parser.add_argument("--work-dir")
args = parser.parse_args()
model = supported_VLM[args.model[0]]()
questions = json.load(open(args.data[0]))
answers = [model.generate(message=one, dataset="Set") for one in questions]
json.dump({"model": args.model, "interleave": model.INTERLEAVE, "answers": answers}, open(args.work_dir, "w"))
"""


@pytest.fixture
def kit(tmp_path, monkeypatch):
    root = tmp_path / "kit"
    (root / "vlmeval" / "vlm").mkdir(parents=True)
    (root / "vlmeval" / "__init__.py").touch()
    (root / "vlmeval" / "config.py").write_text("supported_VLM = {}")
    (root / "vlmeval" / "vlm" / "__init__.py").touch()
    (root / "vlmeval" / "vlm" / "base.py").write_text(BASE)
    (root / "run.py").write_text(RUN)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    yield root
    for name in [name for name in sys.modules if name.split(".")[0] == "vlmeval"]:
        del sys.modules[name]


def test_the_launcher_runs_the_kit_with_our_model(kit, checkpoint, tmp_path, capsys):
    picture(0).save(tmp_path / "0.png")
    question = {"type": "text", "value": "Which is 0?"}
    shown = [{"type": "image", "value": str(tmp_path / "0.png")}, question]
    (tmp_path / "set.json").write_text(json.dumps([shown, [{"type": "video", "value": "a.mp4"}, question]]))
    settings = ["--device", "cpu", "--max-turn-tokens", "6", "--environment-args", json.dumps(ARGS)]
    own = ["--kit", str(kit), "--pretrained", str(checkpoint), "--policy", "helpers:AsksFirst", "--name", "mine"]
    main([*own, *settings, "--data", str(tmp_path / "set.json"), "--work-dir", str(tmp_path / "out.json")])
    pipe = VisionThinkPipeline(
        checkpoint, policy="helpers:AsksFirst", device="cpu", max_turn_tokens=6, environment_args=ARGS
    )
    expected = pipe(image=picture(0), question="Which is 0?").answer.strip()
    out = json.loads((tmp_path / "out.json").read_text())
    assert expected and out == {"model": ["mine"], "interleave": True, "answers": [expected, ""]}
    said = capsys.readouterr().out
    assert "1 questions played (1 answered); looked again in 100.0%" in said
    assert "id 'Set/1': it has a part of type 'video'" in said


def test_a_folder_without_the_kit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no run.py"):
        main(["--kit", str(tmp_path), "--pretrained", "x"])


def test_parts_become_one_message():
    parts = [{"type": "image", "value": "a.png"}, {"type": "text", "value": "?", "role": "user"}]
    assert chat_messages(parts) == [
        {"role": "user", "content": [{"type": "image", "url": "a.png"}, {"type": "text", "text": "?"}]}
    ]
