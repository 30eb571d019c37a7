"""The findings with a tiny teacher: real commands, a kill in their midst, and the comparison with plain commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def start(*flags: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "benchmarks.findings", "--trial", *map(str, flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*flags: object) -> dict[str, Any]:
    process = start(*flags, "--json")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def results(folder: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    """By step: when it was written, and what it says."""
    paths = folder.glob("*/*/result.json")
    return {path.parents[1].name: (path.stat().st_mtime_ns, json.loads(path.read_text())) for path in paths}


def test_killed_and_continued(tmp_path: Path) -> None:
    folder = tmp_path / "findings"
    flags = ("--dir", folder, "--only", "f", "--seeds", 1, "--jobs", 2)
    process = start(*flags)
    deadline = time.monotonic() + 300
    while len(results(folder)) < 4:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE], "processes outlive the driver"
    before = results(folder)
    found = run(*flags)
    after = results(folder)
    assert found["done"] == found["steps"] == len(after) and found["cells_done"] == 2
    assert {name: after[name] for name in before} == before
    uniform = after["cell.experts_partial_preservation_soft_logits.1"][1]["metrics"]
    by_loss = after["cell.experts_by_loss.1"][1]["metrics"]
    assert uniform.keys() == by_loss.keys() >= {"loss", "kl", "mtp_loss", "acc_0", "acc_4", "mean_accepted_length"}
    assert uniform["loss"] != by_loss["loss"] and uniform["teacher_loss"] == by_loss["teacher_loss"]
    experts = after["experts.base"][1]["metrics"]
    assert 0 < experts["expert_p_value"] <= 1 and experts["expert_information"] >= 0
    assert not list(folder.glob("cell.*/*/work")), "checkpoints of cells are kept"
    page = Path(found["page"]).read_text()
    assert "by loss" in page and "data:image/png" in page
    again = run(*flags)
    assert again["seconds"] < 5 and results(folder) == after


def test_two_phases_elastic_budgets_and_losses_without_a_flag(tmp_path: Path) -> None:
    folder = tmp_path / "findings"
    found = run("--dir", folder, "--only", "c,d,h", "--seeds", 1, "--jobs", 2)
    assert found["done"] == found["steps"]
    metrics = {name: each[1]["metrics"] for name, each in results(folder).items()}
    elastic = metrics["cell.elastic.1"]
    assert {key.partition("/")[0] for key in elastic} == {"large", "middle", "small"}
    kd, mtp_lm = metrics["cell.pruned_kd_mtp_kd.1"], metrics["cell.pruned_kd_mtp_lm.1"]
    assert kd["mtp_loss"] != mtp_lm["mtp_loss"]
    assert metrics["cell.joint_carried.1"]["loss"] != metrics["cell.joint_reset.1"]["loss"]


def test_a_cell_and_the_commands_give_the_same_student(tool: Any, tmp_path: Path) -> None:
    done = tool(
        "benchmarks/findings_cell.py", "--trial", "--dir", tmp_path, "--steps", 3, "--teacher-steps", 4,
        "--repeats", 1, "--jobs", 1, "--json",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    found = done.json
    assert 0 < found["cell_over_commands"] < 1
    assert found["loss"]["cell"] == pytest.approx(found["loss"]["commands"], rel=1e-5)
