"""How long steps take, and when all are done: by operations at first, by the clock as steps finish (no torch)."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from benchmarks.findings.sizes import Settings
from benchmarks.findings.steps import ALONE, CACHE, CELL, EXPERTS, PRUNED, REFERENCE, STATISTICS, TEACHER, TEXT, Step
from megatron_slim.architecture.flops import TORCH, student_flops, teacher_flops
from megatron_slim.architecture.hf_config import shape_from_hf_config
from megatron_slim.architecture.shape import ModelShape

# One thread of the machine that docs/findings.md names: operations per second in training and in a streamed forward
# pass, seconds of an iteration besides, and seconds of a step of each kind besides.
TRAINING, FORWARD, ITERATION = 6.5e10, 7.5e10, 0.1
SCALING = 0.85  # of a step that takes all of the cores: what each core does, over one that works alone
FIXED: Mapping[str, float] = {
    TEXT: 60.0,
    TEACHER: 12.0,
    REFERENCE: 8.0,
    EXPERTS: 8.0,
    STATISTICS: 2.0,
    CACHE: 5.0,
    PRUNED: 4.0,
    CELL: 8.0,
}
DECODED = 700.0  # tokens per second of one model with drafts, texts continued together
# Seconds of an optimizer's step over Adam's.
OPTIMIZERS: Mapping[str, float] = {"adam": 0.0, "muon": 0.05, "aurora": 0.6}
ELASTIC = 0.85  # of the sum of separate steps; docs/benchmarks.md


def shape_of(config: Mapping[str, Any], target: Mapping[str, int] | None = None) -> ModelShape:
    """Sizes of a teacher, or of a student by the target of a recipe."""
    keys = {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_moe_experts": "num_experts",
        "moe_router_topk": "num_experts_per_tok",
    }
    changed = {keys[name]: size for name, size in (target or {}).items()}
    return shape_from_hf_config({**config, **changed}, mtp_num_layers=1)


def training_seconds(shape: ModelShape, settings: Settings, iterations: int, samples: int) -> float:
    """Of so many iterations of so many samples, on the machine of the table."""
    operations = student_flops(shape, settings.seq_length, TORCH).total * samples * settings.seq_length
    return iterations * (ITERATION + operations / TRAINING)


def forward_seconds(shape: ModelShape, settings: Settings, samples: int) -> float:
    """Of a streamed forward pass, on the machine of the table."""
    operations = teacher_flops(shape, settings.seq_length, TORCH, runs_mtp=True).total
    return operations * samples * settings.seq_length / FORWARD


def predicted(step: Step, settings: Settings) -> float:
    """Seconds of a step on the machine of the table, by operations.

    Args:
        step: which.
        settings: of all steps.
    """
    size = settings.size(step.size)
    config = size.config(settings.vocab_size)
    teacher, student = shape_of(config), shape_of(config, size.student)
    seconds = FIXED[step.kind]
    measured = settings.validation_samples
    decoding = settings.prompts * settings.new_tokens / DECODED
    if step.kind == TEACHER:
        return seconds + training_seconds(teacher, settings, settings.teacher_steps, settings.teacher_samples)
    if step.kind == CELL:
        return seconds + _cell(step, settings, teacher) + forward_seconds(teacher, settings, measured) + decoding
    samples = {
        REFERENCE: measured,
        EXPERTS: 2 * measured,
        STATISTICS: 2 * settings.calibration_samples,
        CACHE: settings.train_samples,
        PRUNED: measured,
    }.get(step.kind, 0)
    seconds += forward_seconds(teacher, settings, samples)
    if step.kind == REFERENCE:
        seconds += decoding
    if step.kind == PRUNED:
        seconds += forward_seconds(student, settings, measured)
    return seconds


def _cell(step: Step, settings: Settings, teacher: ModelShape) -> float:
    """Seconds of training."""
    cell, size = step.cell, settings.size(step.size)
    config, trained = size.config(settings.vocab_size), (settings.steps, settings.batch)
    extra = settings.steps * OPTIMIZERS[cell.optimizer]
    if cell.elastic:
        return ELASTIC * sum(
            training_seconds(shape_of(config, each), settings, *trained) for each in size.budgets.values()
        )
    if cell.first_phase:
        return extra + training_seconds(shape_of(config, size.student), settings, *trained) + FIXED[CELL]
    target = step.needs[PRUNED].what["target"] or size.student
    pruning = step.needs[PRUNED].pruning
    if pruning.slice:
        target = size.budgets[pruning.slice]
    return extra + training_seconds(shape_of(config, target), settings, *trained)


class Estimates:
    """Seconds of every step: measured where it is done, else predicted and corrected by what was measured."""

    def __init__(self, settings: Settings, machine: float = 1.0, jobs: int = 1) -> None:
        """Nothing is measured.

        Args:
            settings: of all steps.
            machine: how many times as long as the table's this one takes.
            jobs: processes of a step that takes all of the cores.
        """
        self.settings, self.machine, self.jobs = settings, machine, jobs
        self._ratios: dict[str, list[float]] = {}

    def _predicted(self, step: Step) -> float:
        count = ranks(self.jobs, self.settings) if step.kind in ALONE else 1
        return predicted(step, self.settings) / (count * SCALING if count > 1 else 1)

    def measured(self, step: Step, seconds: float) -> None:
        """Take what a step took."""
        self._ratios.setdefault(step.kind, []).append(seconds / self._predicted(step))

    def seconds(self, step: Step) -> float:
        """What a step will take: by steps of its kind, else by the table and the machine."""
        ratios = self._ratios.get(step.kind)
        return self._predicted(step) * (statistics.median(ratios) if ratios else self.machine)


def ranks(jobs: int, settings: Settings) -> int:
    """Processes of a teacher's training: as many as there are steps at once, or fewer that divide its batch."""
    return max(count for count in range(1, jobs + 1) if settings.teacher_samples % count == 0)


def next_step(waiting: Sequence[Step], done: Collection[str], running: Collection[Step] = ()) -> Step | None:
    """The first step in the order all of whose needs are done; one that takes all of the cores runs alone.

    Args:
        waiting: in order.
        done: ids.
        running: what runs.
    """
    if any(step.kind in ALONE for step in running):
        return None
    for step in waiting:
        if all(needed.id in done for needed in step.needs.values()):
            return None if step.kind in ALONE and running else step
    return None


def seconds_left(
    waiting: Sequence[Step],
    done: Collection[str],
    estimates: Estimates,
    jobs: int,
    running: Mapping[str, tuple[Step, float]] | None = None,
) -> float:
    """When all steps are done, if so many are run at once, in their order.

    Args:
        waiting: in order, those that run left out.
        done: ids.
        estimates: of each step.
        jobs: how many at once.
        running: step and seconds that it has run, by id.
    """
    finished, now, queue = set(done), 0.0, list(waiting)
    ends: list[tuple[float, str]] = []
    open_steps: dict[str, Step] = {}

    def start(step: Step, seconds: float) -> None:
        open_steps[step.id] = step
        heapq.heappush(ends, (now + seconds, step.id))

    for step, spent in (running or {}).values():
        start(step, max(0.0, estimates.seconds(step) - spent))
    while queue or ends:
        while len(ends) < jobs and (following := next_step(queue, finished, open_steps.values())) is not None:
            queue.remove(following)
            start(following, estimates.seconds(following))
        assert ends, "steps wait for one another"
        now, name = heapq.heappop(ends)
        del open_steps[name]
        finished.add(name)
    return now


def hours(seconds: float) -> str:
    """A duration for people.

    >>> hours(40), hours(500), hours(9000)
    ('40 s', '8 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
