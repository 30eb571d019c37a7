"""Run a test in a process of its own, where Transformer Engine seems to be installed (`tests/stubs`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUBS = ROOT / "tests" / "stubs"


def run_with_engine(module: str, function: str, *arguments: Path) -> None:
    """``function(*arguments)`` of a test module."""
    code = f"import sys; from pathlib import Path; from {module} import *; {function}(*map(Path, sys.argv[1:]))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(STUBS), str(ROOT)])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    found = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
