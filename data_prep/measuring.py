"""What difficulty is made of: pass rates from figures that are there or by sampling, and ratings."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich.progress import track

from data_prep.bands import Measured
from data_prep.filtering import rate_column, rate_of
from data_prep.rating import rate
from data_prep.shards import WORK
from data_prep.speaking import Role, Said, count_tokens
from data_prep.tracing import check_outage
from data_prep.work import Work, digest
from vt_trl.commands.options import json_option
from vt_trl.data import episode_row
from vt_trl.errors import ConfigError, DataError
from vt_trl.judges.base import Verdict

if TYPE_CHECKING:
    from datasets import Dataset

Rate = tuple[float | None, str]  # a pass rate, or why there is none


class PassRates(Protocol):
    """Where pass rates come from; ``fingerprint`` (JSON): what they depend on."""

    fingerprint: Any

    def of(self, numbers: Sequence[int]) -> list[Rate]:
        """Of rows, by their numbers."""

    def close(self) -> None:
        """Give back connections and memory."""


def pass_rates(options: argparse.Namespace, dataset: Dataset) -> PassRates | None:
    """What the options say; None where difficulty is a rating alone."""
    if options.pass_rate:
        return FromColumn(options.pass_rate, dataset)
    if options.evaluation:
        return FromEvaluation(options, dataset)
    return Sampled(options, dataset) if options.model else None


class FromColumn:
    """A share of right answers, or a count of N, in a column of the rows, such as `prepare select` writes."""

    def __init__(self, text: str, dataset: Dataset):
        name, of = rate_column(text)
        if name not in dataset.column_names:
            raise ConfigError(f"--pass-rate: there is no column {name!r}, only {sorted(dataset.column_names)}.")
        self.name, self.divisor, self.values = name, of, list(dataset[name])
        self.fingerprint = {"column": text, "values": digest([str(one) for one in self.values])}

    def of(self, numbers: Sequence[int]) -> list[Rate]:
        found = [(rate_of(self.values[number], self.divisor), self.values[number]) for number in numbers]
        return [(one, "" if one is not None else f"no pass rate: {self.name} is {value!r}") for one, value in found]

    def close(self) -> None:
        """Nothing to give back."""


class FromEvaluation:
    """Right or wrong of one cell of `vt-trl evaluate` on these rows, by their ids: a pass rate of one answer."""

    def __init__(self, options: argparse.Namespace, dataset: Dataset):
        from vt_trl.evaluation.shards import read_results

        cells = {
            f"{one.model},{one.data},{one.policy}": found for one, found in read_results(options.evaluation).items()
        }
        name = options.cell or next(iter(cells))
        if name not in cells or (options.cell is None and len(cells) > 1):
            raise ConfigError(
                f"--evaluation {options.evaluation} holds {len(cells)} cells; name one: --cell with one of "
                f"{'; '.join(sorted(cells))}."
            )
        self.ids, self.correct = list(dataset["id"]), {one.id: one.correct for one in cells[name]}
        known = sum(id in self.correct for id in self.ids)
        if not known:
            raise DataError(f"--evaluation {options.evaluation} has no result of these rows; their ids differ")
        self.fingerprint = {"cell": name, "correct": digest(self.correct)}

    def of(self, numbers: Sequence[int]) -> list[Rate]:
        found = [self.correct.get(self.ids[number]) for number in numbers]
        return [(None, "no pass rate: not evaluated") if one is None else (float(one), "") for one in found]

    def close(self) -> None:
        """Nothing to give back."""


class Sampled:
    """Answers of the current model, several to each row, each judged; work is kept shard by shard."""

    def __init__(self, options: argparse.Namespace, dataset: Dataset):
        from data_prep.traces import make_writer, sight_of
        from vt_trl.envs import make_environment
        from vt_trl.judges import make_judge, make_judge_reward
        from vt_trl.judges.cache import default_folder

        args = json_option(options.environment_args, "--environment-args")
        self.options, self.dataset = options, dataset
        self.environment = make_environment(options.environment, args, sight_of(options))
        judge = make_judge(options.judge, json_option(options.judge_args, "--judge-args"))
        most = 1.0 if options.judge == "rule" else options.max_failed
        self.reward = make_judge_reward(judge, cache_dir=default_folder(), max_failed=most)
        self.reward.open()
        self.writer = make_writer(options, self.environment, steered=False)
        self.fingerprint = {
            **self.writer.fingerprint(),
            "samples": options.samples,
            "seed": options.seed,
            "environment": options.environment,
            "environment_args": args,
            "judge": judge.fingerprint(),
        }
        self._work: Work | None = None
        self._open = True

    def of(self, numbers: Sequence[int]) -> list[Rate]:
        if self._work is None:
            known = {"rows": len(self.dataset), "unit_rows": self.options.unit_rows, **self.fingerprint}
            self._work = Work(self.options.out / WORK / "answers", known)
        piece = numbers[0] // self.options.unit_rows
        if not self._work.is_done(piece):
            self._work.write(piece, [{"rate": rate, "why": why} for rate, why in self._sample(numbers)])
        return [(one["rate"], one["why"]) for one in self._work.read(piece)]

    def _sample(self, numbers: Sequence[int]) -> list[Rate]:
        found: dict[int, Rate] = {}
        rows: dict[int, dict[str, Any]] = {}
        for number in numbers:
            try:
                rows[number] = episode_row(self.dataset[number])
                self.environment().reset(rows[number])
            except DataError as error:
                found[number] = None, f"bad row: {error.reason}"
                rows.pop(number, None)
        groups = self.writer.write(list(rows.values()), 0, self.options.samples)
        tries = [one for group in groups for one in group]
        check_outage([one for one in tries if isinstance(one, str)], len(tries), self.options.max_failed, "model")
        judged = iter(self.reward.judged([one for one in tries if not isinstance(one, str)]))
        for number, group in zip(rows, groups, strict=True):
            verdicts = Counter(next(judged).verdict for one in group if not isinstance(one, str))
            sure = verdicts[Verdict.RIGHT] + verdicts[Verdict.WRONG]
            why = "no pass rate: no answer could be judged"
            found[number] = (verdicts[Verdict.RIGHT] / sure, "") if sure else (None, why)
        return [found[number] for number in numbers]

    def close(self) -> None:
        if self._open:
            self._open = False
            self.reward.close()
            self.writer.close()


def measure(
    options: argparse.Namespace, dataset: Dataset, rates: PassRates | None, rater: Role | None
) -> tuple[list[Measured], Counter[str]]:
    """What is known of each row, in order, and what the models have cost."""
    counts: Counter[str] = Counter()
    size = options.unit_rows
    shards = [range(at, min(at + size, len(dataset))) for at in range(0, len(dataset), size)]
    known: list[list[Rate]] = []
    if rates:
        known.append([one for part in track(shards, "rows answered") for one in rates.of(part)])
        rates.close()  # two local models are never in memory together
    if rater:
        rated = (_rated(options, dataset, rater, part, counts) for part in track(shards, "rows rated"))
        known.append([one for part in rated for one in part])
    measured = []
    for number in range(len(dataset)):
        values = [part[number] for part in known]
        share, rating = values[0][0] if rates else None, values[-1][0] if rater else None
        measured.append(Measured(share, rating, next((why for _, why in values if why), "")))
    return measured, counts


def _rated(
    options: argparse.Namespace, dataset: Dataset, rater: Role, numbers: Sequence[int], counts: Counter[str]
) -> list[Rate]:
    texts = [{name: dataset[number][name] for name in ("question", "answer")} for number in numbers]
    found = rate(rater, texts)
    failed = [said for _, said in found if isinstance(said, str)]
    check_outage(failed, len(found), options.max_failed, "rater")
    rates: list[Rate] = []
    for rating, said in found:
        if isinstance(said, Said):
            count_tokens(counts, rater.name, said)
        why = "no rating: the rater failed" if isinstance(said, str) else "no rating: it cannot be read"
        rates.append((rating, "" if rating is not None else why))
    return rates
