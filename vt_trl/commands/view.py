"""``vt-trl view RUN [--export FILE.html]``"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vt_trl.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vt-trl view", description="Look at the rollouts of a run in a browser.")
    parser.add_argument("run", help="a run's folder, its completions folder, or one Parquet file")
    parser.add_argument("--port", type=int, default=8765, help="port on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--export", default=None, help="write one HTML file that opens anywhere, and start no server")
    parser.add_argument("--limit", type=int, default=100, help="rollouts in the exported file at most")
    parser.add_argument("--step", default="", help="export: of this step only")
    parser.add_argument("--status", default="", help="export: of this status only, e.g. truncated")
    parser.add_argument("--source", default="", help="export: of this data source only")
    parser.add_argument("--judged", default="", help="export: right, wrong or 'not judged' only")
    parser.add_argument("--asked", default="", help="export: asked or 'not asked' only")
    parser.add_argument("--sort", default="newest", help="export: newest, oldest, reward- or advantage-high, -low")
    return parser


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from vt_trl.transcripts.browse import Filter, Run
    from vt_trl.transcripts.pages import Pages, write_page
    from vt_trl.transcripts.server import make_server

    found = Run(options.run)
    if options.export:
        if options.limit < 1:
            raise ConfigError(f"--limit is {options.limit}; it must be 1 or more.")
        wanted = Filter.of({name: str(value) for name, value in vars(options).items()})
        print(f"Written: {write_page(found, options.export, wanted, options.limit)}")
        return
    with make_server(Pages(found), options.port) as server:
        print(f"{found.title}: http://127.0.0.1:{server.server_port}/  (Ctrl+C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
