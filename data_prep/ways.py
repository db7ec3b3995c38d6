"""The two ways in which a selection has every row answered, one of which sees more; and the words for them.

With ``direct`` or ``resize`` the question is the resolution: low against full (VisionThink, arXiv 2507.13348, Section
3.5). With any other environment it is looking: one answer at once, from the pictures that the environment opens with,
against the answer at the end of the environment's own episode.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.kinds import Kind

WAY = "way_shown"  # the key of an episode's row that says which


@dataclass(frozen=True)
class Ways:
    """Names of the way that sees less and of the one that sees more, and how a report speaks of them.

    ``enough`` and ``needed``: the kinds of rows to choose from, as reports and files call them.
    """

    less: str
    more: str
    less_words: str
    more_words: str
    enough: str
    needed: str
    enough_words: str
    needed_words: str
    title: str

    @property
    def names(self) -> tuple[str, str]:
        return self.less, self.more

    def words(self, way: str) -> str:
        return self.less_words if way == self.less else self.more_words

    def kind_name(self, kind: Kind) -> str:
        return {Kind.LOW_IS_ENOUGH: self.enough, Kind.NEEDS_FULL: self.needed}.get(kind, kind.value)

    def sentence(self, kind: Kind) -> str:
        return {
            Kind.LOW_IS_ENOUGH: f"Every answer was right, {self.less_words} and {self.more_words}.",
            Kind.NEEDS_FULL: f"Clearly more answers were right {self.more_words}.",
            Kind.NEITHER: "The counts decide nothing; these rows are left out.",
            Kind.JUDGE_FAILED: "At least one answer has no verdict, so there are no counts; these rows are left out.",
            Kind.BAD_ROW: "The row cannot be used; it is left out.",
        }[kind]


RESOLUTIONS = Ways(
    *("low", "full", "at low resolution", "at full resolution"),
    *("low_is_enough", "needs_full", "low is enough", "need the full picture"),
    title="Selection by resolution",
)
LOOKS = Ways(
    *("at_once", "looking", "at once", "after looking"),
    *("at_once_is_enough", "needs_looking", "the first sight is enough", "need a closer look"),
    title="Selection by looking",
)


def ways_of(environment: str) -> Ways:
    """The ways of an environment by its name in a recipe."""
    return RESOLUTIONS if environment in ("direct", "resize") else LOOKS
