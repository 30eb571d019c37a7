"""Results of all cells that are there, as rows, and the verdicts on claims."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from benchmarks.findings.claims import ABOVE, BELOW, CLAIMS, SAME, Claim
from benchmarks.findings.matrix import CELLS, QUESTIONS, Arm, Question
from benchmarks.findings.paired import (
    Difference,
    Spread,
    difference,
    margin,
    verdict_of_order,
    verdict_of_sameness,
)
from benchmarks.findings.steps import EXPERTS, PRUNED, REFERENCE, Step, Steps
from benchmarks.findings.store import Store

ONE_SHOT = "one_shot_"


@dataclass(frozen=True)
class Row:
    """One figure of one cell with one seed, as a line of a CSV."""

    arm: str
    cell: str
    seed: int
    tokens: int
    metric: str
    value: float


@dataclass(frozen=True)
class Judged:
    """A claim, and what is found here.

    Attributes:
        claim: which.
        found: the first arm less the second.
        verdict: by the rule in `paired`.
    """

    claim: Claim
    found: Difference | None
    verdict: str


class Results:
    """What the store has for some settings.

    Attributes:
        seeds: that were asked for.
        missing: arms by question that have not all of their seeds, and how many they have.
    """

    def __init__(self, steps: Steps, store: Store, seeds: int) -> None:
        """Read all of it."""
        self.steps, self._store, self.seeds = steps, store, seeds
        self.rows = {key: list(self._rows(question)) for key, question in QUESTIONS.items()}
        self.missing: dict[str, dict[str, int]] = {}
        for key, question in QUESTIONS.items():
            counts = {
                arm.label: len({row.seed for row in self.rows[key] if row.arm == arm.label}) for arm in question.arms
            }
            self.missing[key] = {label: count for label, count in counts.items() if count < seeds}

    def _rows(self, question: Question) -> Iterator[Row]:
        for arm in question.arms:
            for seed in range(1, self.seeds + 1):
                step = self.steps.cell(CELLS[arm.cell], seed)
                if (result := self._store.result(step)) is None:
                    continue
                figures = {**_part(result["metrics"], arm), **self._one_shot(step)}
                for metric, value in figures.items():
                    yield Row(arm.label, arm.cell, seed, self.steps.settings.tokens, metric, value)

    def _one_shot(self, step: Step) -> dict[str, float]:
        """Of what a cell began with."""
        pruned = step.needs.get(PRUNED)
        result = None if pruned is None or step.cell.pruning == "random" else self._store.result(pruned)
        metrics = {} if result is None else result["metrics"]
        return {f"{ONE_SHOT}{key}": value for key, value in metrics.items() if "/" not in key}

    def values(self, question: str, label: str, metric: str) -> dict[int, float]:
        """By seed."""
        rows = (row for row in self.rows[question] if row.arm == label and row.metric == metric)
        return {row.seed: row.value for row in rows}

    def spread(self, question: str, label: str, metric: str) -> Spread | None:
        """Over seeds; None where nothing is there."""
        values = self.values(question, label, metric)
        return Spread.of(list(values.values())) if values else None

    def judged(self, question: str) -> list[Judged]:
        """The claims of a question."""
        return [self._judge(claim) for claim in CLAIMS if claim.question == question]

    def _judge(self, claim: Claim) -> Judged:
        one, other = (self.values(claim.question, label, claim.metric) for label in (claim.first, claim.second))
        found, least = difference(one, other), margin(claim.metric)
        if claim.relation == SAME:
            return Judged(claim, found, verdict_of_sameness(found, least))
        assert claim.relation in (ABOVE, BELOW)
        ordered = found if claim.relation == ABOVE else difference(other, one)
        return Judged(claim, found, verdict_of_order(ordered, least))

    def teachers(self, sizes: Iterable[str]) -> dict[str, dict[str, float]]:
        """Figures of each teacher, and of its experts, that are there."""
        found = {}
        for size in sizes:
            metrics: dict[str, float] = {}
            for kind in (REFERENCE, EXPERTS):
                result = self._store.result(self.steps.of_teacher(kind, size))
                metrics |= {} if result is None else result["metrics"]
            found[size] = metrics
        return found

    @property
    def cells(self) -> tuple[int, int]:
        """Cells with a seed that are done, and all of them."""
        every = [self.steps.cell(cell, seed) for cell in CELLS.values() for seed in range(1, self.seeds + 1)]
        return sum(self._store.result(step) is not None for step in every), len(every)


def _part(metrics: Mapping[str, float], arm: Arm) -> dict[str, float]:
    """Figures of a cell, or of a budget of it."""
    start = f"{arm.part}/" if arm.part else ""
    return {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}
