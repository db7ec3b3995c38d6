"""The pages of ``vt-trl view``: the list of a run, one group, and a page that stands alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from vt_trl.errors import DataError
from vt_trl.images import data_uri
from vt_trl.plots import plot_history
from vt_trl.transcripts.browse import ASKED, JUDGED, SORTS, Filter, Place, Run
from vt_trl.transcripts.record import Transcript
from vt_trl.transcripts.show import environment, inline, picture_kind

PER_PAGE = 50
MEMBERS = 64  # of one group on a page, at most
CURVES = (
    ("Reward", "reward"),
    ("Requests to look again", "request_rate"),
    ("Accuracy", "accuracy"),
    ("Entropy", "entropy"),
)


class Pages:
    """HTML pages of a run. Pictures are addresses of this server, or inside the page when it is exported."""

    def __init__(self, run: Run):
        self.run = run
        self._template = environment().get_template("view.html.j2")
        self._plots: tuple[int, list[dict[str, str]]] = -1, []

    def list_page(self, words: dict[str, str]) -> str:
        """Rollouts that match, 50 on a page; ``words``: fields of :class:`Filter` and ``from``."""
        self.run.refresh()
        wanted = Filter.of(words)
        start = int(words["from"]) if words.get("from", "").isdecimal() else 0
        found = self.run.find(wanted)
        places = found[start : start + PER_PAGE]
        transcripts = self.run.read(places, pictures=False)
        query = {name: value for name, value in asdict(wanted).items() if value}
        return self._template.render(
            page="list",
            title=self.run.title,
            said=self._said(),
            drawn=self._drawn(),
            wanted=wanted,
            choices=self._choices(),
            sorts=SORTS,
            rows=[
                {"transcript": one, "link": _link("/group", file=place.file, row=place.row)}
                for one, place in zip(transcripts, places, strict=True)
            ],
            span=f"{min(start + 1, len(found))}-{start + len(places)} of {len(found)}",
            before=_link("/", **query, **{"from": max(0, start - PER_PAGE)}) if start else "",
            after=_link("/", **query, **{"from": start + PER_PAGE}) if start + PER_PAGE < len(found) else "",
        )

    def group_page(self, words: dict[str, str]) -> str:
        """All members of the group that the rollout in ``file`` and ``row`` belongs to, side by side."""
        self.run.refresh()
        chosen = _place(words)
        [one] = self.run.read([chosen], pictures=False)
        places = self.run.find(Filter(file=chosen.file, group=one.group, sort="oldest")) if one.group else [chosen]
        members = self.run.read(places[:MEMBERS])
        addresses = {
            (id(member), index): _link("/picture", file=place.file, row=place.row, index=index)
            for member, place in zip(members, places, strict=False)
            for index in range(len(member.images))
        }
        step = "" if one.step is None else f"Step {one.step}, "
        cut = f" The first {MEMBERS} are shown." if len(places) > MEMBERS else ""
        return self._template.render(
            page="group",
            home=True,
            title=self.run.title,
            said=f"{step}row {one.id}: {len(places)} rollouts of one question.{cut}",
            groups=[{"title": one.question, "members": [_entry(member, {}) for member in members]}],
            source=lambda transcript, index: addresses.get((id(transcript), index), ""),
        )

    def picture(self, words: dict[str, str]) -> tuple[str, bytes]:
        """The kind (png, jpeg) and the bytes of a picture; raises DataError where there is none to show."""
        [one] = self.run.read([_place(words)])
        index = int(words["index"]) if words.get("index", "").isdecimal() else -1
        data = one.images[index] if 0 <= index < len(one.images) else b""
        if not picture_kind(data):
            raise DataError("there is no PNG or JPEG picture there.")
        return picture_kind(data), data

    def export(self, wanted: Filter, limit: int) -> str:
        """One page with the first ``limit`` rollouts that match, pictures included; its filters need no script."""
        found = self.run.find(wanted)
        transcripts = self.run.read(found[:limit])
        choices = [choice for choice in (*self._choices(), ("step", "Step", self.run.choices("step"))) if choice[2]]
        marks = {name: {value: number for number, value in enumerate(values)} for name, _, values in choices}
        groups = [
            {"title": _title(members[0]), "members": [_entry(m, marks) for m in members]}
            for members in _by_group(transcripts)
        ]
        rules = [{"name": name, "value": value} for name in marks for value in marks[name].values()]
        return self._template.render(
            page="export",
            title=self.run.title,
            said=f"{self._said()} {len(transcripts)} of {len(found)} that match are on this page.",
            drawn=self._drawn(),
            choices=choices,
            rules=rules,
            groups=groups,
            source=inline,
        )

    def _choices(self) -> list[tuple[str, str, Sequence[str]]]:
        run = self.run
        return [
            ("mode", "Phase", run.choices("mode")),
            ("status", "Status", run.choices("status")),
            ("asked", "Asked", list(ASKED)),
            ("judged", "Verdict", list(JUDGED)),
            ("source", "Source", run.choices("source")),
        ]

    def _said(self) -> str:
        steps = self.run.choices("step")
        span = f", steps {min(steps, key=int)} to {max(steps, key=int)}" if steps else ""
        return f"{self.run.table().num_rows} rollouts in {len(self.run.files)} files{span}."

    def _drawn(self) -> list[dict[str, str]]:
        """The plots of the run's metrics, drawn again only when more has been logged."""
        history = self.run.history()
        if self._plots[0] != len(history):
            drawn = ((title, plot_history(history, title, key)) for title, key in CURVES)
            shown = [
                {"title": title, "src": data_uri("svg+xml", plot.svg), "summary": plot.summary}
                for title, plot in drawn
                if plot is not None
            ]
            self._plots = len(history), shown
        return self._plots[1]


def write_page(run: Run, path: str | Path, wanted: Filter, limit: int) -> Path:
    """Write the page that stands alone; raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Pages(run).export(wanted, limit), encoding="utf-8")
    return path


def _by_group(transcripts: Sequence[Transcript]) -> list[list[Transcript]]:
    return [list(members) for _, members in groupby(transcripts, lambda one: (one.step, one.mode, one.group))]


def _title(one: Transcript) -> str:
    return one.question if one.step is None else f"Step {one.step}: {one.question}"


def _entry(transcript: Transcript, marks: dict[str, dict[str, int]]) -> dict[str, Any]:
    """A member and its place in each filter's list of values."""
    values = {
        "mode": transcript.mode,
        "status": transcript.status,
        "asked": "asked" if transcript.asked else "not asked",
        "judged": transcript.judged,
        "source": transcript.source,
        "step": str(transcript.step),
    }
    found = {name: marks[name][values[name]] for name in marks if values[name] in marks[name]}
    return {"transcript": transcript, "marks": found, "label": f"member {transcript.member}"}


def _place(words: dict[str, str]) -> Place:
    row = words.get("row", "")
    if not (row.isdecimal() and len(row) < 19):
        raise DataError(f"row is {row!r}; it is a whole number.")
    return Place(words.get("file", ""), int(row))


def _link(path: str, **words: Any) -> str:
    return f"{path}?{urlencode(words)}" if words else path
