"""The GPU acceptance kit: its dry run on a CPU executes the code that a GPU will."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks import kd_step
from benchmarks.gpu import memory, run_all, training_runs
from benchmarks.gpu.parts import FAILED, MISSING, NOT_RUN, PARTS, PASSED, Check, Found, Outcome
from benchmarks.gpu.tables import BEGIN, END, write_tables
from megatron_slim.architecture.table import count_parameters
from megatron_slim.errors import SlimError
from megatron_slim.planning.layouts import Settings
from megatron_slim.training.missing_libraries import HAVE_TE, library_violations

Tool = Callable[..., Any]
SCRIPT = "benchmarks/gpu/run_all.py"


def states(results: dict[str, Any]) -> dict[str, str]:
    return {name: part["state"] for name, part in results["parts"].items()}


@pytest.mark.slow
def test_dry_run(tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that passes, one that cannot run here, and one whose process dies; the first is not stopped by that."""
    stub = tmp_path / "stubs" / "liger_kernel"
    (stub / "chunked_loss").mkdir(parents=True)
    (stub / "__init__.py").write_text("import os\nprint('about to die', flush=True)\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(stub.parent))
    out = tmp_path / "tables.md"
    outcome = tool(
        SCRIPT, "--device", "cpu", "--only", "calibration,liger,fla", "--dir", tmp_path / "run", "--out", out, "--json"
    )
    assert outcome.code == 1, outcome.stderr
    results = outcome.json
    expected = {"machine": PASSED, "fla": NOT_RUN, "calibration": PASSED, "liger": FAILED}
    assert states(results) == expected and results["failed"] == ["liger"]
    assert "exit code -6: about to die; see " in results["parts"]["liger"]["why"]
    measured = json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert measured["checks"] == results["parts"]["calibration"]["checks"] and measured["seconds"] > 1
    text = out.read_text()
    assert text.startswith(BEGIN) and text.rstrip().endswith(END) and "tiny sizes" in text
    assert "| `liger` | **failed** |" in text and "its kernels need a GPU" in text
    assert not [path for path in (tmp_path / "run").iterdir() if path.suffix not in (".json", ".log")]


@pytest.mark.slow
def test_every_part_that_can_run_on_a_cpu_does(tool: Tool, tmp_path: Path) -> None:
    outcome = tool(SCRIPT, "--device", "cpu", "--dir", tmp_path, "--json")
    assert outcome.code == 0, outcome.stderr
    found = states(outcome.json)
    assert found.keys() == PARTS.keys()
    assert {name for name, state in found.items() if state == NOT_RUN} == {"fla", "te", "fp8"}
    assert {name for name, state in found.items() if state == MISSING} <= {"liger"}


def test_an_unknown_part_is_refused(tool: Tool) -> None:
    assert "no part 'speed'; there are machine, kd_loss, " in tool(SCRIPT, "--only", "parity,speed").error


def test_a_gpu_that_is_not_there_is_refused(tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = tool(SCRIPT, "--device", "cuda", "--only", "machine", "--dir", tmp_path)
    assert found.code == 2 and found.stderr.splitlines()[-1].startswith("error: --device cuda: no GPU; leave it out")


def test_a_part_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    command = ["bash", "-c", "sleep 60 & echo $!; wait"]  # quick to start, also where much else runs
    log, started = tmp_path / "log", time.monotonic()
    found = run_all.run_in_process(command, tmp_path / "outcome", log, 3.0, dict(os.environ))
    assert found.state == FAILED and found.why.startswith("not done after 3 s") and time.monotonic() - started < 30
    child = int(log.read_text())
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - started < 30
        time.sleep(0.05)


def test_parts_for_which_no_time_is_left_are_not_run(tmp_path: Path) -> None:
    args = run_all.parse_args(["--only", "machine", "--dir", str(tmp_path), "--total-seconds", "1"])
    assert run_all.Kit(args)._part("kd_loss", "cpu").state == NOT_RUN


def test_a_missed_limit_fails_a_part_and_only_that() -> None:
    ok, not_judged = Check.at_most("ms", 39.0, 40), Check.at_most("ms", 60.0, 40, judged=False)
    assert Outcome.of(Found([ok, not_judged, Check("s", 1.0)])).state == PASSED
    missed = Outcome.of(Found([Check.at_least("times", 1.2, 1.5)]))
    assert missed.state == FAILED and missed.why == "times is 1.2, not >= 1.5"
    assert Outcome.of(Found([Check.at_most("nats", math.nan, 1.0)])).state == FAILED


def test_tables_go_between_the_marks_and_nowhere_else(tmp_path: Path) -> None:
    file = tmp_path / "gpu.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_tables(file, "new")
    assert file.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    file.write_text("no marks\n")
    with pytest.raises(SlimError, match="has no lines"):
        write_tables(file, "new")
    assert file.read_text() == "no marks\n"


def test_the_page_for_results_has_the_marks() -> None:
    text = run_all.TABLES.read_text()
    assert 0 < text.index(BEGIN) < text.index(END)


def test_differences_of_runs() -> None:
    one = {term: [1.0, 2.0] for term in training_runs.TERMS}
    other = {**one, "grad-norm": [1.0, 2.2]}
    assert training_runs.worst(other, one) == pytest.approx(0.1)
    assert training_runs.worst(other, one, training_runs.LOSSES) == 0.0
    assert training_runs.worst(other, one, training_runs.GRADIENT, steps=1) == 0.0
    assert training_runs.worst({**one, "lm loss": [math.nan, 2.0]}, one) == math.inf


def test_static_bytes_are_the_planners() -> None:
    """Of a parameter 2 + 4 + 4 + 4 + 4 bytes, 2 of the teacher's; embedding and output layer padded by 80 rows."""
    models = kd_step.shapes("eighth")
    extra = {"teacher": 2 * 80 * 256, "student": 2 * 80 * 192}
    counts = {name: count_parameters(shape).total + extra[name] for name, shape in models.items()}
    plan = memory.planned(models["teacher"], models["student"], Settings(1024, 2), micro_batch=2)
    assert plan.static == 18 * counts["student"] + 2 * counts["teacher"]
    report = "[Rank 0] (after 2 iterations) memory (MB) | allocated: 1.50 | max allocated: 3.00 | reserved: 4.00"
    assert memory.last_report(f"x\n{report}\ny") == (1.5 * 2**20, 3 * 2**20)


def test_published_widths_for_a_gpu() -> None:
    models = kd_step.shapes("published")
    assert {shape.vocab_size for shape in models.values()} == {151936}
    assert (models["teacher"].hidden_size, models["student"].hidden_size) == (2048, 1536)
    assert kd_step.floor(models["teacher"], models["student"], 4096)["flop_floor"] > 1.3


def test_hidden_libraries_are_not_importable(tmp_path: Path) -> None:
    package = tmp_path / "fla"
    package.mkdir()
    (package / "__init__.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text(
        "import importlib.util, sys\n"
        "print(importlib.util.find_spec('fla') is not None, sys.argv[1:])\n"
        "try:\n    import fla\nexcept ImportError:\n    print('no fla')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def run(names: str) -> str:
        command = [sys.executable, run_all.ROOT / "benchmarks/gpu/hide.py", names, script, "--flag"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert run("") == "True ['--flag']\n"
    assert run("fla,te") == "False ['--flag']\nno fla\n"


@pytest.mark.skipif(HAVE_TE, reason="Transformer Engine is installed")
def test_arguments_that_need_transformer_engine() -> None:
    args = SimpleNamespace(transformer_impl="local", moe_grouped_gemm=False, async_save=False)
    assert library_violations(args) == []
    args.moe_grouped_gemm, args.transformer_impl = True, "transformer_engine"
    (found,) = library_violations(args)
    assert found.startswith("--transformer-impl, --moe-grouped-gemm need Transformer Engine, which is not installed")
