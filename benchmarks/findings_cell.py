#!/usr/bin/env python3
"""Measure what one cell of the findings takes, compared with the commands that a user would give for it.

Prune, train with all four losses, evaluate with the distance from the teacher and acceptance. By commands: calibrate,
prune, distil next to the teacher, evaluate both, each in a process of its own. As a cell: from statistics and a cache
that all cells share, in processes that are forked with everything imported. In turns, each side with all of the cores:
commands one after the other with a rank or a thread on each core, cells one on each core. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.findings.commands import Commands
from benchmarks.findings.driver import Driver
from benchmarks.findings.figures import metrics_of
from benchmarks.findings.matrix import CELLS, MAIN
from benchmarks.findings.sizes import ROOT, settings
from benchmarks.findings.steps import CELL, PRUNED, TEACHER, TEXT, Step, Steps
from benchmarks.findings.store import Store
from benchmarks.findings.worker import run_all
from benchmarks.processes import free_port, python, run
from benchmarks.report import machine
from megatron_slim.cli.terminal import say
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser
from megatron_slim.errors import SlimError


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--dir", type=Path, default=ROOT / "runs/findings-cell", metavar="DIR", help="of the shared steps, made once"
    )
    parser.add_argument("--steps", type=positive, default=300, metavar="N", help="of the training (300)")
    parser.add_argument("--teacher-steps", type=positive, default=200, metavar="N", help="of the teacher's (200)")
    parser.add_argument("--repeats", type=positive, default=2, metavar="N", help="of both; the medians are compared")
    parser.add_argument("--jobs", type=positive, metavar="N", help="cores that each side uses (all)")
    parser.add_argument("--trial", action="store_true", help="a tiny model: shows that it runs")
    return parser.parse_args()


def shared(cells: Sequence[Step]) -> list[Step]:
    """What cells need besides their own pruning, in order."""
    found: dict[str, Step] = {}

    def add(each: Step) -> None:
        for needed in each.needs.values():
            add(needed)
        if each.kind not in (PRUNED, CELL):
            found[each.id] = each

    for cell in cells:
        add(cell)
    return list(found.values())


def by_cell(step: Step, commands: Commands, store: Store) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each command and in all, and the figures."""
    started, took, results = time.monotonic(), dict[str, float](), dict[str, dict[str, Any]]()
    for each in (step.needs[PRUNED], step):
        store.begin(each)
        for command in commands.of(each):
            if each.kind == CELL or command.name == "prune":  # not what a pruned model is measured by before training
                begin = time.monotonic()
                results |= run_all([command], store.logs(each))
                took[command.name] = time.monotonic() - begin
    took["all"] = time.monotonic() - started
    return took, metrics_of(results)


def at_once(cells: Sequence[Step], commands: Commands, store: Store) -> tuple[dict[str, float], dict[str, float]]:
    """Some cells at once: seconds of a cell, which are those of all divided by their number; figures of the first."""
    started = time.monotonic()
    with ThreadPoolExecutor(len(cells)) as pool:
        found = list(pool.map(lambda step: by_cell(step, commands, store), cells))
    whole = time.monotonic() - started
    took = {name: statistics.mean(each[name] for each, _ in found) for name in found[0][0]}
    return {**took, "all": whole / len(cells)}, found[0][1]


def by_commands(
    step: Step, commands: Commands, store: Store, work: Path, jobs: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The same with ``megatron-slim prune``, ``distill`` and ``evaluate``; ranks of training are data parallel."""
    used = commands.settings
    if used.batch % jobs:
        raise SlimError(f"--jobs {jobs} does not divide a batch of {used.batch}", fix="give another")
    work.mkdir(parents=True)
    text, teacher = store.work(step.needs[TEXT]), store.work(step.needs[TEACHER]) / "hf"
    length = ("--seq-length", used.seq_length)
    calibration = ("--calibration-data", text / "train_text_document", "--num-samples", used.calibration_samples)
    recipe = ("--recipe", commands.recipe(step.needs[PRUNED], work))
    batch = ("--micro-batch-size", used.batch // jobs, "--global-batch-size", used.batch, "--nproc-per-node", jobs)
    never = ("--train-iters", used.steps, "--save-interval", 10**6, "--eval-interval", 10**6, "--eval-iters", 0)
    rates = ("--lr", used.lr, "--min-lr", used.lr / 10, "--precision", "fp32", "--master-port", free_port())
    other: tuple[object, ...] = (
        "--seed",
        step.seed,
        "--split",
        "1,0,0",
        "--default-lr-warmup-iters",
        20,
        "--no-save-optim",
    )
    other += ("--no-teacher-check",) if used.tiny else ()
    prompts = ("--acceptance", text / "prompts.npy", "--max-new-tokens", used.new_tokens)
    words: dict[str, tuple[object, ...]] = {
        "prune": ("prune", "--load", teacher, "--save", work / "student", *recipe, *calibration, *length, "--seed", 1),
        "train": (
            *("distill", "--student", work / "student", "--teacher", teacher, "--save", work / "run"),
            *("--data", text / "samples", *length, *batch, *never, *rates, *other),
        ),
        "evaluate": (
            *("evaluate", "--load", work / "run", "--teacher", teacher, "--data", text / "validation.npy"),
            *("--micro-batch-size", 8, *prompts, "--json"),
        ),
    }
    took, results = dict[str, float](), dict[str, dict[str, Any]]()
    for name, each in words.items():
        threads = 1 if name == "train" else jobs
        done = run(["env", f"OMP_NUM_THREADS={threads}", *python("-m", "megatron_slim", *each)])
        took[name] = done.seconds
        if name == "evaluate":
            results["losses"] = json.loads(done.stdout.splitlines()[-1])
    took["all"] = sum(took.values())
    return took, metrics_of(results)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Make what is shared, then both in turns."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chosen = settings(trial=args.trial, steps=args.steps, teacher_steps=args.teacher_steps)
    store, made = Store(args.dir.absolute()), Steps(chosen)
    jobs = args.jobs or len(os.sched_getaffinity(0))
    commands, cells = Commands(chosen, store, jobs), [made.cell(CELLS[MAIN], seed) for seed in range(1, jobs + 1)]
    driver = Driver(shared(cells), commands, store, jobs=jobs, say=say)
    driver.run()
    if driver.failed:
        raise next(iter(driver.failed.values()))
    found: dict[str, list[dict[str, float]]] = {"cell": [], "commands": []}
    figures: dict[str, dict[str, float]] = {}
    work = store.root / "by-commands"
    for _ in range(args.repeats):
        for name in found:
            shutil.rmtree(work, ignore_errors=True)
            if name == "cell":
                took, figures[name] = at_once(cells, commands, store)
            else:
                took, figures[name] = by_commands(cells[0], commands, store, work, jobs)
            found[name].append(took)
            say(f"{name}: " + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in took.items()))
    medians = {
        name: {part: statistics.median(each[part] for each in turns) for part in turns[0]}
        for name, turns in found.items()
    }
    shared_seconds = {each.id: (store.result(each) or {})["seconds"] for each in shared(cells)}
    results = {
        "cell_over_commands": medians["cell"]["all"] / medians["commands"]["all"],
        "jobs": jobs,
        "seconds": medians,
        "samples": found,
        "loss": {name: each["loss"] for name, each in figures.items()},
        "shared_seconds": shared_seconds,
        "machine": machine(args.dir),
    }
    say(f"cell_over_commands: {results['cell_over_commands']:.3f}")
    return results


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: benchmark(arguments), as_json=arguments.json)
