"""Run a tool in this process, as its command line would: starting Python and importing Megatron takes seconds."""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before torch is imported, and for all that tests start: the threads of OpenMP wait for one another in turns that
# spin, which costs several times what operations of a tiny model do.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is imported stays: looking for garbage among it takes a sixth of the time of the imports, and some in every test.
gc.disable()


def pytest_collection_finish() -> None:
    """All tests are imported."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)  # before those that ``-m "not slow"`` leaves out go
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with the mark ``one_case``, all cases after the first that is not slow are."""
    seen = set()
    for item in items:
        if item.get_closest_marker("one_case") and not item.get_closest_marker("slow"):
            test = item.nodeid.partition("[")[0]
            if test in seen:
                item.add_marker("slow")
            seen.add(test)


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout.splitlines()[-1])

    @property
    def error(self) -> str:
        """The one line that a user error is."""
        assert self.code == 2, (self.code, self.stderr)
        (line,) = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert self.stderr.splitlines()[-1] == line
        return line.removeprefix("error: ")


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers as the release of a torch_dist checkpoint; to be copied, not changed."""
    from megatron_slim.checkpoint.convert import hf_to_torch_dist
    from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

    root = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(root / "hf", tiny_shape(num_layers=2, layer_types=("linear_attention", "full_attention")))
    hf_to_torch_dist(root / "hf", root / "dist")
    return root / "dist" / "release"


@pytest.fixture(autouse=True)
def own_moe_metrics() -> Iterator[None]:
    """Megatron has one tracker of MoE losses for the process, of the size of the first model that it has seen."""
    yield
    if (module := sys.modules.get("megatron.core.transformer.moe.moe_logging")) is not None:
        module.get_moe_metrics_tracker().metrics.clear()


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``tool("tools/x.py", "--flag", value)``."""

    def run(script: str, *args: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
