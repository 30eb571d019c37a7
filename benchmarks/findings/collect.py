"""Results of all cells that are there or were published, as rows, and the verdicts on claims."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from benchmarks.findings.claims import ABOVE, BELOW, CLAIMS, SAME, Claim
from benchmarks.findings.matrix import CELLS, QUESTIONS, Arm, Question
from benchmarks.findings.paired import (
    Difference,
    Pair,
    Spread,
    difference,
    margin,
    verdict_of_order,
    verdict_of_sameness,
)
from benchmarks.findings.sizes import SIZES
from benchmarks.findings.steps import EXPERTS, PRUNED, REFERENCE, Step, Steps
from benchmarks.findings.store import Store

ONE_SHOT = "one_shot_"
TEACHERS = "teachers"  # whose rows are in a file of their own


@dataclass(frozen=True)
class Row:
    """One figure of one cell with one seed, as a line of a CSV.

    Attributes:
        arm: label of the arm; of a teacher, its size.
        cell: name of the cell; of a teacher, the kind of step that gave the figure.
        seed: 0 of a teacher.
        teacher: hash of the teacher's weights and of the text that is measured on: what two cells share to be a pair.
        definition: digest of the step that gave it.
        metric: name of the figure.
        value: of it.
    """

    arm: str
    cell: str
    seed: int
    teacher: str
    definition: str
    metric: str
    value: float

    @property
    def key(self) -> tuple[str, str, int, str, str]:
        """What there is one figure of."""
        return self.arm, self.cell, self.seed, self.teacher, self.metric


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
    """What there is for some settings: in the store, and in rows of other runs.

    Attributes:
        rows: by question, and of the `TEACHERS`.
        seeds: that were asked for.
        missing: arms by question that have fewer seeds, and how many they have.
    """

    def __init__(self, steps: Steps, store: Store, seeds: int, published: Mapping[str, Iterable[Row]]) -> None:
        """Read all of it.

        Args:
            steps: of the settings.
            store: of results.
            seeds: that are looked for.
            published: rows of other runs; those of another definition are left out.

        Raises:
            SlimError: the store has cells of a teacher whose weights it has not.
        """
        self.steps, self._store, self.seeds = steps, store, seeds
        here = {key: self._rows(question) for key, question in QUESTIONS.items()} | {TEACHERS: self._teachers()}
        self.rows: dict[str, list[Row]] = {}
        for key, rows in here.items():
            known = {row.key: row for row in published.get(key, ()) if self._is_current(row)}
            merged = known | {row.key: row for row in rows}
            self.rows[key] = sorted(merged.values(), key=self._place)
        self.missing: dict[str, dict[str, int]] = {}
        for key, question in QUESTIONS.items():
            counts = {arm.label: len(self._pairs(key, arm.label)) for arm in question.arms}
            self.missing[key] = {label: count for label, count in counts.items() if count < seeds}

    def _is_current(self, row: Row) -> bool:
        """Whether a cell or a teacher is still defined as it was when a row was written."""
        if row.cell in CELLS:
            return self.steps.cell(CELLS[row.cell], row.seed).digest == row.definition
        known = row.cell in (REFERENCE, EXPERTS) and row.arm in SIZES
        return known and self.steps.of_teacher(row.cell, row.arm).digest == row.definition

    @staticmethod
    def _place(row: Row) -> tuple[int, str, str, int]:
        """Rows of a cell in the order of the matrix; figures of a row as they were written."""
        names = [*SIZES, *CELLS]
        return names.index(row.cell if row.cell in CELLS else row.arm), row.arm, row.teacher, row.seed

    def _pairs(self, question: str, label: str) -> set[Pair]:
        return {(row.teacher, row.seed) for row in self.rows[question] if row.arm == label}

    def _rows(self, question: Question) -> Iterator[Row]:
        for arm in question.arms:
            for seed in range(1, self.seeds + 1):
                step = self.steps.cell(CELLS[arm.cell], seed)
                if (result := self._store.result(step)) is None:
                    continue
                teacher = self._store.teacher_hash(self.steps, step.size)
                figures = {**_part(result["metrics"], arm), **self._one_shot(step)}
                for metric, value in figures.items():
                    yield Row(arm.label, arm.cell, seed, teacher, step.digest, metric, value)

    def _teachers(self) -> Iterator[Row]:
        for size in SIZES:
            for kind in (REFERENCE, EXPERTS):
                step = self.steps.of_teacher(kind, size)
                if (result := self._store.result(step)) is not None:
                    teacher = self._store.teacher_hash(self.steps, size)
                    for metric, value in result["metrics"].items():
                        yield Row(size, kind, 0, teacher, step.digest, metric, value)

    def _one_shot(self, step: Step) -> dict[str, float]:
        """Of what a cell began with."""
        pruned = step.needs.get(PRUNED)
        result = None if pruned is None or step.cell.pruning == "random" else self._store.result(pruned)
        metrics = {} if result is None else result["metrics"]
        return {f"{ONE_SHOT}{key}": value for key, value in metrics.items() if "/" not in key}

    def values(self, question: str, label: str, metric: str) -> dict[Pair, float]:
        """By teacher and seed."""
        rows = (row for row in self.rows[question] if row.arm == label and row.metric == metric)
        return {(row.teacher, row.seed): row.value for row in rows}

    def lines(self, question: str) -> list[tuple[str, str]]:
        """Label and teacher of every line of a table, as figures of two teachers have no mean; "" where nothing is.

        A teacher that one arm alone has is not comparable with anything: its line is left out where the arm has others.
        """
        found = {arm.label: self._teachers_of(question, arm.label) for arm in QUESTIONS[question].arms}
        arms = Counter(teacher for teachers in found.values() for teacher in teachers)
        return [
            (label, teacher)
            for label, teachers in found.items()
            for teacher in [each for each in teachers if arms[each] > 1] or teachers or [""]
        ]

    def _teachers_of(self, question: str, label: str) -> list[str]:
        return list(dict.fromkeys(row.teacher for row in self.rows[question] if row.arm == label))

    def has_several_teachers(self, question: str) -> bool:
        """Whether lines have to say whose they are."""
        return len({teacher for _, teacher in self.lines(question) if teacher}) > 1

    def of_seeds(self, question: str, label: str, metric: str, teacher: str) -> list[float]:
        """Values with one teacher."""
        found = self.values(question, label, metric)
        return [value for (whose, _), value in found.items() if whose == teacher]

    def spread(self, question: str, label: str, metric: str, teacher: str) -> Spread | None:
        """Over seeds with one teacher; None where nothing is there."""
        values = self.of_seeds(question, label, metric, teacher)
        return Spread.of(values) if values else None

    def judged(self, question: str) -> list[Judged]:
        """The claims of a question."""
        return [self._judge(claim) for claim in CLAIMS if claim.question == question]

    def answered(self, question: str) -> bool:
        """Whether any claim of a question has a pair of cells."""
        return any(each.found is not None for each in self.judged(question))

    def _judge(self, claim: Claim) -> Judged:
        one, other = (self.values(claim.question, label, claim.metric) for label in (claim.first, claim.second))
        found, least = difference(one, other), margin(claim.metric)
        if claim.relation == SAME:
            return Judged(claim, found, verdict_of_sameness(found, least))
        assert claim.relation in (ABOVE, BELOW)
        ordered = found if claim.relation == ABOVE else difference(other, one)
        return Judged(claim, found, verdict_of_order(ordered, least))

    def teachers(self) -> dict[tuple[str, str], dict[str, float]]:
        """Figures of each teacher, and of its experts, by size and hash."""
        found: dict[tuple[str, str], dict[str, float]] = {}
        for row in self.rows[TEACHERS]:
            found.setdefault((row.arm, row.teacher), {})[row.metric] = row.value
        return found

    @property
    def cells(self) -> tuple[int, int]:
        """Cells with a seed that are done, with any teacher, and all of them."""
        done = {(row.cell, row.seed) for key in QUESTIONS for row in self.rows[key]}
        return len(done), len(CELLS) * self.seeds


def _part(metrics: Mapping[str, float], arm: Arm) -> dict[str, float]:
    """Figures of a cell, or of a budget of it."""
    start = f"{arm.part}/" if arm.part else ""
    return {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}
