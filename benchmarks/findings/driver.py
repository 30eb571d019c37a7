"""Runs steps, so many at once, each as soon as what it needs is done; a line after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

from benchmarks.findings.commands import Command, Commands
from benchmarks.findings.figures import metrics_of
from benchmarks.findings.order import Estimates, hours, next_step, seconds_left
from benchmarks.findings.steps import CELL, RESUMED, Step
from benchmarks.findings.store import Store
from benchmarks.findings.worker import Running
from megatron_slim.errors import SlimError

HEADLINES = ("loss", "kl", "mean_accepted_length", "expert_information", "expert_p_value")


class Job:
    """A step that runs, one command after the other."""

    def __init__(self, step: Step, commands: Commands, store: Store, start: Callable[..., Running]) -> None:
        """Start its first command."""
        self.step, self._store, self._start = step, store, start
        work = store.work(step)
        self.resumed = step.kind in RESUMED and work.exists() and any(work.iterdir())
        store.begin(step)
        self._commands: list[Command] = commands.of(step)
        self.results: dict[str, Mapping[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()
        self._open: Running | None = None
        self._next()

    def _next(self) -> None:
        done = self._open is not None and not self._commands
        self._open = None if done else self._start(self._commands.pop(0), self._store.logs(self.step))

    @property
    def running(self) -> Running:
        """The command that runs."""
        assert self._open is not None
        return self._open

    def spent(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self._began

    def advance(self) -> bool:
        """Take the result of the command that has ended; whether the step is done.

        Raises:
            SlimError: the command has failed.
        """
        running = self.running
        self.results[running.command.name] = running.result()
        self.seconds[running.command.name] = running.seconds
        self._next()
        return self._open is None

    def end(self) -> None:
        """Kill what runs."""
        if self._open is not None:
            self._open.end()


class Driver:
    """All steps of a run.

    Attributes:
        failed: what went wrong, by step.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        commands: Commands,
        store: Store,
        *,
        jobs: int,
        machine: float = 1.0,
        say: Callable[[str], None] = print,
        start: Callable[..., Running] = Running,
    ) -> None:
        """Find what is done already.

        Args:
            steps: in the order in which to start them.
            commands: of each step.
            store: of results.
            jobs: steps at once.
            machine: how many times as long as the table of `order` this machine takes.
            say: takes a line.
            start: starts a command.
        """
        self.commands, self.store, self.jobs = commands, store, jobs
        self.say, self._start = say, start
        self.failed: dict[str, SlimError] = {}
        self.estimates = Estimates(commands.settings, machine, jobs)
        self.done, self.waiting, self.total = set[str](), list[Step](), len(steps)
        for step in steps:
            if (result := store.result(step)) is None:
                self.waiting.append(step)
            else:
                self._count(step, result["seconds"], counts=not result.get("resumed", False))

    def _count(self, step: Step, seconds: float, *, counts: bool = True) -> None:
        self.done.add(step.id)
        if counts:
            self.estimates.measured(step, seconds)

    def seconds(self, running: Mapping[str, Job] | None = None) -> float:
        """Until all is done."""
        spent = {name: (job.step, job.spent()) for name, job in (running or {}).items()}
        return seconds_left(self.waiting, self.done, self.estimates, self.jobs, spent)

    def run(self) -> None:
        """Run what is not done; a step that fails takes those that need it along, and no others."""
        jobs: dict[str, Job] = {}
        try:
            while self.waiting or jobs:
                self._fill(jobs)
                if not jobs:
                    return  # what is left needs a step that has failed
                ready = wait([job.running.sentinel for job in jobs.values()])
                for name, job in [*jobs.items()]:
                    if job.running.sentinel in ready:
                        self._advance(name, job, jobs)
        finally:
            for job in jobs.values():
                job.end()

    def _fill(self, jobs: dict[str, Job]) -> None:
        while len(jobs) < self.jobs:
            if (step := next_step(self.waiting, self.done, [job.step for job in jobs.values()])) is None:
                return
            self.waiting.remove(step)
            try:
                jobs[step.id] = Job(step, self.commands, self.store, self._start)
            except SlimError as error:
                self._fail(step, error)

    def _advance(self, name: str, job: Job, jobs: dict[str, Job]) -> None:
        try:
            if not job.advance():
                return
        except SlimError as error:
            job.end()
            del jobs[name]
            self._fail(job.step, error)
            return
        del jobs[name]
        metrics, seconds = metrics_of(job.results), job.spent()
        about = {"resumed": job.resumed, "commands": job.seconds}
        self.store.finish(job.step, metrics, seconds, about)
        self._count(job.step, seconds, counts=not job.resumed)
        shown = ", ".join(f"{key} {metrics[key]:.4f}" for key in HEADLINES if key in metrics)
        rest = f"about {hours(self.seconds(jobs))} left" if self.waiting or jobs else "all done"
        what = f"{name}: {shown}, " if shown else f"{name}: "
        self.say(f"[{len(self.done)}/{self.total}] {what}{seconds:.0f} s; {rest}")

    def _fail(self, step: Step, error: SlimError) -> None:
        """Leave out a step, and those that need it."""
        self.failed[step.id] = error
        lost = {step.id}
        for later in [*self.waiting]:
            if any(needed.id in lost for needed in later.needs.values()):
                lost.add(later.id)
                self.waiting.remove(later)
        others = f"; {len(lost) - 1} steps that need it are left out" if len(lost) > 1 else ""
        self.say(f"{step.id} failed: {error}{others}")


def listing(driver: Driver, steps: Sequence[Step]) -> list[str]:
    """A line for every step, and the total, as a dry run prints them."""
    lines = []
    for step in steps:
        done = step.id in driver.done
        seconds = "done" if done else f"{driver.estimates.seconds(step):.0f} s"
        lines.append(f"{seconds:>8}  {step.id}")
    cells = sum(step.kind == CELL for step in steps)
    left = hours(driver.seconds())
    lines.append(
        f"{len(steps)} steps, {cells} of them cells; {len(driver.done)} done; {driver.jobs} at once: about {left}"
    )
    return lines
