"""The command line of the findings."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.findings.commands import Commands
from benchmarks.findings.driver import Driver, listing
from benchmarks.findings.matrix import QUESTIONS
from benchmarks.findings.order import hours
from benchmarks.findings.probe import machine
from benchmarks.findings.sizes import ROOT, settings
from benchmarks.findings.steps import Step, Steps, wanted
from benchmarks.findings.store import Store
from megatron_slim.cli.terminal import say
from megatron_slim.command_line import positive, tool_parser
from megatron_slim.errors import SlimError
from megatron_slim.files import sole_writer

ABOUT = """Examine the paper's findings on small models: train teachers, prune, distil, evaluate, report.

Continues where it was, after a kill too, and never repeats what is done. Results are in --dir, a directory for each
step; the report has the verdicts. See docs/findings.md."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(ABOUT)
    parser.add_argument("--dir", type=Path, default=ROOT / "runs/findings", metavar="DIR", help="of all results")
    parser.add_argument(
        "--only", type=_letters, default=tuple(QUESTIONS), metavar="Q,...", help=f"questions: {', '.join(QUESTIONS)}"
    )
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="of every cell (3)")
    parser.add_argument("--steps", type=positive, metavar="N", help="of a cell's training (300)")
    parser.add_argument("--teacher-steps", type=positive, metavar="N", help="of a teacher's training (2400)")
    parser.add_argument("--jobs", type=positive, metavar="N", help="steps at once (one for each core)")
    parser.add_argument("--dry-run", action="store_true", help="print all steps with seconds, and the total")
    parser.add_argument("--report", action="store_true", help="write the report of what is there, and run nothing")
    parser.add_argument("--trial", action="store_true", help="tiny models and three steps: shows that it runs")
    parser.add_argument(
        "--publish", type=Path, metavar="DOCS", help="put verdicts, tables and pictures into findings.md"
    )
    return parser.parse_args(argv)


def _letters(text: str) -> tuple[str, ...]:
    """An argparse type: letters of questions with commas between them."""
    keys = tuple(text.split(","))
    if unknown := [key for key in keys if key not in QUESTIONS]:
        raise argparse.ArgumentTypeError(f"there is no question {unknown[0]!r}; choose from {', '.join(QUESTIONS)}")
    return keys


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run what is not done, then report.

    Raises:
        SlimError: a step failed, or another process runs in the same directory.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chosen = settings(trial=args.trial, steps=args.steps, teacher_steps=args.teacher_steps)
    publish = args.publish
    if publish is not None and chosen != settings():
        say("the documentation has results of the default settings alone: nothing is put there")
        publish = None
    jobs = args.jobs or len(os.sched_getaffinity(0))
    store, made = Store(args.dir.absolute()), Steps(chosen)
    steps = wanted(made, args.only, args.seeds)
    results: dict[str, Any] = {"dir": str(args.dir), "steps": len(steps)}
    if not args.report:
        results |= _run(args, steps, Commands(chosen, store, jobs), store, jobs)
    if not args.dry_run:
        from benchmarks.findings.report import write_report

        results |= write_report(made, store, max(args.seeds, store.seeds()), publish)
    if failed := results.get("failed"):
        first = next(iter(failed))
        raise SlimError(f"{len(failed)} steps failed, the first is {first}: {failed[first]}", fix="run again")
    return results


def _run(
    args: argparse.Namespace, steps: Sequence[Step], commands: Commands, store: Store, jobs: int
) -> dict[str, Any]:
    store.root.mkdir(parents=True, exist_ok=True)
    with sole_writer(store.root / "run"):
        speed = machine(store.root, commands.settings, jobs, say)
        driver = Driver(steps, commands, store, jobs=jobs, machine=speed, say=say)
        expected = driver.seconds()
        if args.dry_run:
            print("\n".join(listing(driver, steps)))
            return {"seconds_expected": expected, "done": len(driver.done)}
        say(f"{len(steps)} steps, {len(driver.done)} done, {jobs} at once: about {hours(expected)}")
        started = time.monotonic()
        driver.run()
        return {
            "seconds_expected": expected,
            "seconds": time.monotonic() - started,
            "done": len(driver.done),
            "failed": {name: str(error) for name, error in driver.failed.items()},
        }
