"""``vt-trl view`` in the browser: a server for this machine alone, from the standard library."""

from __future__ import annotations

import logging
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from urllib.parse import parse_qsl, urlsplit

from vt_trl.errors import ConfigError, DataError
from vt_trl.transcripts.pages import Pages

logger = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
_POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


def make_server(pages: Pages, port: int) -> ThreadingHTTPServer:
    """A server bound to 127.0.0.1; port 0 takes a free one. Raises ConfigError when the port is taken."""
    try:
        server = ThreadingHTTPServer((ADDRESS, port), _handler(pages))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"port is {port}, which cannot be opened: {error}. Set another --port, or 0.") from error
    return server


def _handler(pages: Pages) -> type[BaseHTTPRequestHandler]:
    lock = Lock()  # one page at a time: the run's index is shared

    class Handler(BaseHTTPRequestHandler):
        server_version = "vt-trl"

        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in (ADDRESS, "localhost"):  # a page elsewhere that made its name point here
                return self._send(403, "text/plain", b"This server answers to 127.0.0.1 only.")
            try:
                kind, data = self._answer()
            except DataError as error:
                return self._send(404, "text/plain", str(error).encode("utf-8", "replace"))
            self._send(200, kind, data)

        def _answer(self) -> tuple[str, bytes]:
            parts = urlsplit(self.path)
            words = dict(parse_qsl(parts.query, max_num_fields=20))
            found: dict[str, Callable[[dict[str, str]], str]] = {"/": pages.list_page, "/group": pages.group_page}
            with lock:
                if parts.path == "/picture":
                    kind, data = pages.picture(words)
                    return f"image/{kind}", data
                if parts.path not in found:
                    raise DataError(f"there is no page {parts.path!r}.")
                return "text/html; charset=utf-8", found[parts.path](words).encode("utf-8", "replace")

        def _send(self, status: int, kind: str, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Security-Policy", _POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, form: str, *values: object) -> None:
            logger.debug(form, *values)

    return Handler
