"""Check this machine, and the data, checkpoints and storage of a run: what is missing or wrong, and how to fix it."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_slim.aliases import JsonObject
from megatron_slim.cli.tool import run_command
from megatron_slim.command_line import positive
from megatron_slim.doctor.findings import GIB, NOTE, PROBLEM, Finding, good_or, size
from megatron_slim.doctor.packages import packages
from megatron_slim.errors import SlimError


def look(args: argparse.Namespace) -> Iterator[Finding]:
    """All findings; what needs torch only where there is one."""
    missing = False
    for finding in packages():
        missing = missing or (finding.state == PROBLEM and finding.name in ("torch", "packaging", "psutil", "numpy"))
        yield finding
    if missing:
        return
    from megatron_slim.doctor.machine import machine
    from megatron_slim.doctor.patches import patches
    from megatron_slim.doctor.preflight import preflight

    yield from machine()
    yield from patches(args.patches)
    free = shutil.disk_usage(args.disk).free
    fix = "a checkpoint of the published teacher takes 163 GB, the demo less than 1 GB"
    yield good_or(NOTE, "disk", free >= 10 * GIB, f"{size(free)} free at {args.disk}", fix)
    without_mtp = {"checkpoint": args.without_mtp, "teacher": args.teacher_without_mtp}
    yield from preflight(args.data, args.checkpoint, args.teacher, args.save, nodes=args.nodes, without_mtp=without_mtp)


def diagnose(args: argparse.Namespace) -> JsonObject:
    """Print all findings as they come.

    Raises:
        SlimError: ``--disk`` is not a directory.
    """
    if not args.disk.is_dir():
        raise SlimError("no such directory", where=str(args.disk))
    findings = []
    for finding in look(args):
        findings.append(finding)
        print(finding.line(), flush=True)
    problems = [finding.name for finding in findings if finding.state == PROBLEM]
    return {"findings": [asdict(finding) for finding in findings], "problems": problems}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--disk", type=Path, default=Path("."), metavar="DIR", help="check free space here")
    parser.add_argument("--patches", action="store_true", help="list what is changed in Megatron, and why")
    run = parser.add_argument_group("inputs and outputs of a run, as distill takes them")
    run.add_argument(
        "--data", nargs="+", action="extend", default=[], metavar="PREFIX", help="prefixes, or weights and prefixes"
    )
    run.add_argument("--checkpoint", type=Path, metavar="DIR", help="that of the student, or of a run")
    run.add_argument("--teacher", type=Path, metavar="DIR", help="checkpoint of the teacher")
    run.add_argument("--save", type=Path, metavar="DIR", help="directory of the run")
    run.add_argument("--without-mtp", action="store_true", help="train the student without its MTP block")
    run.add_argument("--teacher-without-mtp", action="store_true", help="use the teacher without its MTP block")
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    run.add_argument("--nodes", type=positive, default=nodes, metavar="N", help="number of machines of the run")


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command; exit code 1 when there are problems."""
    problems: list[str] = []

    def run(args: argparse.Namespace) -> JsonObject:
        results = diagnose(args)
        problems.extend(results["problems"])
        return results

    run_command(__doc__ or "", add_arguments, run, argv, prog)
    raise SystemExit(1 if problems else 0)
