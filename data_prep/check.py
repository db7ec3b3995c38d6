"""``vt-trl prepare check DIR``: every bad row with every reason, set aside in a file, none lost."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from data_prep import main


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "vt-trl prepare check",
        description="Name every row that cannot be used, and why. Without --out and --quarantine nothing is written, "
        "and the exit status is 1 when there are any.",
    )
    parser.add_argument("source", metavar="DIR", help="rows: a prepared or saved set, Parquet, or tables and pictures")
    parser.add_argument("--against", nargs="+", default=[], metavar="SET", help="sets whose pictures may not occur")
    parser.add_argument("--distance", type=int, default=4, help="of 64 bits that pictures which look alike differ in")
    parser.add_argument(
        "--quarantine", metavar="FILE", help="JSON lines: number, id, reasons, and all of each bad row"
    )
    parser.add_argument("--out", metavar="DIR", help="write the good rows there (and quarantine.jsonl next to them)")
    parser.add_argument("--split", help="of a source with several")
    parser.add_argument("--files", help="pattern inside the source")
    parser.add_argument("--json", metavar="FILE", help="write the counts to this file")
    parser.add_argument("--show", type=int, default=50, help="bad rows to print when they are in a file, too")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 0: none but this one")
    return parser


def run(options: argparse.Namespace) -> int:
    """Exit status 1 when there are bad rows and nobody said where to put them."""
    from data_prep.checking import check_set
    from data_prep.finding import find
    from data_prep.importing import QUARANTINE
    from vt_trl.errors import ConfigError

    found = find(options.source, options.split, options.files)
    target = Path(options.quarantine) if options.quarantine else None
    if target is not None and target.exists():
        raise ConfigError(f"--quarantine {str(target)!r} exists already; name a new file, or remove it first.")
    checks = {"against": options.against, "distance": options.distance, "workers": options.workers}
    if options.out:
        manifest = check_set(found, Path(options.out), **checks)
        aside = Path(options.out) / QUARANTINE
        report = _report(manifest, aside, options.show)
        if target is not None:
            shutil.copyfile(aside, target)
    else:
        with tempfile.TemporaryDirectory(dir=target.parent if target else None) as folder:
            aside = Path(folder) / "rows" / QUARANTINE
            manifest = check_set(found, aside.parent, keep_good=False, **checks)
            report = _report(manifest, aside, options.show if target else None)
            if target is not None:
                shutil.move(aside, target)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(bool(report["quarantined"]) and not (options.out or options.quarantine))


def _report(manifest: dict[str, Any], aside: Path, show: int | None) -> dict[str, Any]:
    """Print the bad rows (the first ``show``) and the counts; returns the counts."""
    from data_prep.units import totals
    from vt_trl.errors import where

    counts = totals(manifest)
    with aside.open(encoding="utf-8") as stream:
        for place, line in enumerate(stream):
            if place == show:
                print(f"... and {counts['quarantined'] - place} more")
                break
            bad = json.loads(line)
            print(where(bad["row"], bad["id"] or None) + "; ".join(bad["reasons"]))
    reasons = {name.removeprefix("reason: "): count for name, count in counts.items() if name.startswith("reason: ")}
    for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1]):
        print(f"{count} x {reason}")
    print(f"{counts['good']} good + {counts['quarantined']} quarantined = {counts['all']} rows")
    return {name: counts[name] for name in ("all", "good", "quarantined")} | {"reasons": reasons}


if __name__ == "__main__":
    main(parser(), run)
