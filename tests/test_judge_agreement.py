"""``vt-trl judge-agreement``: figures by hand, rows that differ, and the shipped labelled file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.judge_server import JudgeServer
from vt_trl import cli
from vt_trl.errors import ConfigError, DataError
from vt_trl.judges.agreement import judge_agreement, kappa, read_rows
from vt_trl.judges.base import Verdict

ROWS = Path(__file__).resolve().parents[1] / "benchmarks" / "judge_rows.jsonl"


def test_kappa_by_hand():
    # 50 rows: both right 20, only the first 5, only the second 10, both wrong 15: p_o 0.7, p_e 0.5, kappa 0.4
    first = [True] * 25 + [False] * 25
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert kappa(first, second) == pytest.approx(0.4)
    assert kappa([True, False], [False, True]) == -1
    assert kappa([True, False], [True, False]) == 1
    assert kappa([True, True], [True, True]) is None  # chance explains it all
    assert kappa([], []) is None


def write(path: Path, *rows: dict) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def row(prediction: str, label: str = "right", **more) -> dict:
    return {"question": "How many?", "answer": "12", "prediction": prediction, "label": label} | more


def test_report_counts_only_what_both_decided(tmp_path, capsys):
    file = write(
        tmp_path / "rows.jsonl", row("12"), row("13", "wrong"), row("12.0", "wrong", id="odd"), row("a dozen or so")
    )
    out = tmp_path / "report.json"
    assert cli.main(["judge-agreement", "--rows", str(file), "--judges", "rule", "label", "--json", str(out)]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    (pair,) = report["pairs"]
    assert (
        report["rows"] == 4
        and report["judges"]["rule"]["failed"] == 1
        and report["judges"]["rule"]["coverage"] == 0.75
    )
    assert pair["both_decided"] == 3 and pair["agreement"] == pytest.approx(2 / 3)
    assert [one["id"] for one in pair["differ"]] == ["odd"]
    assert pair["differ"][0]["rule"] == "right" and pair["differ"][0]["label"] == "wrong"
    assert "odd" in capsys.readouterr().out


def test_remote_judges_take_a_model_and_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    file = write(tmp_path / "rows.jsonl", row("12"), row("13", "wrong"))
    with JudgeServer() as server:
        settings = {"openai=my-model": {"base_url": server.base_url}}
        report = judge_agreement(file, ["openai=my-model", "label"], settings)
    assert report["pairs"][0]["agreement"] == 1
    assert {request.body["model"] for request in server.requests} == {"my-model"}


@pytest.mark.parametrize(
    ("judges", "settings", "message"),
    [
        (["rule"], {}, "two or more"),
        (["rule", "rule"], {}, "two or more"),
        (["rule", "nobody"], {}, "nobody"),
        (["rule=x", "label"], {}, "after `=`"),
        (["rule", "label"], {"local": {}}, "not among"),
    ],
)
def test_settings_that_cannot_work(tmp_path, judges, settings, message):
    with pytest.raises(ConfigError, match=message):
        judge_agreement(write(tmp_path / "rows.jsonl", row("12")), judges, settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("{", "line 1"),
        ('\n{"question": "q", "answer": "a"}', "line 2"),
        ('{"question": "q", "answer": [], "prediction": "p"}', "must be texts"),
        ('{"question": "q", "answer": 5, "prediction": "p"}', "line 1"),
        ('{"question": "q", "answer": "a", "prediction": "p", "label": "yes"}', "right or wrong"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="cannot read"):
        read_rows(tmp_path / "missing.jsonl")


def test_command_line_says_what_is_wrong(tmp_path, capsys):
    file = str(write(tmp_path / "rows.jsonl", row("12")))
    command = ["judge-agreement", "--rows", file, "--judges", "rule", "label", "--judge-args"]
    assert cli.main([*command, "{"]) == 2 and "JSON" in capsys.readouterr().err
    assert cli.main([*command, '{"rule": 5}']) == 2 and "settings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "{}", "--unknown", "1"])


def test_unlabelled_rows_cannot_be_compared_with_labels(tmp_path):
    file = write(tmp_path / "rows.jsonl", row("12", None))
    with pytest.raises(DataError, match="no label"):
        judge_agreement(file, ["rule", "label"])


def test_the_shipped_rows():
    rows = read_rows(ROWS)
    labels = Counter(one.label for one in rows)
    assert len(rows) >= 200 and None not in labels
    assert 0.4 < labels[Verdict.RIGHT] / len(rows) < 0.6
    assert len({one.id for one in rows}) == len({one.case.key for one in rows}) == len(rows)
    assert len({one.kind for one in rows}) >= 10
