#!/usr/bin/env python3
"""Pin what pyproject.toml allows, with hashes, for the images: `make lock`, which needs uv and a package index.

base.txt is what every image gets; image.txt what NVIDIA's image has already, built to fit together, and the CPU image
gets; dev.txt and gpu.txt what these extras add. Transformer Engine and apex come with NVIDIA's image alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.doctor.packages import PACKAGE, declared
from megatron_slim.extras import EXTRAS

HERE = Path(__file__).resolve().parent
OWN = re.compile(r"(torch|triton|numpy|setuptools|nvidia-.*|cuda-.*)==")  # of NVIDIA's image
NOT_LOCKED = ("transformer-engine", "lm-eval", "accelerate")  # tasks are for a machine of their own
COMMAND = "uv pip compile - --no-config --generate-hashes --no-annotate --no-header --python-version 3.12".split()
PLATFORM = ["--python-platform", "x86_64-manylinux_2_28"]  # hashes are those of all files of a version
HEADER = "# Made by requirements/lock.py from pyproject.toml; {what}.\n"


def resolve(wanted: list[str], constraints: Path | None = None) -> list[str]:
    """Pinned requirements, each with the lines of its hashes."""
    command = [*COMMAND, *PLATFORM, *(["--constraint", str(constraints)] if constraints else [])]
    lines = "\n".join(line for line in wanted if not line.startswith(NOT_LOCKED))
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: uv: {done.stderr.strip().splitlines()[-1]}")
    return re.findall(r"^\S.*(?:\n    --hash=.*)*", done.stdout, re.MULTILINE)


def write(name: str, what: str, pins: list[str]) -> None:
    """Put a list of pins into a file."""
    (HERE / name).write_text(HEADER.format(what=what) + "".join(f"{pin}\n" for pin in pins), encoding="utf-8")


def main() -> None:
    """Write the four files."""
    wanted = declared()
    wanted[""] += [line for extra in EXTRAS for line in wanted[extra]]  # an image can do everything but tasks
    wanted["dev"] = [line for line in wanted["dev"] if not line.startswith(PACKAGE)]
    common = resolve(wanted[""])
    write("image.txt", "what NVIDIA's image has", [pin for pin in common if OWN.match(pin)])
    base = [pin for pin in common if not OWN.match(pin)]
    write("base.txt", "what every image gets", base)
    pinned = HERE / ".constraints.txt"
    pinned.write_text("".join(f"{pin.split()[0]}\n" for pin in common), encoding="utf-8")
    try:
        for extra in ("dev", "gpu"):
            added = [pin for pin in resolve(wanted[""] + wanted[extra], pinned) if pin not in common]
            write(f"{extra}.txt", f"what the extra '{extra}' adds", [pin for pin in added if not OWN.match(pin)])
    finally:
        pinned.unlink()


if __name__ == "__main__":
    try:
        main()
    except FileNotFoundError:
        sys.exit("error: no uv here; pip install uv")
