"""Environments that look, named on the command line: evaluate, compare, view, ask, the pipeline, and the server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import picture
from helpers import Script, answer
from serving import data_url, picture_part, serving, token_ids, with_parts
from test_env_zoom import call

from vt_trl import cli
from vt_trl.commands import serve
from vt_trl.data import load_rows
from vt_trl.errors import ConfigError, DataError
from vt_trl.evaluation.rows import content_digest
from vt_trl.evaluation.run import most_pictures
from vt_trl.generation.base import ScriptedBackend
from vt_trl.inference import PolicyModel
from vt_trl.pipeline import VisionThinkPipeline
from vt_trl.policies import parse_policy
from vt_trl.transcripts import read_transcripts

# A random model looks at nothing: these take its first reply as a look at the left half, the next as the end.
ZOOMS, LOOKS = "helpers:ZoomsFirst", "helpers:LooksFirst"
SMALL = {"turns": 3, "min_pixels": 3136}
LIMITS = ["--device", "cpu", "--max-turn-tokens", "6", "--max-completion-length", "500"]


@pytest.fixture
def rows(tmp_path) -> Path:
    """Three questions about one picture and one about two, 112 x 112 each."""
    root = tmp_path / "rows"
    root.mkdir()
    for number in range(5):
        picture(number, (112, 112)).save(root / f"{number}.png")
    lines = [{"id": f"r{n}", "images": f"{n}.png", "question": f"Is it {n}?", "answer": str(n)} for n in range(3)]
    lines.append({"id": "two", "images": ["3.png", "4.png"], "question": "Is <image> larger?", "answer": "no"})
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def evaluated(checkpoint, rows: Path, out: Path, *policies: str) -> dict[str, dict]:
    """``vt-trl evaluate``: the cell of each policy."""
    alone = {name: SMALL for name in policies if name != "always-full"}
    arguments = json.dumps(alone | {"always-full": {"min_pixels": 3136}})
    command = ["evaluate", "--model", f"tiny={checkpoint}", "--data", str(rows), "--out", str(out), *LIMITS]
    assert cli.main([*command, "--policies", *policies, "--environment-args", arguments]) == 0
    return {cell["policy"]: cell for cell in json.loads((out / "results.json").read_text())["cells"]}


def test_they_are_evaluated_compared_and_viewed(checkpoint, rows, tmp_path, capsys):
    out = tmp_path / "out"
    cells = evaluated(checkpoint, rows, out, "zoom", "look", ZOOMS, LOOKS, "always-full")
    assert [cells[name]["unreadable"] for name in ("zoom", ZOOMS, "look", LOOKS, "always-full")] == [1, 1, 0, 0, 0]
    assert [cells[name]["request_rate"] for name in ("look", LOOKS, "always-full")] == [0, 1, None]
    # 16 tokens in full; half of each side: 4. A look at a half takes 8. The last question has two pictures.
    assert [cells[name]["visual_tokens"] for name in ("zoom", ZOOMS)] == [16, 24]
    assert [cells[name]["visual_tokens"] for name in ("look", LOOKS, "always-full")] == [5, 5 + 8, 20]
    assert cells[LOOKS]["visual_tokens_share"] == pytest.approx(13 / 20)
    (table,) = out.glob("completions/*LooksFirst*.parquet")
    two = read_transcripts(table)[3]
    assert [one.parts[0].right for one in two.turns[1].pictures if one.parts] == [0.5] and two.looks == 1
    page = tmp_path / "page.html"
    assert cli.main(["view", str(out), "--export", str(page), "--limit", "100"]) == 0
    assert page.read_text().count("<rect") == 3 + 4  # every look of the two
    assert (out / "report.html").read_text().count("<rect") == 3 + 4
    assert (
        cli.main(["compare", str(out), str(out), "--policies", "always-full", LOOKS, "--json", str(tmp_path / "c")])
        == 0
    )
    (pair,) = json.loads((tmp_path / "c").read_text())
    assert pair["visual_tokens"]["difference"] == -7 and pair["asked"]["difference"] == 1


def test_settings_of_one_policy_are_not_those_of_others(checkpoint, rows, tmp_path, capsys):
    arguments = json.dumps({"turns": 3})
    command = ["evaluate", "--model", str(checkpoint), "--data", str(rows), "--out", str(tmp_path / "out"), *LIMITS]
    assert cli.main([*command, "--policies", "always-full", "--environment-args", arguments]) == 2
    assert "environment_args do not fit the policy 'always-full'" in capsys.readouterr().err


def test_an_engine_is_made_for_the_pictures_that_rows_have(checkpoint, rows, monkeypatch):
    """And a second picture that is replaced makes another row."""
    dataset = load_rows(rows)
    assert most_pictures(dataset) == 2 and most_pictures(dataset.remove_columns("images")) == 1
    wanted = {"always-full": 2, "two-turn": 4, "look": 4 + 8 - 1, "zoom": 8}
    for name, images in wanted.items():
        model = PolicyModel(checkpoint, device="cpu", max_images=1)
        model.runner(parse_policy(name).environment(None, model.sight), most_pictures(dataset))
        assert model.max_images == images
    monkeypatch.setattr(PolicyModel, "uses_vllm", True)
    with pytest.raises(ConfigError, match="up to 14 pictures"):
        model.runner(parse_policy("two-turn").environment(), 7)
    before = content_digest(dataset[3])
    picture(9, (56, 56)).save(rows / "4.png")
    assert content_digest(dataset[3]) != before


def test_the_pipeline_and_ask_take_several_pictures(checkpoint, rows, capsys, tmp_path):
    settings = {"policy": LOOKS, "environment_args": SMALL, "max_turn_tokens": 6, "device": "cpu"}
    pipe = VisionThinkPipeline(checkpoint, **settings)
    two = [picture(3, (112, 112)), rows / "4.png"]
    result = pipe(image=two, question="Which?")
    assert [one.size for one in result.pictures[:2]] == [(56, 56), (56, 56)] and result.visual_tokens == 4 + 4 + 8
    assert result.asked and "Image 2" in result.rollout.messages[1].text
    one = pipe([{"image": two[0], "question": "Which?"}, {"image": two, "question": "Which?"}], batch_size=2)
    assert [each.visual_tokens for each in one] == [4 + 8, 16]
    with pytest.raises(DataError, match="list of pictures is empty"):
        pipe(image=[], question="Which?")
    with pytest.raises(DataError, match="2 pictures"):
        VisionThinkPipeline(checkpoint, **settings | {"policy": "zoom"})(image=two, question="Which?")
    command = ["ask", "--image", str(rows / "3.png"), str(rows / "4.png"), "--question", "Which?", "--model"]
    command += [str(checkpoint), "--policy", LOOKS, "--environment-args", json.dumps(SMALL), *LIMITS]
    assert cli.main([*command, "--save-pictures", str(tmp_path / "seen")]) == 0
    assert "looked again; 16 visual tokens" in capsys.readouterr().out
    assert len(list((tmp_path / "seen").iterdir())) == 3


def service(checkpoint, policy: str):
    arguments = [str(checkpoint), "--policy", policy, "--name", "tiny", "--environment-args", json.dumps(SMALL)]
    return serve.make_service(serve.parser().parse_args([*arguments, *LIMITS]))


def test_the_server_plays_them_by_name(checkpoint):
    parts = [picture_part(data_url(picture(number, (112, 112)))) for number in (3, 4)]
    text = {"type": "text", "text": "Is <image> larger?"}

    def ask(server, *content):
        with server.client() as client:
            more = {"extra_body": {"vt_trl": {"turns": True}}}
            return client.chat.completions.create(model="tiny", messages=with_parts(*content), **more)

    with serving(service(checkpoint, LOOKS).engine) as server:
        reply = ask(server, *parts, text)
        assert reply.usage.vt_trl["visual_tokens"] == 4 + 4 + 8 and reply.usage.vt_trl["asked"]
        assert len(token_ids(reply)) == 2
        with pytest.raises(Exception, match="has 5 images; send 1 to 4"):
            ask(server, *parts, *parts, parts[0], text)
    zoom = service(checkpoint, "zoom").engine
    tokenizer = zoom.runner.encoder.tokenizer
    script = Script(tokenizer, lambda member, turn: [call([0, 0, 56, 112]), answer("seen")][turn])
    zoom.runner.backend = ScriptedBackend(script)
    with serving(zoom) as server:
        reply = ask(server, parts[0], {"type": "text", "text": "What?"})
        assert reply.choices[0].message.content == "seen" and reply.usage.vt_trl["visual_tokens"] == 16 + 8
        with pytest.raises(Exception, match="has 2 images; send exactly one"):
            ask(server, *parts, text)
