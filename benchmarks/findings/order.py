"""How long steps take, and when all are done: by operations at first, by the clock as steps finish (no torch)."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from benchmarks.findings.sizes import Settings
from benchmarks.findings.steps import CACHE, CELL, EXPERTS, PRUNED, REFERENCE, STATISTICS, TEACHER, TEXT, Step
from megatron_slim.architecture.flops import TORCH, student_flops, teacher_flops
from megatron_slim.architecture.hf_config import shape_from_hf_config
from megatron_slim.architecture.shape import ModelShape

# One thread of the machine that docs/findings.md names: operations per second in training and in a streamed forward
# pass, and seconds of a step of each kind besides.
TRAINING, FORWARD = 5.5e10, 7.5e10
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


def training_seconds(shape: ModelShape, settings: Settings, tokens: int) -> float:
    """Of training on so many tokens, on the machine of the table."""
    return student_flops(shape, settings.seq_length, TORCH).total * tokens / TRAINING


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
    seconds, length = FIXED[step.kind], settings.seq_length
    measured = settings.validation_samples
    decoding = settings.prompts * settings.new_tokens / DECODED
    if step.kind == TEACHER:
        return seconds + training_seconds(teacher, settings, settings.teacher_steps * settings.teacher_samples * length)
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
    config, tokens = size.config(settings.vocab_size), settings.tokens
    extra = settings.steps * OPTIMIZERS[cell.optimizer]
    if cell.elastic:
        return ELASTIC * sum(
            training_seconds(shape_of(config, each), settings, tokens) for each in size.budgets.values()
        )
    if cell.first_phase:
        return extra + training_seconds(shape_of(config, size.student), settings, tokens) + FIXED[CELL]
    target = step.needs[PRUNED].what["target"] or size.student
    pruning = step.needs[PRUNED].pruning
    if pruning.slice:
        target = size.budgets[pruning.slice]
    return extra + training_seconds(shape_of(config, target), settings, tokens)


class Estimates:
    """Seconds of every step: measured where it is done, else predicted and corrected by what was measured."""

    def __init__(self, settings: Settings, machine: float = 1.0) -> None:
        """Nothing is measured; ``machine``: how many times as long as the table's this one takes."""
        self.settings, self.machine = settings, machine
        self._ratios: dict[str, list[float]] = {}

    def measured(self, step: Step, seconds: float) -> None:
        """Take what a step took."""
        self._ratios.setdefault(step.kind, []).append(seconds / predicted(step, self.settings))

    def seconds(self, step: Step) -> float:
        """What a step will take: by steps of its kind, else by the table and the machine."""
        ratios = self._ratios.get(step.kind)
        return predicted(step, self.settings) * (statistics.median(ratios) if ratios else self.machine)


def next_step(waiting: Sequence[Step], done: Collection[str]) -> Step | None:
    """The first step in the order all of whose needs are done.

    Args:
        waiting: in order.
        done: ids.
    """
    for step in waiting:
        if all(needed.id in done for needed in step.needs.values()):
            return step
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
    for step, spent in (running or {}).values():
        heapq.heappush(ends, (max(0.0, estimates.seconds(step) - spent), step.id))
    while queue or ends:
        while len(ends) < jobs and (following := next_step(queue, finished)) is not None:
            queue.remove(following)
            heapq.heappush(ends, (now + estimates.seconds(following), following.id))
        assert ends, "steps wait for one another"
        now, name = heapq.heappop(ends)
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
