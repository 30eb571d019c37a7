"""Which layouts fit and how fast they should be: the cheapest check first, then ranked (no torch)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from megatron_slim.architecture.backward import step_flops
from megatron_slim.architecture.flops import teacher_flops
from megatron_slim.architecture.pipeline_layout import NO_TEACHER, Stages, balanced
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.planning.hardware import GIB, Assumptions, Gpu
from megatron_slim.planning.layouts import RECOMPUTE, Settings, TrainLayout, Wanted
from megatron_slim.planning.memory import Memory, least_static, rank_memory
from megatron_slim.planning.speed import Step, step


@dataclass(frozen=True)
class Job:
    """Which models are to be split across which GPUs.

    Attributes:
        student: sizes of the student.
        teacher: of the teacher, None without one.
        settings: of the run.
        gpus: how many.
        gpu: of which kind.
        assumed: what cannot be counted.
    """

    student: ModelShape
    teacher: ModelShape | None
    settings: Settings
    gpus: int
    gpu: Gpu
    assumed: Assumptions = field(default_factory=Assumptions)


@dataclass(frozen=True)
class Candidate:
    """A layout that is allowed.

    Attributes:
        layout: its sizes.
        stages: layers of both models on each virtual stage.
        memory: of every pipeline rank.
        step: its speed.
    """

    layout: TrainLayout
    stages: Stages
    memory: list[Memory]
    step: Step

    @property
    def worst(self) -> int:
        """The pipeline rank that needs most."""
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].total)

    @property
    def needed(self) -> float:
        """Bytes of that rank."""
        return self.memory[self.worst].total


@dataclass(frozen=True)
class Rejected:
    """A layout that is not allowed or does not fit, and why.

    Attributes:
        layout: its sizes.
        why: in a sentence.
        kind: ``not allowed`` or ``does not fit``.
        needed: bytes of the rank that needs most, or the least that it could; 0 where it is not allowed.
    """

    layout: TrainLayout
    why: str
    kind: str
    needed: float = 0.0


NOT_ALLOWED, TOO_LARGE = "not allowed", "does not fit"
_NUMBER = re.compile(r"[TPE]P \d+|\d+")


@dataclass
class Found:
    """What a search found.

    Attributes:
        ranked: layouts that fit, the quickest first.
        rejected: all others that were looked at.
        spared: layouts that fit with less recomputation, and were therefore not looked at.
    """

    ranked: list[Candidate] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    spared: int = 0

    @property
    def nearest(self) -> Rejected | None:
        """Of those that do not fit, the one that needs least."""
        return min(
            (each for each in self.rejected if each.kind == TOO_LARGE), key=lambda each: each.needed, default=None
        )

    def reasons(self) -> list[tuple[str, int]]:
        """An example of each kind of reason, numbers apart, and how many layouts it keeps out; the most first."""
        examples: dict[str, str] = {}
        counts = Counter[str]()
        for each in self.rejected:
            kind = _NUMBER.sub("N", each.why) if each.kind == NOT_ALLOWED else TOO_LARGE
            examples.setdefault(kind, each.why if each.kind == NOT_ALLOWED else TOO_LARGE)
            counts[kind] += 1
        return [(examples[kind], count) for kind, count in counts.most_common()]


class Search:
    """Looks at layouts of one job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._stages: dict[tuple[int, int, str], Stages | None] = {}

    def run(self, wanted: Wanted, report: Callable[[Iterable[TrainLayout]], Iterable[TrainLayout]] = iter) -> Found:
        """Try every layout that is wanted; ``report`` passes them through, as a progress bar does."""
        found = Found()
        fits: set[TrainLayout] = set()
        experts = min(each.num_moe_experts for each in (self.job.student, self.job.teacher) if each is not None)
        for layout in report(list(wanted.layouts(self.job.gpus, experts, self.job.gpu.per_node))):
            plain = replace(layout, recompute="none")
            if plain in fits:
                found.spared += 1
                continue
            tried = self.look_at(layout)
            if isinstance(tried, Candidate):
                found.ranked.append(tried)
                fits.add(plain)
            else:
                found.rejected.append(tried)
        found.ranked.sort(key=lambda each: (each.step.seconds, each.needed))
        return found

    def look_at(self, layout: TrainLayout) -> Candidate | Rejected:
        """One layout: allowed, small enough at the least, small enough with its stages; then its speed."""
        job = self.job
        if violations := layout.violations(job.student, job.teacher, job.settings, job.gpu.per_node):
            return Rejected(layout, violations[0], NOT_ALLOWED)
        least = least_static(job.student, job.teacher, layout, job.settings) + job.assumed.overhead_gib * GIB
        if least > job.gpu.memory:
            return Rejected(
                layout, f"weights, gradients and optimizer alone are {_at_least(least)} GB", TOO_LARGE, least
            )
        stages = self.stages(layout)
        if stages is None:
            return Rejected(layout, f"too few layers for PP{layout.pp} VPP{layout.vpp}", NOT_ALLOWED)
        memory = rank_memory(job.student, job.teacher, layout, stages, job.settings, job.assumed)
        worst = max(memory, key=lambda each: each.total)
        if worst.total > job.gpu.memory:
            return Rejected(layout, why_too_large(memory), TOO_LARGE, worst.total)
        took = step(job.student, job.teacher, layout, stages, job.settings, job.gpu, job.assumed)
        return Candidate(layout, stages, memory, took)

    def stages(self, layout: TrainLayout) -> Stages | None:
        """As ``--pipeline-layout auto`` chooses them on a GPU."""
        job, key = self.job, (layout.pp, layout.vpp, layout.recompute)
        if key not in self._stages:
            settings = job.settings
            recompute = RECOMPUTE[layout.recompute]
            own = step_flops(
                job.student, settings.seq_length, settings.kernels, recompute, settings.only, everywhere=True
            )
            theirs = None
            if job.teacher is not None and not settings.teacher_head_only:
                runs_mtp = job.teacher.mtp_num_layers >= job.student.mtp_num_layers > 0
                theirs = teacher_flops(job.teacher, settings.seq_length, settings.kernels, runs_mtp=runs_mtp)
            if layout.pp == 1:
                layers = (job.student.num_layers,), (job.teacher.num_layers if theirs and job.teacher else 0,)
                self._stages[key] = Stages(1, own, theirs or NO_TEACHER, *layers)
            else:
                self._stages[key] = balanced(own, theirs, layout.pp, layout.vpp)
        return self._stages[key]


def why_too_large(memory: Sequence[Memory]) -> str:
    """What the fullest rank is full of."""
    rank = max(range(len(memory)), key=lambda each: memory[each].total)
    worst = memory[rank]
    parts = {"static": worst.static, "activations": worst.activations, "working": worst.working, "loss": worst.loss}
    named = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in parts.items())
    return f"pipeline rank {rank} of {len(memory)} needs {_at_least(worst.total)} GB ({named})"


def _at_least(number: float) -> str:
    """Bytes in GB, rounded up: what is too large must not read as what the GPU has."""
    return f"{math.ceil(number / 1e8) / 10:.1f}"
