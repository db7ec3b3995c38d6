"""vLLM's own server on this machine's CPU, for the tests of those who talk to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from helpers import environment_of_its_own

STARTED_WITHIN = 600.0  # seconds; a minute on idle cores, many times that next to other programs


@dataclass(frozen=True)
class ServerProcess:
    """``url`` without ``/v1``; it may still be loading."""

    url: str
    process: subprocess.Popen
    log: Path

    def wait_for(self, seconds: float = STARTED_WITHIN) -> None:
        """Until it answers; fails the test when it does not."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            time.sleep(0.5)
        pytest.fail(f"no server:\n{self.log.read_text()[-3000:]}")


@contextmanager
def vllm_server(checkpoint: Path, log: Path, *options: str) -> Iterator[ServerProcess]:
    """Start it on a free port; ended when the context is. Pictures of 1 to 256 visual tokens of 28 x 28 px."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = json.dumps({"size": {"shortest_edge": 28**2, "longest_edge": 256 * 28**2}})
    # `vllm serve` looks for a distribution called vllm, which the CPU build is not; the module is the same server.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --max-num-seqs 16".split()
    command += ["--limit-mm-per-prompt", '{"image": 3, "video": 0}', "--mm-processor-kwargs", limits, *options]
    with open(log, "w") as out:
        surroundings = environment_of_its_own(VLLM_SERVER_DEV_MODE="1", HF_HUB_OFFLINE="1")
        process = subprocess.Popen(command, stdout=out, stderr=out, env=surroundings, start_new_session=True)
    try:
        yield ServerProcess(f"http://127.0.0.1:{port}", process, log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # it heeds no signal while it loads; its engine is another process
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
