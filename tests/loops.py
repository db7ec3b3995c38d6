"""Loops for tests: recipes written as dictionaries, run by stages that take milliseconds."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from shipped import ROOT

from vt_trl.loop import run_loop
from vt_trl.loop.manifest import Manifest

RUN = "module loop_stage"


def stage(name: str, **options: Any) -> dict[str, Any]:
    """A stage of ``loop_stage``; keys of a stage that are not options stay outside of `set`."""
    own = {key: options.pop(key) for key in ("in_rounds", "resumes", "env", "launch") if key in options}
    return {"name": name, "run": RUN, "set": options, **own}


def write(folder: Path, stages: list[dict[str, Any]], **more: Any) -> Path:
    """A recipe in ``folder`` whose loop lies next to it."""
    path = folder / "loop.yaml"
    path.write_text(yaml.safe_dump({"folder": str(folder / "out"), **more, "stages": stages}))
    return path


def run(path: Path, *overrides: str, **more: Any) -> tuple[Manifest, str]:
    """Run a loop here; its manifest and what it said."""
    said = io.StringIO()
    manifest = run_loop(path, overrides, console=Console(file=said, width=500, soft_wrap=True), **more)
    return manifest, said.getvalue()


def start(path: Path, *words: str) -> subprocess.Popen:
    """``vt-trl loop`` as a process of its own."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    command = [sys.executable, "-m", "vt_trl", "loop", str(path), *words]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def result(folder: Path, name: str) -> str:
    return (folder / "out" / "stages" / name / "result.txt").read_text()


def starts(folder: Path, name: str) -> int:
    """How often the command of a stage began."""
    path = folder / "out" / "stages" / f".{name}.starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "loop.json").read_text())
