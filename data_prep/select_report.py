"""What came of a selection: the chosen rows, ``report.json``, and ``report.html`` with plots and examples."""

from __future__ import annotations

import datetime
import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from datasets import Features, Image, List, Value
from PIL.Image import Image as PILImage

from data_prep.counting import RowCount
from data_prep.kinds import Choice, Kind, choose, shares_by_source
from data_prep.select import settings_of
from data_prep.shards import UnitWriter
from data_prep.units import run_units
from data_prep.ways import LOOKS, RESOLUTIONS, WAY
from data_prep.work import digest, picture_bytes
from vt_trl.data import episode_row
from vt_trl.images import data_uri, png_uri
from vt_trl.rows import FEATURES
from vt_trl.sources import EMBEDDED, MANIFEST, read_manifest
from vt_trl.transcripts.looks import Part
from vt_trl.whole import write_whole

if TYPE_CHECKING:
    from data_prep.select import Job

logger = logging.getLogger(__name__)


def finish(job: Job) -> dict[str, Any]:
    """Choose rows, write them with both reports, say what there is, and return the report."""
    counts = job.counts()
    kinds = [count.kind(job.rule) for count in counts]
    options = job.options
    pairs = [(count.number, kind) for count, kind in zip(counts, kinds, strict=True)]
    choice = choose(pairs, options.size, options.share_full, options.seed)
    report = make_report(job, counts, kinds, choice)
    if choice.size:
        write_chosen(job, counts, choice)
    else:
        logger.warning("No row was chosen: %s", report["rows_by_kind"])
    if report["looked"] is not None and report["looked"] < _FEW:
        logger.warning(
            "Only %.0f%% of the answers after looking did look, so the counts say little of what a look brings. Let a "
            "model select that looks when it is asked to, such as one after a cold start (vt-trl sft).",
            100 * report["looked"],
        )
    write_whole(options.out / "report.json", json.dumps(report, indent=2) + "\n")
    write_page(job, report, counts, kinds)
    _say(report)
    return report


def make_report(job: Job, counts: Sequence[RowCount], kinds: Sequence[Kind], choice: Choice) -> dict[str, Any]:
    """Numbers of a selection. ``histogram[less][more]``: rows with so many right answers, judged rows only."""
    ways, (less, more) = job.ways, job.ways.names
    side = job.rule.rollouts + 1
    histogram = [[0] * side for _ in range(side)]
    judged = [count for count, kind in zip(counts, kinds, strict=True) if kind in _JUDGED]
    for count in judged:
        histogram[count.right(less)][count.right(more)] += 1
    statuses = {way: Counter[str]() for way in ways.names}
    for count in counts:
        for way, found in count.statuses.items():
            statuses[way].update(found)
    chosen = {**dict.fromkeys(choice.needs_full, True), **dict.fromkeys(choice.low_is_enough, False)}
    sources = shares_by_source([(count.source, kind) for count, kind in zip(counts, kinds, strict=True)])
    for source in sources:
        found = sources[source] = {ways.kind_name(Kind(name)): rows for name, rows in sources[source].items()}
        found["chosen"] = sum(count.number in chosen for count in counts if count.source == source)
    return {
        "rows": len(counts),
        "rows_by_kind": {ways.kind_name(Kind(name)): rows for name, rows in choice.available.items()},
        "chosen": choice.size,
        f"chosen_{ways.needed}": len(choice.needs_full),
        f"chosen_{ways.enough}": len(choice.low_is_enough),
        "short_of_size": max(0, (choice.wanted or 0) - choice.size),
        "histogram": histogram,
        "sources": sources,
        "statuses": {way: dict(sorted(found.items())) for way, found in statuses.items()},
        "accuracy": {way: _mean([count.right(way) / job.rule.rollouts for count in judged]) for way in ways.names},
        "visual_tokens": {way: _mean([count.tokens[way] for count in judged]) for way in ways.names},
        "looked": _mean([count.looked[more] / job.rule.rollouts for count in judged]) if ways is LOOKS else None,
        "bad_rows": [{"row": c.number, "id": c.id, "reason": c.error} for c in counts if c.error][:_LISTED],
        "judge_failures": Counter(reason for count in counts for reason in count.failures).most_common(_LISTED),
        "settings": settings_of(job),
        "date": datetime.date.today().isoformat(),
    }


