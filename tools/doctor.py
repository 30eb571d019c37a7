#!/usr/bin/env python3
"""Look at this machine: what is installed, what is missing, and what to do about it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli import run_tool, tool_parser
from megatron_slim.errors import SlimError

REQUIRED = {"torch": "2.13", "megatron-core": "0.19.2", "transformers": "5.", "safetensors": "0.8", "psutil": ""}
GPU_ONLY = {"flash-linear-attention": "fla", "transformer-engine": "transformer_engine", "apex": "apex"}
OK, NOTE, PROBLEM = "ok", "note", "problem"
SYMBOLS = {OK: "  ok     ", NOTE: "  note   ", PROBLEM: "  PROBLEM"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        state: `OK`, `NOTE` (works, but know it) or `PROBLEM`.
        found: version, size or condition.
        fix: what to do, "" where nothing is needed.
    """

    name: str
    state: str
    found: str
    fix: str = ""


def packages() -> Iterator[Finding]:
    """Python and the packages that every machine needs."""
    version = platform.python_version()
    good = sys.version_info >= (3, 12)
    yield Finding("python", OK if good else PROBLEM, version, "" if good else "megatron-core 0.19.2 needs 3.12")
    for name, wanted in REQUIRED.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, PROBLEM, "not installed", "make venv, or pip install -e .")
            continue
        tested = found.startswith(wanted)
        yield Finding(name, OK if tested else NOTE, found, "" if tested else f"tested with {wanted}*: pip install -e .")


def kernels(cuda: bool) -> Iterator[Finding]:
    """The packages that belong on a GPU machine, and only there."""
    for name, module in GPU_ONLY.items():
        present = importlib.util.find_spec(module) is not None
        if cuda and not present:
            fix = "use NVIDIA's image" if name == "apex" else "pip install -e '.[gpu]'"
            yield Finding(name, NOTE, "not installed: slower layers are used", fix)
        elif not cuda and present and module == "fla":
            fix = "pip uninstall flash-linear-attention fla-core"
            yield Finding(name, PROBLEM, "installed without a GPU: transformers' Qwen3-Next crashes on it", fix)
        else:
            yield Finding(name, OK, "installed" if present else "not installed, not needed without a GPU")


def machine(where: Path) -> Iterator[Finding]:
    """Devices, communication, memory and disk."""
    import psutil
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        yield Finding("device", OK, f"{torch.cuda.device_count()} x CUDA: {names}")
    else:
        fix = (
            ""
            if shutil.which("nvidia-smi") is None
            else "there is a driver: check CUDA_VISIBLE_DEVICES and its version"
        )
        yield Finding("device", PROBLEM if fix else NOTE, f"CPU, {psutil.cpu_count()} cores", fix)
    seam = (
        "not used: CUDA is there" if cuda else "in use: Megatron-Core runs on the CPU, its tensors said to be on CUDA"
    )
    yield Finding("cpu seam", OK, seam)
    backend, available = ("nccl", torch.distributed.is_nccl_available()) if cuda else ("gloo", _gloo_available())
    fix = "" if available else f"install a torch with {backend}"
    yield Finding(backend, OK if available else PROBLEM, "available" if available else "not in this torch", fix)
    yield from kernels(cuda)
    memory = psutil.virtual_memory()
    yield Finding("memory", OK, f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB free")
    disk = shutil.disk_usage(where)
    low = disk.free < 10 * 2**30
    fix = "a checkpoint of the published teacher takes 163 GB, the demo less than 1 GB" if low else ""
    yield Finding("disk", NOTE if low else OK, f"{disk.free / 2**30:.0f} GiB free at {where}", fix)


def _gloo_available() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_gloo_available()


def diagnose(where: Path) -> dict[str, Any]:
    """Collect all findings and print them.

    Raises:
        SlimError: ``where`` is no directory.
    """
    if not where.is_dir():
        raise SlimError("no such directory", where=str(where))
    findings = list(packages())
    if not any(finding.name == "torch" and finding.state == PROBLEM for finding in findings):
        findings += machine(where)
    for finding in findings:
        print(
            f"{SYMBOLS[finding.state]} {finding.name:24}{finding.found}"
            + (f"  ->  {finding.fix}" if finding.fix else "")
        )
    problems = [finding.name for finding in findings if finding.state == PROBLEM]
    return {"findings": [asdict(finding) for finding in findings], "problems": problems}


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("--disk", type=Path, default=Path("."), metavar="DIR", help="where outputs will go")
    return parser.parse_args()


def main() -> None:
    """Run; exit code 1 when there are problems."""
    args = parse_args()
    problems: list[str] = []

    def run() -> dict[str, Any]:
        results = diagnose(args.disk)
        problems.extend(results["problems"])
        return results

    run_tool(run, as_json=args.json)
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
