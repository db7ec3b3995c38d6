"""``vt-trl prepare import SOURCE FORMAT --out DIR``: a published set, or files of your own, in the columns of rows."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from data_prep import main
from vt_trl.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    from data_prep.formats import FORMATS

    lines = "\n".join(f"  {name:<15} {format.help}" for name, format in FORMATS.items())
    parser = argparse.ArgumentParser(
        "vt-trl prepare import",
        description=f"Write a data set in the columns of rows (docs/data.md).\n\nformats:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="a file or folder, or OWNER/NAME on the Hub, which is downloaded")
    parser.add_argument("format", choices=FORMATS, metavar="FORMAT", help="one of the formats above")
    parser.add_argument("--out", required=True, help="folder for the rows; run again, an interrupted import goes on")
    parser.add_argument(
        "--images", help="folder that paths start from (default: the table's), or Parquet of id, image"
    )
    parser.add_argument("--map", default="", help="our column=the source's, for other names: question=query,id=key")
    parser.add_argument("--data-source", help="name of rows that have none (default: the format's or the folder's)")
    parser.add_argument("--split", help="of a source with several (default: train, or the only one)")
    parser.add_argument("--files", help="pattern inside the source, e.g. 'train/*.json'")
    parser.add_argument("--revision", help="commit, tag or branch of a data set on the Hub")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 0: none but this one")
    return parser


def run(options: argparse.Namespace) -> None:
    from data_prep.finding import find
    from data_prep.formats import FORMATS
    from data_prep.importing import QUARANTINE, import_rows
    from data_prep.units import totals

    renamed = dict(pair.split("=", 1) if "=" in pair else (pair, "") for pair in options.map.split(",") if pair)
    if not all(renamed.values()):
        raise ConfigError(f"--map {options.map!r} is no list of OURS=THEIRS; write e.g. --map question=query,id=key.")
    found = find(options.source, options.split, options.files, options.revision)
    manifest = import_rows(
        found,
        FORMATS[options.format],
        Path(options.out),
        images=options.images,
        renamed=renamed,
        name=options.data_source,
        workers=options.workers,
    )
    counts = totals(manifest)
    print(f"{counts['good']} good + {counts['quarantined']} quarantined = {counts['all']} rows; {options.out}")
    for name, count in counts.most_common():
        if name.startswith("reason: "):
            print(f"  {count} x {name.removeprefix('reason: ')}")
    if counts["quarantined"]:
        print(f"  each of them: {Path(options.out) / QUARANTINE}")


if __name__ == "__main__":
    main(parser(), run)
