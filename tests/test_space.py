"""The Space: a page in a process of its own, asked by programs and by a browser."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import picture
from helpers import CALL, answer, environment_of_its_own
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image
from taught import taught

from demos.reading.task import make_rows
from vt_trl import VisionThinkPipeline
from vt_trl.data import episode_row, load_rows
from vt_trl.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "demos" / "space"
HOSTILE = "<img src=x onerror=\"document.title='owned'\"> ${document.title='owned'} {{constructor}}"
SENT = ".image-frame img"  # the picture in the field, which has reached the server by then
REPLIES = [("Which letter?", [CALL, answer("A")]), ("How many?", [answer("7")]), (HOSTILE, [answer(HOSTILE)])]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return taught(tmp_path_factory.mktemp("space") / "model", REPLIES)


@pytest.fixture(scope="module")
def page(model, tmp_path_factory) -> Iterator[str]:
    """The address of the page, started as a Space starts it."""
    folder = tmp_path_factory.mktemp("page")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"VT_MODEL": model, "VT_DEVICE": "cpu", "VT_MAX_IMAGE_PIXELS": 200_000, "VT_MAX_UPLOAD_BYTES": 300_000}
    settings |= {"GRADIO_SERVER_PORT": port, "GRADIO_TEMP_DIR": folder / "uploads", "PYTHONPATH": ROOT}
    variables = environment_of_its_own(**{name: str(value) for name, value in settings.items()})
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, SPACE / "app.py"], env=variables, cwd=folder, stdout=log, stderr=log
        )
        try:
            for _ in range(3000):
                if "Running on local URL" in (folder / "log").read_text():
                    break
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


@pytest.fixture(scope="module")
def pipe(model) -> VisionThinkPipeline:
    return VisionThinkPipeline(model, device="cpu")


def client(page: str):
    from gradio_client import Client

    return Client(page, verbose=False, analytics_enabled=False)


def saved(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


def said(path: str | Path) -> dict:
    """A picture as gradio's clients send it."""
    from gradio_client import handle_file

    return handle_file(str(path))


# Programs.


def test_turns_arrive_one_by_one_and_are_those_of_the_pipeline(page, pipe, tmp_path):
    path = saved(picture(7), tmp_path / "a.png")
    one = client(page)
    job = one.submit(said(path), "Which letter?", api_name="/ask")
    job.result(60)
    opening, middle, end = (output[1] for output in job.outputs())
    expected = pipe(image=path, question="Which letter?")
    assert [turn["token_ids"] for turn in end["turns"]] == [list(turn.token_ids) for turn in expected.rollout.turns]
    assert (
        (end["answer"], end["asked"], end["status"]) == ("A", True, "answered") == (expected.answer, True, "answered")
    )
    assert [len(state["turns"]) for state in (opening, middle, end)] == [0, 1, 2]
    assert [state["visual_tokens"] for state in (opening, middle, end)] == [4, 20, 20]
    assert {state["visual_tokens_always_full"] for state in (opening, middle, end)} == {16}
    shown = [output[0] for output in job.outputs()]
    assert [html.count("data:image/png") for html in shown] == [1, 2, 2]
    assert "75.0 % saved against always-full" in shown[0] and "25.0 % more than always-full" in shown[2]
    assert "It looks …" in shown[0] and "Answer: A" in shown[2] and "Your 2 questions" not in shown[2]
    html, data = one.predict(said(path), "How many?", api_name="/ask")
    assert data["answer"] == "7" and "Your 2 questions: 24 of 32,\n25.0 % saved" in html
    assert "Your 2 questions" not in client(page).predict(said(path), "How many?", api_name="/ask")[0]  # somebody else


def test_users_at_the_same_time_get_their_own_answers(page, pipe, tmp_path):
    questions = ["Which letter?", "How many?"] * 4
    paths = [saved(picture(number, (112, 112 + 56 * number)), tmp_path / f"{number}.png") for number in range(8)]
    start = threading.Barrier(8)

    def ask(question: str, path: Path) -> dict:
        own = client(page)
        start.wait()
        return own.predict(said(path), question, api_name="/ask")[1]

    with ThreadPoolExecutor(8) as users:
        answers = list(users.map(ask, questions, paths))
    for question, path, found in zip(questions, paths, answers, strict=True):
        expected = pipe(image=path, question=question)
        assert [turn["token_ids"] for turn in found["turns"]] == [
            list(one.token_ids) for one in expected.rollout.turns
        ]
        assert found["visual_tokens"] == expected.visual_tokens


