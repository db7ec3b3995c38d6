"""A server in a thread of this process, for notebooks, tests and benchmarks."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from vt_trl.serving.app import Service, make_app

_PATIENCE = 30.0  # seconds for the start


@contextmanager
def in_background(service: Service) -> Iterator[tuple[str, uvicorn.Server]]:
    """Serve on a free port of 127.0.0.1; yields the URL with ``/v1``, and the server. Ends in order at the end."""
    config = uvicorn.Config(make_app(service), log_level="warning", timeout_graceful_shutdown=30)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            began = time.monotonic()
            while not server.started:
                if not thread.is_alive() or time.monotonic() - began > _PATIENCE:
                    raise RuntimeError("the server did not start; its log says why")
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", server
        finally:
            server.should_exit = True
            thread.join()
