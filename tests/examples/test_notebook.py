"""The notebook runs from its first cell to its last, in order, and shows what its text describes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "prune_a_checkpoint.ipynb"
# Of IPython only what shows a picture; the cells are Python.
DISPLAY = """
import sys, types
shown = []
class Image:
    def __init__(self, data):
        self.data = data
module = types.ModuleType("IPython.display")
module.Image, module.display = Image, shown.append
package = types.ModuleType("IPython")
package.version_info = (9, 0)  # what matplotlib looks at
sys.modules["IPython"], sys.modules["IPython.display"] = package, module
"""
CHECKS = """
assert [image.data[:4] for image in shown] == [b"\\x89PNG"] * 2
assert written["verified"] and plan.target_shape.num_layers == 4
print("all cells ran")
"""


@pytest.fixture(scope="module")
def cells() -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return found


@pytest.mark.slow
def test_every_cell_runs(cells: list[dict[str, object]], tmp_path: Path) -> None:
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]  # type: ignore[arg-type]
    script = "\n".join([DISPLAY, *code, CHECKS])
    environment = {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all cells ran\n") and "Traceback" not in done.stderr
    assert done.stderr.startswith("calibrating on 16 samples of 32 tokens\n")


def test_outputs_are_there_to_read(cells: list[dict[str, object]]) -> None:
    """Whoever opens the page sees tables and pictures without running anything."""
    text = json.dumps(cells)
    assert "image/png" in text and "Traceback" not in text and "/work" not in text and "/home" not in text
