"""Pushing, against a stand-in of the Hub on this machine: what arrives, what never does, and what a failure leaves."""

from __future__ import annotations

import base64
import json
import pickle
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from published import TOKEN, finish, untrained

from vt_trl import cli
from vt_trl.checkpoints import problem_with
from vt_trl.config import VTGRPOConfig
from vt_trl.errors import ConfigError
from vt_trl.export import export
from vt_trl.hub import HubError, published_files
from vt_trl.recipe import parse_recipe


class Hub:
    """As much of the Hub as ``create_repo`` and ``upload_folder`` need; keeps every request."""

    def __init__(self):
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.files: dict[str, bytes] = {}  # in the repository
        self.blobs: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.refuse: dict[str, int] = {}  # part of a path -> status
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                hub.requests.append((self.command, self.path, dict(self.headers), body))
                status = next((status for part, status in hub.refuse.items() if part in self.path), 200)
                reply = hub.reply(self.path, body) if status == 200 else {"error": "no"}
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_HEAD = answer

            def log_message(self, *_):
                """Not to the terminal."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reply(self, path: str, body: bytes) -> dict:
        if not body:
            return {"id": "me/x", "sha": "0" * 40}
        if path.startswith("/lfs/"):
            self.blobs[path.removeprefix("/lfs/")] = body
            return {}
        if "/commit/" in path:
            return self.commit([json.loads(line) for line in body.splitlines()])
        given = json.loads(body)
        if path == "/api/repos/create":
            self.created.append(given)
            return {"url": f"{self.url}/{given.get('organization') or 'me'}/{given['name']}"}
        if "/preupload/" in path:
            modes = {True: "lfs", False: "regular"}
            return {
                "files": [
                    {"path": one["path"], "uploadMode": modes[one["path"].endswith((".safetensors", ".pt", ".bin"))]}
                    | {"shouldIgnore": False}
                    for one in given["files"]
                ]
            }
        if path.endswith("/objects/batch"):
            put = [one | {"actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}} for one in given["objects"]]
            return {"transfer": "basic", "objects": put}
        return {"warnings": [], "errors": []}

    def commit(self, lines: list[dict]) -> dict:
        for line in lines:
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                self.files[line["value"]["path"]] = self.blobs[line["value"]["oid"]]
        return {"commitUrl": f"{self.url}/me/x/commit/{'0' * 40}", "commitOid": "0" * 40}

    def check_token(self, token: str = TOKEN) -> None:
        """The token is in the header of every call of the API, and nowhere else."""
        assert self.requests
        for command, path, headers, body in self.requests:
            given = {name.lower(): value for name, value in headers.items()}
            if not path.startswith("/lfs/"):
                assert given.pop("authorization", "") == f"Bearer {token}", path
            assert token not in f"{command} {path} {given}" and token.encode() not in body
        assert not any(token.encode() in data for data in self.files.values())


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between retries
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # TRL's; it goes to the same address
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_run_pushes_its_checkpoints_and_its_model(hub, checkpoint, tmp_path, caplog, capfd):
    hub_settings = {"push_to_hub": True, "hub_model_id": "me/tiny", "hub_private_repo": True}
    settings = hub_settings | {"hub_strategy": "checkpoint", "hub_always_push": True}
    caplog.set_level("DEBUG")
    run = finish(checkpoint, tmp_path, **settings)
    assert run.trainer._hub_token == TOKEN  # it was there to be leaked
    assert hub.created[0]["name"] == "tiny" and (hub.created[0].get("private") or hub.created[0].get("visibility"))
    model = {name: data for name, data in hub.files.items() if "/" not in name}
    assert set(model) == {path.name for path in published_files(run.out)}
    assert model["model.safetensors"] == (run.out / "model.safetensors").read_bytes()
    assert b"Step 2." in model["README.md"] and b"me/tiny" in model["README.md"]
    # what hub_strategy: checkpoint asks for can be resumed from, so it has every file of the last checkpoint
    resumable = {name.removeprefix("last-checkpoint/") for name in hub.files if name.startswith("last-checkpoint/")}
    assert resumable == {path.name for path in (run.out / "checkpoint-3").iterdir()} >= {"optimizer.pt"}
    hub.check_token()
    messages = [json.loads(b.splitlines()[0])["value"]["summary"] for _, p, _, b in hub.requests if "/commit/" in p]
    assert "Training in progress, step 1" in messages and messages[-1] == "Model save"
    assert sum(message == "Model save" for message in messages) == 1
    for path in files_under(tmp_path):
        assert TOKEN.encode() not in path.read_bytes() or path.name == "recipe.yaml", path
    args = torch.load(run.out / "training_args.bin", weights_only=False)  # our own
    assert args.hub_token is None and args.hub_model_id == "me/tiny"
    assert TOKEN not in caplog.text + "".join(capfd.readouterr())


def test_an_export_pushes_the_published_files_only(hub, finished, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (finished.out / "optimizer.pt").write_bytes(b"x")  # of whoever keeps such things there
    try:
        options = ["--out", str(tmp_path / "out"), "--push", "me/mine", "--private"]
        assert cli.main(["export", str(finished.out), *options]) == 0
    finally:
        (finished.out / "optimizer.pt").unlink()
    hub.check_token()
    assert set(hub.files) == {path.name for path in (tmp_path / "out").iterdir()}
    assert not [
        name for name in hub.files if re.search(r"optimizer|rng|rollouts|\.bin$|\.pt$|saving|trainer_state", name)
    ]
    assert {"model.safetensors", "README.md", "generation_config.json", "tokenizer.json"} <= set(hub.files)
    assert all(TOKEN.encode() not in path.read_bytes() for path in files_under(tmp_path))
    assert TOKEN not in "".join(capfd.readouterr())


def saved_and_complete(out: Path) -> None:
    assert problem_with(out) is None and (out / "model.safetensors").stat().st_size > 1000


@pytest.mark.parametrize(("path", "status"), [("/commit/", 401), ("/preupload/", 503), ("/lfs/", 403)])
def test_a_push_that_fails_leaves_the_model(hub, caller, tmp_path, monkeypatch, capsys, path, status):
    trainer = untrained(caller, tmp_path, push_to_hub=True, hub_model_id="me/tiny", hub_token=TOKEN)
    hub.refuse[path] = status
    monkeypatch.setattr("vt_trl.run.train", lambda *_: trainer.save_model())
    assert cli.main(["train", "recipe.yaml"]) == 1
    said = capsys.readouterr().err
    assert "The model is saved in" in said and f"vt-trl export {tmp_path / 'out'} --push me/tiny" in said
    assert TOKEN not in said and str(status) in said
    saved_and_complete(tmp_path / "out")
    hub.refuse.clear()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    export(tmp_path / "out", push="me/tiny")  # the command that was shown
    assert "model.safetensors" in hub.files


def test_an_outage_after_training(hub, caller, tmp_path):
    trainer = untrained(caller, tmp_path, push_to_hub=True, hub_token=TOKEN)
    assert trainer.hub_model_id == "me/out"  # by the name of the folder
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(HubError, match="saved in .* but not on the Hub.*ConnectError.*export"):
        trainer.push_to_hub()
    saved_and_complete(tmp_path / "out")


def test_a_checkpoint_that_was_not_pushed_is_a_warning(hub, caller, tmp_path, caplog):
    settings = {"push_to_hub": True, "hub_model_id": "me/tiny", "hub_token": TOKEN, "hub_strategy": "every_save"}
    trainer = untrained(caller, tmp_path, **settings)
    hub.refuse["/commit/"] = 403
    trainer.save_model(str(tmp_path / "checkpoint-0"), _internal_call=True)
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-0"))
    trainer._finish_current_push()
    assert "A checkpoint was not pushed to me/tiny" in caplog.text and "403" in caplog.text
    assert TOKEN not in caplog.text and hub.files == {}


def test_a_refused_token_is_known_before_training(hub, caller, tmp_path):
    hub.refuse |= {"/repos/create": 401, "/api/models/": 401}
    with pytest.raises(HubError, match="does not open the repository 'me/tiny'.*401") as raised:
        untrained(caller, tmp_path, push_to_hub=True, hub_model_id="me/tiny", hub_token=TOKEN)
    assert TOKEN not in str(raised.value)


def test_an_export_that_cannot_be_pushed_is_kept(hub, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuse["/commit/"] = 500
    with pytest.raises(HubError, match=f"The export is in {tmp_path / 'out'}.*hf upload me/mine"):
        export(finished.out, out=tmp_path / "out", push="me/mine")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_trainers_settings_are_pickled_and_shown_without_the_token(caller, tmp_path):
    trainer = untrained(caller, tmp_path, hub_token=TOKEN)
    args = trainer.args
    assert trainer._hub_token == TOKEN and TOKEN.encode() not in pickle.dumps(args)
    assert TOKEN not in f"{args}{args!r}{args.to_dict()}{args.to_json_string()}{args.to_sanitized_dict()}"


def test_a_token_on_a_wrong_command_line_is_not_repeated(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\ndataset: d\n")
    for given in (["--hub_token", TOKEN], [f"--hub_token={TOKEN}"]):
        with pytest.raises(ConfigError, match="hub_token[ =]\\*\\*\\*") as raised:
            parse_recipe(recipe, [*given, "--max_steps", "many"])
        assert TOKEN not in str(raised.value)


def test_settings_do_not_print_the_token(tmp_path):
    args = VTGRPOConfig(
        str(tmp_path), hub_token="hf_secret", use_cpu=True, num_generations=2, per_device_train_batch_size=2
    )
    assert "hf_secret" not in repr(args) + str(args) and "HUB_TOKEN" in repr(args)
