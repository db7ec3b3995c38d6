"""One stage as a process of its own: its output in a log, signals handed on, nothing left running.

Every process of a stage has a token in its environment. By it they are found again, all of them: those that a launcher
started in sessions of their own, and those that outlived a driver that was killed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

from vt_trl.redact import environment_secrets, without_keys

TOKEN = "VT_TRL_LOOP_STAGE"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_ENDS = re.compile(rb"(\r\n|\r|\n)")
_LONGEST = 1_000_000  # bytes of a line
_POLL = 0.1  # seconds between looks at the process
_LOOK = 5.0  # seconds between looks at how far it is
_LEFT = 10.0  # seconds that what a finished command leaves behind has to end by itself


class Stopped(Exception):
    """A signal asked the driver to end; the stage has ended before this is raised."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in a list instead of ending this process (in the main thread only)."""
    noted: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_command(
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str],
    token: str,
    *,
    say: Callable[[str], Any],
    progress: Callable[[], str],
    noted: list[int],
) -> int:
    """Run a command to its end and return its exit status; a signal's is negative.

    ``say`` gets every line it prints, which also goes to the end of ``log``, without keys. ``progress`` says how far
    it is; what it says is a line, too, when it changes. ``noted``: signals this process got, see :func:`signals`;
    the first is handed on, after the second the stage is killed. Raises Stopped when it has ended after a signal.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    given = {**os.environ, "PYTHONUNBUFFERED": "1", **env, TOKEN: token}
    with log.open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command,
            env=given,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the driver, which hands it on once
        )

        def line(text: str) -> None:
            stream.write(text + "\n")
            stream.flush()
            say(text)

        reader = threading.Thread(target=_read, args=(process.stdout, line), daemon=True)
        reader.start()
        status = _wait(process, token, line, progress, noted)
        end_all(token, _LEFT)
        reader.join(timeout=_LEFT)
    if noted:
        raise Stopped(noted[0])
    return status


def _wait(
    process: subprocess.Popen, token: str, line: Callable[[str], None], progress: Callable[[], str], noted: list[int]
) -> int:
    """Until the command has ended, and after a signal until all its processes have."""
    said, looked, handed_on = "", time.monotonic(), 0
    while process.poll() is None or (handed_on and processes_of(token)):
        if len(noted) > handed_on:
            handed_on = len(noted)
            if handed_on == 1:
                line(f"{signal.Signals(noted[0]).name}: the stage is asked to end; once more, and it is killed.")
                ask_to_end(process.pid)
            else:
                line("The stage is killed.")
                send(token, signal.SIGKILL)
        if time.monotonic() - looked > _LOOK:
            looked, now = time.monotonic(), progress()
            if now and now != said:
                line(now)
            said = now
        time.sleep(_POLL)
    return process.returncode


def _read(stream: IO[bytes], line: Callable[[str], None]) -> None:
    """Lines of a stream without escape sequences and keys; of what a bar writes over itself, a line now and then."""
    secrets = environment_secrets()
    before, shown, rest = "", 0.0, b""
    while chunk := stream.read1(65_536):
        *parts, rest = _ENDS.split(rest + chunk)
        if len(rest) > _LONGEST:
            parts, rest = [*parts, rest, b"\n"], b""
        for raw, end in zip(parts[::2], parts[1::2], strict=True):
            text = without_keys(_ESCAPES.sub("", raw.decode("utf-8", "replace")).rstrip(), secrets)
            bar = end == b"\r"
            if not text or text == before or (bar and time.monotonic() - shown < _LOOK):
                continue
            before, shown = text, time.monotonic() if bar else shown
            line(text)
    text = without_keys(_ESCAPES.sub("", rest.decode("utf-8", "replace")).rstrip(), secrets)
    if text:
        line(text)


def processes_of(token: str) -> list[psutil.Process]:
    """The processes of a stage that run, this one left out."""
    found = []
    for process in psutil.process_iter():
        try:
            alive = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get(TOKEN) == token:
                found.append(process)
        except (psutil.Error, OSError):  # it has ended, or is somebody else's
            continue
    return found


def ask_to_end(pid: int) -> None:
    """SIGTERM for the command itself, or for those that a launcher started, where there is one.

    Not for all there are: a training run that is to save a checkpoint needs its engine and its data workers for that.
    """
    try:
        parent = psutil.Process(pid)
        launched = parent.children() if "accelerate.commands.launch" in parent.cmdline() else []
        for process in launched or [parent]:
            process.terminate()
    except psutil.Error:  # it has just ended
        return


def send(token: str, number: int) -> None:
    """A signal for every process of a stage."""
    for process in processes_of(token):
        try:
            process.send_signal(number)
        except psutil.Error:
            continue


def end_all(token: str, patience: float) -> int:
    """End what is left of a stage: after ``patience`` seconds by SIGTERM, after as many again by SIGKILL.

    Returns how many processes there were after the first wait.
    """
    psutil.wait_procs(processes_of(token), timeout=patience)
    left = processes_of(token)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if processes_of(token):
            send(token, number)
            psutil.wait_procs(processes_of(token), timeout=patience)
    return len(left)


def tail(log: Path, lines: int = 15) -> list[str]:
    """The last lines of a log; empty where there is none."""
    if not log.is_file():
        return []
    with log.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(0, stream.tell() - 65_536))
        return stream.read().decode("utf-8", "replace").splitlines()[-lines:]