_UNIT = 1000  # rows written at a time
_JUDGED = (Kind.LOW_IS_ENOUGH, Kind.NEEDS_FULL, Kind.NEITHER)
_FEW = 0.5  # share of looks below which a selection by looking is warned of
_LISTED = 50  # bad rows and reasons named in the report; all of them are counted


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def write_chosen(job: Job, counts: Sequence[RowCount], choice: Choice) -> None:
    """The chosen rows in the order of the data set, with ``needs_full`` and the counts, pictures embedded.

    ``needs_full`` says that a row needs more than the first sight, whatever the two ways were: traces read it. An
    earlier choice from the same counts is replaced: it can be had again by its settings.
    """
    out, full = job.options.out / "rows", set(choice.needs_full)
    numbers = sorted([*choice.needs_full, *choice.low_is_enough])
    made_of = {"step": "select", "chosen": digest(numbers, sorted(full)), **job.work.settings}
    if (out / MANIFEST).is_file() and read_manifest(out)["made_of"].get("chosen") != made_of["chosen"]:
        shutil.rmtree(out)
    rows, names = job.dataset.cast_column("image", EMBEDDED), job.ways.names
    features = Features({**FEATURES, **rows.features, **FEATURES, **{f"right_{way}": Value("int32") for way in names}})
    features.pop("image_error", None)
    if "images" in features:  # of rows with several pictures, embedded or paths
        features["images"] = List(Image())

    def work(unit: Sequence[int], writer: UnitWriter) -> None:
        for number in unit:
            row = {name: value for name, value in rows[number].items() if name in features}
            right = {f"right_{way}": counts[number].right(way) for way in names}
            if row.get("images"):
                row["images"] = [{"bytes": picture_bytes(one), "path": None} for one in row["images"]]
            writer.add({**row, "image": picture_bytes(row["image"]), "needs_full": number in full, **right})

    units = [numbers[start : start + _UNIT] for start in range(0, len(numbers), _UNIT)]
    run_units(out, units, work, made_of=made_of, features=features, title="rows written")


def write_page(job: Job, report: dict[str, Any], counts: Sequence[RowCount], kinds: Sequence[Kind]) -> None:
    """``report.html``: the histogram, the shares of each source, and examples of each kind with what was shown."""
    from vt_trl.plots import plot_counts, plot_shares
    from vt_trl.transcripts.show import environment

    ways = job.ways
    names = [ways.kind_name(kind) for kind in Kind]
    plots = [
        plot_counts(report["histogram"], (ways.less_words, ways.more_words), job.rule.margin),
        plot_shares({s or "(none)": {n: found[n] for n in names} for s, found in report["sources"].items()}, "Rows"),
    ]
    examples = []
    for kind in Kind:
        chosen = [count for count, own in zip(counts, kinds, strict=True) if own is kind][: job.options.examples]
        examples.append(
            {
                "name": ways.kind_name(kind).replace("_", " "),
                "sentence": ways.sentence(kind),
                "rows": report["rows_by_kind"][ways.kind_name(kind)],
                "examples": [_example(job, count) for count in chosen],
            }
        )
    template = environment().get_template("selection.html.j2")
    text = template.render(
        report=report,
        ways=ways,
        kinds=names,
        plots=[{"src": data_uri("svg+xml", plot.svg), "summary": plot.summary} for plot in plots],
        examples=examples,
    )
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")  # JSON can smuggle in lone surrogates
    write_whole(job.options.out / "report.html", text)


def _example(job: Job, count: RowCount) -> dict[str, Any]:
    """What the template prints of one row: texts as they are (it escapes them), pictures as URIs."""
    stored = job.dataset[count.number]
    shown = {"id": count.id, "number": count.number, "source": count.source, "error": count.error, "views": []}
    shown |= {"question": stored.get("question"), "gold": stored.get("answer"), "failures": count.failures}
    if count.error:
        return shown
    environment = job.make_both()
    row = episode_row(stored, environment.max_pictures)
    for way in job.ways.names:
        images = []
        if job.ways is RESOLUTIONS or way == job.ways.less:  # looking starts with the same pictures
            opening = environment.reset({**row, WAY: way})
            images = [image for message in opening.messages for image in message.images]
        shown["views"].append(
            {
                "name": way,
                "words": job.ways.words(way),
                "right": count.right(way),
                "tokens": count.tokens[way],
                "looked": count.looked[way],
                "answers": list(zip(count.answers[way], count.verdicts[way], strict=True)),
                "pictures": [_picture(image, count, number) for number, image in enumerate(images)],
            }
        )
    return shown


def _picture(image: PILImage, count: RowCount, number: int) -> dict[str, Any]:
    """A picture of an opening with the parts that rollouts looked at, under the numbers of the rollouts, from 1."""
    parts = [Part(int(member) + 1, *edges) for picture, member, *edges in count.parts if picture == number]
    return {"src": png_uri(image), "width": image.width, "height": image.height, "parts": parts}


def _say(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['rows']} rows, {report['chosen']} chosen")
    table.add_column("kind")
    table.add_column("rows", justify="right")
    for kind, rows in report["rows_by_kind"].items():
        table.add_row(kind, str(rows))
    console = Console(stderr=True)
    console.print(table)
    if report["short_of_size"]:
        console.print(
            f"{report['short_of_size']} rows short of --size: one kind is too rare for this share. Give more rows, "
            "lower --size, or move --share-full."
        )
