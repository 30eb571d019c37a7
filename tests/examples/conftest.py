"""A machine with Slurm's commands, for the tests of the scripts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

STUB = Path(__file__).with_name("slurm_stub.py")


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with Slurm's commands."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sbatch", "squeue", "srun", "scontrol"):
        (commands / name).write_text(f"#!{sys.executable}\n{STUB.read_text()}")
        (commands / name).chmod(0o755)
    state = tmp_path / "slurm"
    state.mkdir()
    clean = {key: value for key, value in os.environ.items() if key in ("HOME", "LANG", "TMPDIR")}
    path = f"{commands}:{os.environ['PATH']}"
    return clean | {"PATH": path, "PYTHON": sys.executable, "SLURM_STUB": str(state), "OMP_NUM_THREADS": "1"}
