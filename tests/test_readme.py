"""The README's commands, run as they stand but for the number of distillation steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slim.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_recipe_is_one() -> None:
    import yaml

    (recipe,) = blocks("yaml")
    assert parse_recipe(yaml.safe_load(recipe)).target.num_layers == 36


def test_every_path_exists() -> None:
    for path in re.findall(r"(?:tools|examples)/[\w/.-]+\.(?:py|sh|yaml|json)", README):
        assert (ROOT / path).is_file(), path


@pytest.mark.slow
def test_step_by_step(tmp_path: Path) -> None:
    """From data to an evaluated student; the environment is the one that runs this test."""
    script = "set -euo pipefail\n" + "".join(block for block in blocks("bash") if "make venv" not in block)
    # The teacher keeps its sixty steps: with two it would be refused as no better than guessing.
    script = script.replace("TRAIN_ITERS=30", "TRAIN_ITERS=2").replace("runs/steps", str(tmp_path))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", f"mkdir -p {tmp_path}\n{script}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = re.findall(r'"loss": ([\d.]+)', done.stdout)
    assert len(losses) == 3 and all(0 < float(loss) < 9 for loss in losses)
    assert (tmp_path / "student" / "config.json").is_file()
