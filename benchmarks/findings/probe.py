"""How fast this machine is: some steps of a teacher's training on made-up data, as many at once as steps will be."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks.findings.commands import Command
from benchmarks.findings.order import shape_of, training_seconds
from benchmarks.findings.sizes import BASE, Settings
from benchmarks.findings.worker import Running
from megatron_slim.errors import SlimError
from megatron_slim.files import read_json, to_json, write_atomic

STEPS, WARM_UP = 12, 4
FILE = "probe.json"
_SECONDS = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")


def command(folder: Path, settings: Settings, number: int) -> Command:
    """A short training run."""
    batch = settings.teacher_samples
    words: tuple[object, ...] = ("pretrain", "--hf-config", folder, "--mock-data", "--train-iters", STEPS)
    words += ("--seq-length", settings.seq_length, "--micro-batch-size", batch, "--global-batch-size", batch)
    words += ("--lr", settings.teacher_lr, "--lr-decay-style", "constant", "--use-distributed-optimizer")
    words += ("--eval-iters", 0, "--eval-interval", 10**6, "--log-interval", 1)
    return Command(f"probe-{number}", tuple(map(str, words)))


def machine(root: Path, settings: Settings, jobs: int, say: Callable[[str], None]) -> float:
    """How many times as long as the table of `order` this machine takes; measured once for a directory and jobs.

    Args:
        root: of the results.
        settings: of all steps.
        jobs: at once.
        say: takes a line, if it is measured.

    Raises:
        SlimError: the run failed.
    """
    path = root / FILE
    known: dict[str, float] = read_json(path) if path.exists() else {}
    key = f"{jobs} at once" + (", trial" if settings.tiny else "")
    if key not in known:
        say("some steps of training first, to see how fast this machine is")
        folder = root / "probe"
        folder.mkdir(parents=True, exist_ok=True)
        config = settings.size(BASE).config(settings.vocab_size)
        (folder / "config.json").write_text(to_json(config))
        found = [_median(running) for running in _all(folder, settings, jobs)]
        known[key] = max(found) / training_seconds(shape_of(config), settings, 1, settings.teacher_samples)
        write_atomic(path, to_json(known))
    return known[key]


def _all(folder: Path, settings: Settings, jobs: int) -> list[Running]:
    started = list[Running]()
    try:
        for number in range(jobs):
            started.append(Running(command(folder, settings, number), folder))
        for running in started:
            running.result()
    finally:
        for running in started:
            running.end()
    return started


def _median(running: Running) -> float:
    """Seconds of a step."""
    text = (running.logs / f"{running.command.name}.out").read_text(errors="replace")
    found = [float(each) / 1000 for each in _SECONDS.findall(text)]
    if len(found) != STEPS:
        raise SlimError(f"{len(found)} of {STEPS} steps in the log", where=str(running.logs))
    return statistics.median(found[WARM_UP:])
