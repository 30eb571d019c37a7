#!/usr/bin/env python3
"""Look at this machine, and at what a run will be given: what stands in its way, and what to do about it."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli import positive, run_tool, tool_parser
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
    from megatron_slim.doctor.preflight import preflight

    yield from machine()
    free = shutil.disk_usage(args.disk).free
    fix = "a checkpoint of the published teacher takes 163 GB, the demo less than 1 GB"
    yield good_or(NOTE, "disk", free >= 10 * GIB, f"{size(free)} free at {args.disk}", fix)
    without_mtp = {"checkpoint": args.without_mtp, "teacher": args.teacher_without_mtp}
    yield from preflight(args.data, args.checkpoint, args.teacher, args.save, nodes=args.nodes, without_mtp=without_mtp)


def diagnose(args: argparse.Namespace) -> dict[str, Any]:
    """Print all findings as they come.

    Raises:
        SlimError: ``--disk`` is no directory.
    """
    if not args.disk.is_dir():
        raise SlimError("no such directory", where=str(args.disk))
    findings = []
    for finding in look(args):
        findings.append(finding)
        print(finding.line(), flush=True)
    problems = [finding.name for finding in findings if finding.state == PROBLEM]
    return {"findings": [asdict(finding) for finding in findings], "problems": problems}


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("--disk", type=Path, default=Path("."), metavar="DIR", help="where outputs will go")
    run = parser.add_argument_group("what a run will be given, as pretrain_distill.sh is")
    run.add_argument("--data", nargs="+", default=[], metavar="PREFIX", help="DATA: prefixes, or weights and prefixes")
    run.add_argument("--checkpoint", type=Path, metavar="DIR", help="STUDENT, or the directory of a run")
    run.add_argument("--teacher", type=Path, metavar="DIR", help="TEACHER")
    run.add_argument("--save", type=Path, metavar="DIR", help="SAVE")
    run.add_argument("--without-mtp", action="store_true", help="as training will be given it")
    run.add_argument("--teacher-without-mtp", action="store_true", help="likewise")
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    run.add_argument("--nodes", type=positive, default=nodes, metavar="N", help="number of machines of the run")
    return parser.parse_args()


def main() -> None:
    """Run; exit code 1 when there are problems."""
    args = parse_args()
    problems: list[str] = []

    def run() -> dict[str, Any]:
        results = diagnose(args)
        problems.extend(results["problems"])
        return results

    run_tool(run, as_json=args.json)
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
