#!/usr/bin/env python3
"""Measure what the log costs: time inside of everything that measures and logs, over the time of training steps.

One process trains the student of kd_step.py with its teacher, in Megatron's loop, and logs every iteration, which is
the most that can be asked for. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kd_step import shapes, write_models
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser

WARM_UP = 2  # iterations that are not counted: the first ones allocate


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--seq-length", type=positive, default=512, help="tokens of a sample")
    parser.add_argument("--micro-batches", type=positive, default=2, help="of one sample each, in a step")
    parser.add_argument("--vocab-size", type=positive, help="default: an eighth of the published one")
    parser.add_argument("--iterations", type=positive, default=6, help=f"after {WARM_UP} that do not count")
    parser.add_argument("--log-interval", type=positive, default=1)
    parser.add_argument("--processes", type=positive, default=1, help="data-parallel ranks")
    return parser.parse_args()


@dataclass
class Stopwatch:
    """Seconds inside wrapped functions, those that they call counted once, by the function's name."""

    seconds: dict[str, float] = field(default_factory=dict)
    running: bool = False

    def wrap(self, owner: Any, name: str) -> None:
        """Time every call of a method or function."""
        setattr(owner, name, self.timed(getattr(owner, name), name))

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, timed."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self.running:
                return function(*args, **kwargs)
            self.running, started = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
                self.running = False

        return wrapper


def watch_the_log(stopwatch: Stopwatch) -> list[float]:
    """Wrap all of the log that runs in a step; the list gets the time at which each step ends."""
    from megatron_slim.training import meters
    from megatron_slim.training.run_log import RunLog
    from megatron_slim.training.steps import Steps

    ends: list[float] = []
    stopwatch.wrap(meters, "_now")
    for owner, name in (
        (meters.StageClock, "_add_part"),
        (meters.StageClock, "watch_backward"),
        (meters.LossSums, "add"),
        (RunLog, "end_iteration"),
    ):
        stopwatch.wrap(owner, name)
    hook, finalize = meters.ExpertCounter._hook, Steps.finalize_grads
    meters.ExpertCounter._hook = lambda *args: stopwatch.timed(hook(*args), "count experts")  # type: ignore[method-assign]

    def finalizing(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        ends.append(time.perf_counter())
        if len(ends) == WARM_UP:
            stopwatch.seconds.clear()

    Steps.finalize_grads = finalizing  # type: ignore[method-assign]
    return ends


def train(argv: list[str], log: str) -> tuple[float, dict[str, float]]:
    """Body of one rank: seconds of the counted steps, and of the log in them."""
    from megatron_slim.training.pretrain import main

    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    stopwatch = Stopwatch()
    ends = watch_the_log(stopwatch)
    main(argv)
    return ends[-1] - ends[WARM_UP - 1], stopwatch.seconds


def command_line(models: Path, args: argparse.Namespace) -> Iterator[str]:
    """Arguments of training."""
    samples = args.micro_batches * args.processes
    yield from ("--pretrained-checkpoint", str(models / "student"), "--teacher-load", str(models / "teacher"))
    yield from ("--mock-data", "--no-teacher-check", "--use-distributed-optimizer", "--lr", "1e-4", "--eval-iters", "0")
    yield from ("--seq-length", str(args.seq_length), "--micro-batch-size", "1", "--global-batch-size", str(samples))
    yield from ("--train-iters", str(WARM_UP + args.iterations), "--log-interval", str(args.log_interval))
    yield from ("--tensorboard-dir", str(models / "tensorboard"), "--eval-interval", "1000")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and say what part of it the log was."""
    from megatron_slim.testing import run_distributed

    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        write_models(models, shapes("eighth", args.vocab_size))
        argv = list(command_line(models, args))
        ranks = run_distributed(args.processes, train, argv, str(models / "log"), initialise=False)
    costs = [sum(inside.values()) / seconds for seconds, inside in ranks]
    worst = max(range(len(costs)), key=costs.__getitem__)
    seconds, inside = ranks[worst]
    steps = args.iterations
    results = {"log_over_step": costs[worst], "step_seconds": seconds / steps}
    results["log_seconds_per_step"] = sum(inside.values()) / steps
    if not args.json:
        for name, value in results.items():
            print(f"{name}: {value:.3g}")
    parts = {name: value / steps for name, value in inside.items()}
    return {**results, "parts_seconds_per_step": parts, "log_interval": args.log_interval, "processes": args.processes}


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: measure(arguments), as_json=arguments.json)