def test_what_cannot_be_used_is_refused_in_words(page, tmp_path):
    from gradio_client.exceptions import AppError

    good = saved(picture(0), tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "markup.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    own = client(page)
    for path, question, words in (
        (saved(Image.new("RGB", (500, 500)), tmp_path / "large.png"), "What?", "500 x 500 pixels.*200000 are allowed"),
        (saved(Image.new("RGB", (400, 1)), tmp_path / "long.png"), "What?", "aspect ratio"),
        (tmp_path / "broken.png", "What?", "Cannot read the image: it is in none of the formats"),
        (tmp_path / "markup.svg", "What?", "in none of the formats"),
        (good, "  ", "There is no question"),
        (good, "x" * 2001, "has 2001 characters; 2000 are allowed"),
    ):
        with pytest.raises(AppError, match=words):
            own.predict(said(path), question, api_name="/ask")
    with pytest.raises(AppError, match="There is no picture"):
        own.predict(None, "What?", api_name="/ask")
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
    with pytest.raises(Exception, match="(?i)exceed|413|too large"):
        own.predict(said(saved(Image.fromarray(noise), tmp_path / "heavy.png")), "What?", api_name="/ask")
    assert own.predict(said(good), "How many?", api_name="/ask")[1]["answer"] == "7"  # nothing of this did any harm


def test_an_address_is_not_fetched(page):
    from gradio_client.exceptions import AppError

    fetched = []

    class Site(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            fetched.append(self.path)

    with HTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{site.server_port}/a.png"
        with pytest.raises(AppError, match="Addresses are not fetched"):
            given = {"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}
            client(page).predict(given, "What?", api_name="/ask")
        site.shutdown()
    assert fetched == []


# A browser.


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("needs Chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])  # containers run as root
        yield opened
        opened.close()


def ask_in(tab, page: str, question: str, path: Path) -> None:
    """Fill in the form and wait for the end of the answer."""
    tab.goto(page)
    tab.locator("input[type=file]").first.set_input_files(path)
    tab.locator(SENT).wait_for()
    tab.get_by_label("Question").fill(question)
    tab.get_by_role("button", name="Ask").click()
    tab.locator(".spent .answer", has_text="Answer: ").wait_for(timeout=60_000)


@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_both_turns_and_loads_nothing_from_elsewhere(page, browser, tmp_path, width):
    tab = browser.new_page(viewport={"width": width, "height": 900})
    loaded: list[str] = []
    tab.on("request", lambda request: loaded.append(request.url))
    ask_in(tab, page, "Which letter?", saved(picture(7), tmp_path / "a.png"))
    assert tab.locator(".episodes figcaption").all_inner_texts() == [
        "56 × 56 px, 4 visual tokens",
        "112 × 112 px, 16 visual tokens",
    ]
    assert tab.locator(".episodes .policy").count() == 2
    assert "25.0 % more than always-full" in tab.locator(".spent").inner_text()
    own, full = (tab.locator(".spent .bar i").nth(number).bounding_box()["width"] for number in (0, 1))
    assert own * 16 == pytest.approx(full * 20, rel=0.02)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    assert not [url for url in loaded if not url.startswith((page, "data:", "blob:"))]
    tab.close()


def test_what_a_user_or_the_policy_writes_is_shown_and_never_run(page, browser, tmp_path):
    tab = browser.new_page()
    ask_in(tab, page, HOSTILE, saved(picture(1), tmp_path / "a.png"))
    assert tab.locator(".spent .answer").inner_text() == f"Answer: {HOSTILE}"
    assert tab.locator(".episodes h3").inner_text() == HOSTILE
    tab.get_by_text("As data").click()
    tab.wait_for_timeout(300)
    assert tab.locator("img[src=x]").count() == 0 and tab.title() == "vt_trl"
    tab.close()


def test_an_example_is_one_click_and_a_refusal_is_seen(page, browser, tmp_path):
    tab = browser.new_page()
    tab.goto(page)
    tab.locator("table tbody tr").first.click()
    tab.locator(SENT).wait_for()
    assert tab.get_by_label("Question").input_value() == "Which letter?"
    tab.get_by_role("button", name="Ask").click()
    tab.locator(".spent .answer", has_text="nswer").wait_for(timeout=60_000)
    large = saved(Image.new("RGB", (500, 500)), tmp_path / "large.png")
    tab.get_by_label("Remove Image").click()
    tab.locator("input[type=file]").first.set_input_files(large)
    tab.locator(SENT).wait_for()
    tab.get_by_role("button", name="Ask").click()
    tab.get_by_text("declares 500 x 500 pixels").wait_for(timeout=60_000)
    tab.close()


# Its parts.


@pytest.fixture(scope="module")
def app():
    from demos.space import app

    return app


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "VT_MODEL is not set.*make demo"),
        ({"VT_MODEL": "m", "VT_MAX_WAITING": "0"}, "VT_MAX_WAITING is '0'"),
        ({"VT_MODEL": "m", "VT_MAX_IMAGE_PIXELS": "many"}, "VT_MAX_IMAGE_PIXELS is 'many'"),
        ({"VT_MODEL": "m", "VT_ENVIRONMENT_ARGS": "[1]"}, "VT_ENVIRONMENT_ARGS must map"),
    ],
)
def test_settings_that_cannot_work(app, variables, words):
    with pytest.raises(ConfigError, match=words):
        app.Settings.read(variables)


def test_a_page_without_a_model_does_not_start(app, monkeypatch, tmp_path):
    monkeypatch.setenv("VT_MODEL", str(tmp_path / "no_such"))
    with pytest.raises(SystemExit, match="The page cannot start. model is .*no_such.*does not load"):
        app.main()


def test_a_gpu_is_lent_for_each_question_where_spaces_are(app, monkeypatch, model):
    lent = []
    monkeypatch.setattr(app, "spaces", SimpleNamespace(GPU=lambda function: lent.append(function) or function))
    blocks = app.make_page(app.Settings.read({"VT_MODEL": str(model), "VT_DEVICE": "cpu", "VT_EXAMPLES": ""}))
    asked = [one.fn for one in blocks.fns.values() if one.api_name == "ask"]
    assert len(lent) == 1 and asked == lent


def test_a_question_that_was_given_up_leaves_nothing_behind(app, model, tmp_path):
    space = app.Space(app.Settings.read({"VT_MODEL": str(model), "VT_DEVICE": "cpu"}))
    path = str(saved(picture(7), tmp_path / "a.png"))
    left = space.ask(path, "Which letter?", app.Totals())
    next(left), next(left)
    left.close()
    *_, (_, data, totals) = space.ask(path, "Which letter?", app.Totals())
    assert data["answer"] == "A" and totals == app.Totals(1, 20, 16)


def test_examples_are_those_of_the_reading_task():
    found = [episode_row(row) for row in load_rows(str(SPACE / "examples"))]
    drawn = make_rows(4, 0.5, seed=4)
    assert [row["question"] for row in found] == [row["question"] for row in drawn]
    assert all((np.asarray(a["image"]) == np.asarray(b["image"])).all() for a, b in zip(found, drawn, strict=True))


def test_gradio_is_named_by_the_page_alone():
    sources = [path for folder in ("vt_trl", "data_prep") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 100
    assert not [path for path in sources if "import gradio" in path.read_text(encoding="utf-8")]


def test_what_a_space_is_made_of_fits_together(app):
    """The settings on top of the page's README, what it installs, and what this project offers."""
    head = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (head["sdk"], head["license"]) == ("gradio", project["license"].lower())
    assert (SPACE / head["app_file"]).samefile(app.__file__)
    assert len(head["short_description"]) <= 60
    (wanted,) = map(Requirement, (SPACE / "requirements.txt").read_text().split())
    assert wanted.name == project["name"] and wanted.extras <= set(project["optional-dependencies"])
    (gradio,) = map(Requirement, project["optional-dependencies"]["space"])
    assert gradio.name == "gradio" and gradio.specifier.contains(head["sdk_version"])
    assert str(gradio) in project["optional-dependencies"]["dev"]
    assert SpecifierSet(project["requires-python"]).contains(head["python_version"])
