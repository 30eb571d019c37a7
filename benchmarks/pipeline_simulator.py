"""Pipeline schedules of a student with a frozen teacher, as events: who computes what when, and what is waited for.

1F1B and interleaved 1F1B (arXiv 2104.04473) in the order in which Megatron runs them. The teacher's forward pass is
either a part of the student's (inline), or work of its own: before the first of a block of steps, or filling what would
be idle, also of the step before (a teacher that is not trained need not wait for the optimizer). Sending takes no time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_slim.planning.schedule import BACKWARD, FORWARD, Task, one_forward_one_backward

TEACHER, OPTIMIZER = "teacher", "optimizer"
SETTLING = 4  # steps


@dataclass(frozen=True)
class Pipeline:
    """A layout, what its stages cost in any unit of time, and when the teacher runs.

    Attributes:
        ranks: pipeline-parallel size p.
        micro_batches: of a step, m; with ``virtual`` above 1 a multiple of ``ranks``.
        forward: student's seconds of every stage, of which there are p * v in the order of the layers.
        backward: likewise.
        teacher: likewise.
        virtual: stages of a rank, v.
        ahead: how many micro-batches the teacher may be ahead of the student; None runs it inline.
        lead: a rank prefers the teacher's work while it is less ahead than this, the student's from there on.
        block: steps whose teacher's work is done in one go before the first of them, of which ``ahead`` must be the
            micro-batches; 0 lets it fill what is idle.
        parts: into how many tasks the teacher's work on a stage can be cut, as between layers.
        optimizer: seconds between the last backward of a step and the first forward of the next.
    """

    ranks: int
    micro_batches: int
    forward: Sequence[float]
    backward: Sequence[float]
    teacher: Sequence[float]
    virtual: int = 1
    ahead: int | None = None
    lead: int = 0
    block: int = 0
    parts: int = 1
    optimizer: float = 0.0

    @property
    def stages(self) -> int:
        """All of them, p * v."""
        return self.ranks * self.virtual

    def seconds(self, task: Task) -> float:
        """How long a task takes."""
        if task.kind == TEACHER:
            return self.teacher[task.stage] / self.parts
        if task.kind == BACKWARD:
            return self.backward[task.stage]
        return self.forward[task.stage] + (self.teacher[task.stage] if self.ahead is None else 0.0)


@dataclass
class Rank:
    """What is left to do on a rank, in order, and when it is free; a teacher's blocks are in the student's work."""

    student: list[Task]
    teacher: list[Task]
    free: float = 0.0
    busy: float = 0.0
    next_student: int = 0
    next_teacher: int = 0
    begun: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Outcome:
    """Of steps between which nothing changes any more.

    Attributes:
        seconds: of a step.
        idle: share of them in which a rank has nothing to do, mean over ranks.
        held: most micro-batches whose teacher's hidden states a rank holds at once.
    """

    seconds: float
    idle: float
    held: int


class Simulation:
    """Runs the tasks of some steps, each as early as its rank and what it waits for allow."""

    def __init__(self, pipeline: Pipeline, steps: int) -> None:
        self.pipeline, self.steps = pipeline, steps + SETTLING
        self.end: dict[Task, float] = {}
        self.left = [2 * pipeline.micro_batches * pipeline.stages for _ in range(self.steps)]
        self.step_ends: list[float] = []
        self.held, self.most_held = Counter[int](), 0
        # The teacher continues past the last step, as it would.
        self.ranks = [
            Rank(self._student(rank, self.steps), self._teacher(rank, self.steps + 2)) for rank in range(pipeline.ranks)
        ]

    def run(self) -> Outcome:
        """Simulate to the end."""
        while True:
            starts = [self._choose(rank) for rank in self.ranks]
            start, _, number = min((start, task is None, number) for number, (start, task) in enumerate(starts))
            if math.isinf(start):
                break
            task = starts[number][1]
            assert task is not None
            self._execute(self.ranks[number], task, start)
        assert len(self.step_ends) == self.steps, "the schedule came to a standstill"
        seconds = (self.step_ends[-1] - self.step_ends[SETTLING - 1]) / (self.steps - SETTLING)
        p = self.pipeline
        work = p.micro_batches * (sum(p.forward) + sum(p.backward) + sum(p.teacher)) / p.ranks
        return Outcome(seconds, 1 - work / seconds, self.most_held)

    def _student(self, rank: int, steps: int) -> list[Task]:
        p, m, block = self.pipeline, self.pipeline.micro_batches, self.pipeline.block
        once = list(one_forward_one_backward(p.ranks, m, p.virtual, rank))
        tasks: list[Task] = []
        for step in range(steps):
            if block and step % block == 0:
                whole = one_forward_one_backward(p.ranks, block * m, p.virtual, rank)
                tasks += [Task(TEACHER, t.batch + step * m, t.stage) for t in whole if t.kind == FORWARD]
            tasks += [task._replace(batch=task.batch + step * m) for task in once]
        return tasks

    def _teacher(self, rank: int, steps: int) -> list[Task]:
        """In the order of the student's forward passes."""
        if self.pipeline.ahead is None or self.pipeline.block:
            return []
        forwards = [task for task in self._student(rank, steps) if task.kind == FORWARD]
        return [Task(TEACHER, t.batch, t.stage, part) for t in forwards for part in range(self.pipeline.parts)]

    def _choose(self, rank: Rank) -> tuple[float, Task | None]:
        """The task that a rank begins next, and when; infinity where nothing can begin yet."""
        student = self._start(rank, rank.student, rank.next_student)
        teacher = self._start(rank, rank.teacher, rank.next_teacher)
        if math.isinf(min(student, teacher)):
            return math.inf, None
        behind = rank.begun[TEACHER] < (rank.begun[FORWARD] + self.pipeline.lead) * self.pipeline.parts
        teacher_first = teacher < student or (teacher == student and behind)
        return (
            (teacher, rank.teacher[rank.next_teacher]) if teacher_first else (student, rank.student[rank.next_student])
        )

    def _start(self, rank: Rank, tasks: list[Task], number: int) -> float:
        if number == len(tasks):
            return math.inf
        return max([rank.free, *(self.end.get(task, math.inf) for task in self._awaited(tasks[number]))], default=0.0)

    def _awaited(self, task: Task) -> Iterator[Task]:
        last, p = self.pipeline.stages - 1, self.pipeline
        if task.kind == TEACHER:
            if p.block and (step := task.batch // p.micro_batches // p.block * p.block):
                yield Task(OPTIMIZER, step - 1, 0)
            if task.part:
                yield task._replace(part=task.part - 1)
            elif task.stage:
                yield Task(TEACHER, task.batch, task.stage - 1, p.parts - 1)
            elif p.ahead is not None and task.batch >= p.ahead:
                yield Task(FORWARD, task.batch - p.ahead, last)
        elif task.kind == BACKWARD:
            yield Task(FORWARD, task.batch, last) if task.stage == last else task._replace(stage=task.stage + 1)
        else:
            if step := task.batch // p.micro_batches:
                yield Task(OPTIMIZER, step - 1, 0)
            if task.stage:
                yield task._replace(stage=task.stage - 1)
            if p.ahead is not None and task.stage == last:
                yield Task(TEACHER, task.batch, last, p.parts - 1)

    def _execute(self, rank: Rank, task: Task, start: float) -> None:
        p, last = self.pipeline, self.pipeline.stages - 1
        rank.free = self.end[task] = start + p.seconds(task)
        rank.begun[task.kind] += 1
        if task.kind == TEACHER and not p.block:
            rank.next_teacher += 1
        else:
            rank.next_student += 1
        if task.kind == TEACHER:
            if not task.part and task.stage:
                self.held[(task.stage - 1) % p.ranks] -= 1
            if task.part == p.parts - 1:
                self._hold(task.stage % p.ranks)
            return
        if p.ahead is not None and task.kind == FORWARD and task.stage == last:
            self.held[last % p.ranks] -= 1
        step = task.batch // p.micro_batches
        self.left[step] -= 1
        if not self.left[step]:
            self.step_ends.append(rank.free + p.optimizer)
            self.end[Task(OPTIMIZER, step, 0)] = self.step_ends[-1]

    def _hold(self, rank: int) -> None:
        self.held[rank] += 1
        self.most_held = max(self.most_held, self.held[rank])


def simulate(pipeline: Pipeline, steps: int = 4) -> Outcome:
    """What a step takes, as a mean over ``steps`` of them after the teacher has got as far ahead as it may."""
    return Simulation(pipeline, steps).run()
