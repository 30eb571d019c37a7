#!/usr/bin/env python3
"""Check on this machine all that needs a GPU to be checked, part by part, and write the tables of docs/gpu.md.

Every part runs in a process of its own with a time limit, so that one that crashes, hangs or runs out of memory stops
no other. Without a GPU the same code runs on the CPU at tiny sizes. Exit code 1 when a part failed; what is missing on
this machine, or cannot be run on it, is not a failure. See benchmarks/gpu/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.parts import FAILED, NOT_RUN, PARTS, PASSED, Outcome
from benchmarks.gpu.tables import markdown, summary, write_tables
from megatron_slim.cli.terminal import say
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser
from megatron_slim.errors import SlimError, one_line
from megatron_slim.files import read_json, to_json

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "docs" / "gpu.md"
LEAST_SECONDS = 20.0  # a part that would get less than this is not started


def names(text: str) -> list[str]:
    """An argparse type: parts, in the order in which they run."""
    given = text.split(",")
    if unknown := [name for name in given if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return [name for name in PARTS if name in given or name == "machine"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--only", type=names, default=list(PARTS), metavar="PART,PART", help=f"of {', '.join(PARTS)}; default: all"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on a GPU too; nothing is judged by speed")
    parser.add_argument("--dir", type=Path, default=Path("runs/gpu"), help="a JSON file and a log of every part")
    parser.add_argument("--out", type=Path, help=f"where tables go; default: {TABLES.relative_to(ROOT)} on a GPU")
    parser.add_argument("--part-seconds", type=positive, default=480, help="after which a part is ended")
    parser.add_argument("--total-seconds", type=positive, help="after which no part is started or continues")
    return parser.parse_args(argv)


def run_in_process(
    command: list[str], outcome: Path, log: Path, seconds: float, environment: dict[str, str]
) -> Outcome:
    """Run a part's process to its end, at most so long.

    Args:
        command: the process.
        outcome: the file that it writes when it has come to its end.
        log: gets what it prints.
        seconds: after which it is killed, with its children.
        environment: of the process.
    """
    started, timed_out = time.monotonic(), False
    outcome.unlink(missing_ok=True)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # ranks die with their launcher
            process.wait()
    took = time.monotonic() - started
    if timed_out:
        return Outcome(FAILED, f"not done after {seconds:.0f} s; see {log}", took)
    if process.returncode or not outcome.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing printed"]
        return Outcome(FAILED, f"exit code {process.returncode}: {one_line(lines[-1])[:300]}; see {log}", took)
    found = Outcome(**json.loads(outcome.read_text(encoding="utf-8")))
    found.seconds = took
    return found


class Kit:
    """One run over all parts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.monotonic()
        self.outcomes: dict[str, Outcome] = {}
        # What tests set, and what the CPU compatibility layer sets in this process, is not for parts.
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.environment = os.environ | {"PYTHONPATH": path}
        self.environment.pop("TORCHDYNAMO_DISABLE", None)
        # NVIDIA's images turn TF32 on for products in fp32, which keeps 10 bits of 23.
        self.environment |= {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0", "NVIDIA_TF32_OVERRIDE": "0"}
        self.environment["HF_HUB_OFFLINE"] = "1"
        if args.device == "cpu":
            self.environment["CUDA_VISIBLE_DEVICES"] = ""
        args.dir.mkdir(parents=True, exist_ok=True)

    def run(self) -> dict[str, Outcome]:
        """Run all that was asked for; the machine comes first and says how."""
        device = "cpu" if self.args.device == "cpu" else "cuda"
        for name in self.args.only:
            say(f"{name}: {PARTS[name].title}")
            self.outcomes[name] = self._part(name, device)
            if name == "machine":
                device = self._device(self.outcomes[name])
            self.outcomes[name].device = self.name
            (self.args.dir / f"{name}.json").write_text(to_json(plain(asdict(self.outcomes[name]))), encoding="utf-8")
            say(summary({name: self.outcomes[name]}))
        return self.outcomes

    @property
    def name(self) -> str:
        """The device; another name for tiny sizes."""
        machine = self.outcomes["machine"].details
        tiny = self.args.quick or not machine["gpus"]
        return f"{machine['device']}{', tiny sizes' if tiny else ''}"

    def known(self) -> dict[str, Outcome]:
        """These outcomes, and those of earlier runs on such a device in the same directory."""
        found = {}
        for name in PARTS:
            file = self.args.dir / f"{name}.json"
            if name in self.outcomes:
                found[name] = self.outcomes[name]
            elif file.exists() and (earlier := Outcome(**read_json(file))).device == self.name:
                found[name] = earlier
        return found

    def _device(self, machine: Outcome) -> str:
        """The device on which parts run, now that it is known what there is."""
        if machine.state != PASSED:
            raise SlimError(f"python does not get as far as saying what this machine has: {machine.why}")
        if machine.details["gpus"]:
            return "cuda"
        if self.args.device == "cuda":
            raise SlimError("no GPU", where="--device cuda", fix="leave it out for a dry run on the CPU")
        return "cpu"

    def _part(self, name: str, device: str) -> Outcome:
        seconds = float(self.args.part_seconds)
        if self.args.total_seconds is not None:
            seconds = min(seconds, self.args.total_seconds - (time.monotonic() - self.started))
            if seconds < LEAST_SECONDS:
                return Outcome(NOT_RUN, f"no time left of --total-seconds {self.args.total_seconds}")
        work, outcome = self.args.dir / f"{name}.work", self.args.dir / f"{name}.outcome"
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
        facts = self.outcomes["machine"].details if name != "machine" else {"gpus": 0, "device": "CPU"}
        command = [sys.executable, str(ROOT / "benchmarks/gpu/one_part.py"), name, "--device", device]
        command += ["--gpus", str(facts["gpus"]), "--device-name", str(facts["device"])]
        command += ["--work", str(work), "--outcome", str(outcome), *(["--quick"] if self.args.quick else [])]
        try:
            return run_in_process(command, outcome, self.args.dir / f"{name}.log", seconds, self.environment)
        finally:
            outcome.unlink(missing_ok=True)
            shutil.rmtree(work, ignore_errors=True)


def plain(value: Any) -> Any:
    """The same with words for numbers that JSON has not."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value if not isinstance(value, float) or abs(value) < float("inf") else str(value)


def accept(args: argparse.Namespace) -> dict[str, Any]:
    """Run the kit and write its tables."""
    kit = Kit(args)
    outcomes = kit.run()
    cuda = bool(outcomes["machine"].details["gpus"])
    out = args.out or (TABLES if cuda and not args.quick else None)
    if out is not None:
        write_tables(out, markdown(kit.known(), quick=args.quick or not cuda))
    if not args.json:
        print(summary(outcomes))
        print(f"tables: {out}" if out is not None else "tables are written of a GPU, or with --out")
    failed = [name for name, outcome in outcomes.items() if outcome.state == FAILED]
    return {"failed": failed, "parts": {name: plain(asdict(outcome)) for name, outcome in outcomes.items()}}


def main() -> None:
    """Run; exit code 1 when a part failed."""
    args, failed = parse_args(), list[str]()

    def run() -> dict[str, Any]:
        results = accept(args)
        failed.extend(results["failed"])
        return results

    run_tool(run, as_json=args.json)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
