"""``vt-trl view``: what is found, what the pages show, and that a browser shows it and runs nothing."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path
from urllib.parse import urlencode

import pytest
from conftest import picture

from vt_trl import cli
from vt_trl.errors import ConfigError, DataError
from vt_trl.transcripts import Picture, PictureEncoder, Transcript, TranscriptTurn, write_transcripts
from vt_trl.transcripts.browse import Filter, Run
from vt_trl.transcripts.pages import PER_PAGE, Pages
from vt_trl.transcripts.server import make_server
from vt_trl.transcripts.show import page_css, render_transcript

ATTACK = "<script>alert(1)</script>"
CHROMIUM = shutil.which("chromium")


def member(number: int, step: int = 1, **changes) -> Transcript:
    """Low view 56 x 56; odd members ask and see 112 x 112; member 2 writes a script, member 3 is cut."""
    low, full = picture(step, (56, 56)), picture(step, (112, 112))
    asks = number % 2 == 1
    call = TranscriptTurn("assistant", "<think>blurred</think>", "sampled", tokens=12, call='{"name": "resize_image"}')
    told = TranscriptTurn("user", "Here it is:", "told", (Picture(1, 9, 112, 112, 16),))
    said = TranscriptTurn(
        "assistant", ATTACK if number == 2 else "<answer>4</answer>", "cut" if number == 3 else "sampled"
    )
    turns = [
        TranscriptTurn("system", "Be brief."),
        TranscriptTurn("user", "\nHow many?", "prompt", (Picture(0, 0, 56, 56, 4),)),
    ]
    encode = PictureEncoder()
    values = {
        "question": f"How many at step {step}?", "gold": ("4",), "answer": ATTACK if number == 2 else "4",
        "status": "truncated" if number == 3 else "answered", "asked": asks, "attempted": asks,
        "correct": [True, True, False, None][number % 4], "verdict": "wrong" if number == 2 else "right",
        "verdict_reason": "not <b>4</b>" if number == 2 else None, "rewards": {"accuracy": float(number < 2)},
        "penalty": 0.1, "reward": 1.0 - number / 10, "advantage": 0.5 - number, "step": step, "mode": "train",
        "group": f"0/{step}", "member": number, "id": f"row-{step}", "source": "hard" if step % 2 else "easy",
    }  # fmt: skip
    images = (encode(low), encode(full)) if asks else (encode(low),)
    return Transcript((*turns, *((call, told) if asks else ()), said), images, **values | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three steps of one group of 4, and the log of the run."""
    root = tmp_path_factory.mktemp("view") / "my_run"
    for step in range(1, 4):
        members = [member(number, step) for number in range(4)]
        write_transcripts(root / "completions" / f"completions_{step:05d}.parquet", members)
    history = [{"step": step, "reward": 0.2 * step, "entropy": 1.0 / step, "request_rate": 0.5} for step in (1, 2, 3)]
    (root / "checkpoint-3").mkdir()
    (root / "checkpoint-3" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return root


@pytest.fixture(scope="module")
def server(folder):
    """The address of a server that shows the run."""
    with make_server(Pages(Run(folder)), 0) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def get(server: str, path: str, host: str | None = None, **words) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection(server, timeout=20)
    connection.request("GET", f"{path}?{urlencode(words)}", headers={"Host": host or server})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, data, dict(answer.headers)


def found(folder: Path, **words) -> list[tuple[int, int]]:
    """Step and member of what a filter finds, in order."""
    run = Run(folder)
    return [(one.step, one.member) for one in run.read(run.find(Filter.of(words)), pictures=False)]


def test_filters_and_orders(folder):
    assert found(folder) == [(step, number) for step in (3, 2, 1) for number in range(4)]
    assert found(folder, step="2", asked="asked") == [(2, 1), (2, 3)]
    assert found(folder, status="truncated", sort="oldest") == [(1, 3), (2, 3), (3, 3)]
    assert found(folder, judged="not judged", source="easy") == [(2, 3)]
    assert found(folder, judged="wrong", step="1") == [(1, 2)]
    assert found(folder, sort="reward-low", step="1") == [(1, 3), (1, 2), (1, 1), (1, 0)]
    assert found(folder, sort="advantage-high", step="3")[0] == (3, 0)
    assert found(folder, mode="eval") == []
    assert found(folder / "completions") == found(folder)
    assert len(found(folder / "completions" / "completions_00002.parquet")) == 4


def test_what_cannot_be_looked_for_is_named(folder, tmp_path, capsys):
    for words, said in (({"sort": "rewards-low"}, "Did you mean"), ({"step": "x"}, "whole number")):
        with pytest.raises(DataError, match=said):
            Filter.of(words)
    with pytest.raises(DataError, match="log_completions: true"):
        Run(tmp_path)
    (tmp_path / "other.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="no table of transcripts"):
        Run(tmp_path)
    assert cli.main(["view", str(tmp_path / "nothing")]) == 2
    assert "holds no transcripts" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="port is 99999"):
        make_server(Pages(Run(folder)), 99999)


def test_pictures_are_read_for_what_is_shown_only(folder, monkeypatch):
    """The list reads no pictures, and a group reads its own row group."""
    import pyarrow.parquet as pq

    read: list[tuple[int, bool]] = []
    real = pq.ParquetFile.read_row_group

    def watched(self, number, columns=None):
        read.append((number, "images" in columns))
        return real(self, number, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    pages = Pages(Run(folder))
    pages.list_page({})
    assert read == [(0, False)] * 3
    read.clear()
    pages.group_page({"file": "completions_00002.parquet", "row": "1"})
    assert sorted(read) == [(0, False), (0, True)]


def test_a_run_of_many_rollouts_is_paged_and_grows(tmp_path):
    write_transcripts(tmp_path / "a.parquet", [member(n % 4, n // 4, group=str(n // 4)) for n in range(60)])
    pages = Pages(Run(tmp_path))
    first, second = pages.list_page({"sort": "oldest"}), pages.list_page({"sort": "oldest", "from": str(PER_PAGE)})
    assert first.count('<a href="/group') == PER_PAGE and second.count('<a href="/group') == 10
    assert "1-50 of 60" in first and "51-60 of 60" in second
    write_transcripts(tmp_path / "b.parquet", [member(0, 99)])
    assert "at step 99?" in pages.list_page({}) and "61 rollouts in 2 files" in pages.list_page({})


def test_the_server_shows_lists_groups_and_pictures_and_no_more(server):
    status, page, headers = get(server, "/", status="truncated")
    assert status == 200 and page.count(b'<a href="/group') == 3
    assert "script-src" not in headers["Content-Security-Policy"]
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    status, page, _ = get(server, "/group", file="completions_00001.parquet", row=0)
    assert page.count(b"<article>") == 4 and ATTACK.encode() not in page and b"&lt;script&gt;alert(1)" in page
    assert b"wrong: not &lt;b&gt;4&lt;/b&gt;" in page and "112 × 112 px, 16 visual tokens".encode() in page
    sources = re.findall(rb'<img src="(/picture[^"]+)"', page)
    assert len(sources) == 6
    status, data, headers = get(
        server, sources[2].decode().split("?")[0], file="completions_00001.parquet", row=1, index=1
    )
    assert (status, headers["Content-Type"], data[:4]) == (200, "image/png", b"\x89PNG")
    for path, words in (
        ("/picture", {"file": "completions_00001.parquet", "row": 1, "index": 7}),
        ("/group", {"file": "../checkpoint-3/trainer_state.json", "row": 0}),
        ("/group", {"file": "completions_00001.parquet", "row": 44}),
        ("/group", {"row": "-1"}),
        ("/etc/passwd", {}),
    ):
        assert get(server, path, **words)[0] == 404, path
    assert get(server, "/", host="evil.example:80")[0] == 403


def test_one_component_shows_an_episode_anywhere():
    html = render_transcript(member(1, question=ATTACK), label="after <i>")
    assert str(html).count("data:image/png;base64,") == 2 and ATTACK not in html and "after &lt;i&gt;" in html
    assert "tool call: {&#34;name&#34;: &#34;resize_image&#34;}" in html
    given = render_transcript(member(1), source=lambda transcript, index: f"/p/{index}")
    assert re.findall('src="([^"]+)"', given) == ["/p/0", "/p/1"]
    broken = Transcript((TranscriptTurn("user", "", "prompt", (Picture(0, 0, 5, 5),)),), (b"<svg onload=alert(1)>",))
    assert "was not kept" in render_transcript(broken) and "<img" not in render_transcript(broken)
    assert "prefers-color-scheme: dark" in page_css()
    own = page_css(".mine")
    assert own.startswith(".mine {") and ":root" not in own and own.count("{") == own.count("}")


def test_what_nobody_measured_is_not_spoken_of():
    turn = TranscriptTurn("assistant", "hm", "sampled")
    bare = render_transcript(Transcript((turn,), status="answered", answer="7"))
    assert "Answer given" in bare and "did not ask" in bare
    for word in ("Reward", "Advantage", "Correct answer", "judged"):
        assert word not in bare and (word in render_transcript(member(1)) or word == "judged")
    assert "not judged" in render_transcript(Transcript((turn,), status="answered", gold=("7",)))
    started = render_transcript(Transcript((turn,), status="under way"))
    assert "under way" in started and "Answer given" not in started and "did not ask" not in started


def browser(url: str, *options: str) -> str:
    """What Chromium prints for a page."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *options, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_the_page_and_runs_nothing(folder, server, tmp_path):
    """The exported page: a script of its own, added here, would change the title and measures what is displayed."""
    page = tmp_path / "run.html"
    assert cli.main(["view", str(folder), "--export", str(page), "--limit", "6", "--sort", "oldest"]) == 0
    text = page.read_text()
    assert (
        text.count("<article>") == 6 and "6 of 12 that match" in text and not re.search("(src|href)=.?https?:", text)
    )
    # The page forbids scripts; to measure it, this copy allows one.
    probe = """<script>addEventListener("load", () => {
      const shown = () => [...document.querySelectorAll(".entry")].filter(one => one.offsetHeight).length;
      const images = [...document.querySelectorAll("article img")];
      const all = shown();
      document.querySelector("#status").value = VALUE;
      const scripts = document.querySelectorAll("article script").length;
      const widths = [...new Set(images.map(one => one.naturalWidth))];
      document.title = JSON.stringify({all, filtered: shown(), scripts, widths});
    })</script>"""
    value = re.search(r'<option value="(\d+)">truncated', text)[1]
    allowed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace(' loading="lazy"', "")
    (tmp_path / "probe.html").write_text(allowed.replace("</body>", probe.replace("VALUE", f'"{value}"') + "</body>"))
    title = re.search("<title>(.*?)</title>", browser(f"file://{tmp_path}/probe.html", "--dump-dom"))[1]
    seen = json.loads(title)
    assert seen == {"all": 6, "filtered": 1, "scripts": 0, "widths": [56, 112]}
    dom = browser(f"http://{server}/?{urlencode({'judged': 'wrong', 'step': 2})}", "--dump-dom")
    assert dom.count('<a href="/group') == 1 and "&lt;script&gt;alert(1)" in dom
    browser(f"http://{server}/group?file=completions_00001.parquet&row=0", f"--screenshot={tmp_path}/shot.png",
            "--window-size=1600,1400", "--virtual-time-budget=3000")  # fmt: skip
    from PIL import Image

    shot = Image.open(tmp_path / "shot.png").convert("RGB")
    assert len(set(shot.resize((200, 175)).getdata())) > 1000  # noise pictures have many colours; a page of text few
