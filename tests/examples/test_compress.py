"""compress.sh: here, and as a chain of Slurm jobs (see slurm_stub.py)."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_slim.testing import reserved_port, tiny_shape, write_tiny_checkpoint, write_tokens

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/slimqwen/compress.sh"
RECIPE = """
version: 1
target: {num_layers: 4, num_moe_experts: 4}
calibrate: {num_samples: 4, seq_length: 16}
train: {tokens: 192, seq_length: 32, global_batch_size: 2, lr: 1e-3, min_lr: 1e-4, lr_warmup_iters: 1, eval_iters: 0,
        save_interval: 1, log_interval: 1, flags: [--no-teacher-check, --split, "1,0,0"]}
evaluate: {num_samples: 8}
"""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    write_tiny_checkpoint(tmp_path / "teacher", tiny_shape(num_layers=8, num_moe_experts=8, vocab_size=96), seed=1)
    write_tokens(tmp_path / "text", np.random.default_rng(0).integers(0, 96, (60, 33)))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = [str(tmp_path / "recipe.yaml"), "--teacher", str(tmp_path / "teacher"), "--save", str(tmp_path / "run")]
    return [*words, "--data", str(tmp_path / "text"), "--evaluation-data", str(tmp_path / "text")]


def script(environment: dict[str, str], *arguments: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.slow
def test_every_step_is_a_job_that_waits_for_the_one_before(
    slurm: dict[str, str], arguments: list[str], tmp_path: Path
) -> None:
    done = script(slurm | {"LAUNCHER": "slurm", "DRY_RUN": "1"}, *arguments, "--settings", "h100_64")
    assert done.returncode == 0, done.stderr
    jobs = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [job[1] for job in jobs if job[2] == "sbatch"] == [
        "STEP=teacher/evaluate",
        "STEP=phase-1/prune",
        "STEP=phase-1/show-plan",
        "STEP=phase-1/evaluate-pruned",
        "STEP=phase-1/export",
        "STEP=phase-1/evaluate",
    ]
    prune, train = jobs[1], jobs[4]
    assert prune[prune.index("--dependency") + 1] == "afterok:JOB-OF-teacher/evaluate"
    assert prune[-len(arguments) - 2 :] == [*arguments, "--settings", "h100_64"]
    assert train[1:3] == ["LAUNCHER=slurm", "DEPENDENCY=afterok:JOB-OF-phase-1/evaluate-pruned"]
    assert f"distill --teacher {tmp_path}/teacher" in train[5] and f"--recipe {tmp_path}/run/recipe.yaml" in train[5]
    assert not (tmp_path / "run").exists()


def test_all_jobs_are_submitted_before_one_has_run(slurm: dict[str, str], arguments: list[str], tmp_path: Path) -> None:
    more = (*arguments, "--settings=h100_64")
    done = script(slurm | {"LAUNCHER": "slurm", "STUB_HOLDS": "1"}, *more)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines() if "job 4242" in line] == [
        "teacher/evaluate",
        "phase-1/prune",
        "phase-1/show-plan",
        "phase-1/evaluate-pruned",
        "phase-1/train",
        "phase-1/export",
        "phase-1/evaluate",
    ]
    sizes = [json.loads(line)["--nodes"] for line in (tmp_path / "slurm/held").read_text().splitlines()]
    assert sizes == ["1", "1", "1", "1", "8", "1", "1"]
    # Settings of a cluster ask for GPUs, wherever jobs are submitted.
    gpus = [json.loads(line).get("--gpus-per-node") for line in (tmp_path / "slurm/held").read_text().splitlines()]
    assert gpus == ["1", "1", "1", "1", "8", "1", "1"]
    recipe = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert recipe["train"]["settings"] == "h100_64" and recipe["train"]["tokens"] == 192
    state = json.loads((tmp_path / "run/run.json").read_text())
    assert {(step["state"], step["attempts"]) for step in state["steps"]} == {("waiting", 0)}
    # Each but the first is ended by Slurm where the one before has failed.
    jobs = [json.loads(line) for line in (tmp_path / "slurm/held").read_text().splitlines()]
    assert [job.get("--kill-on-invalid-dep") for job in jobs] == [None, *["yes"] * 6]


def test_no_job_is_submitted_twice(slurm: dict[str, str], arguments: list[str], tmp_path: Path) -> None:
    held, recipe = tmp_path / "slurm/held", tmp_path / "run/recipe.yaml"
    queue = slurm | {"LAUNCHER": "slurm", "STUB_HOLDS": "1"}
    done = script(queue | {"STUB_CLUSTER": " on cluster blue"}, *arguments)
    assert done.returncode == 0 and "phase-1/export: job 4242, afterok:4242" in done.stdout
    before = held.read_text(), recipe.read_text()
    for more, message in (
        ({}, "jobs of this run are in the queue: 4242"),
        ({"STUB_NO_CONTROLLER": "1"}, "squeue does not say whether jobs of this run are left: slurm_load_jobs error: "),
    ):
        again = script(queue | more, *arguments, "--set", "train.tokens=128")
        assert again.returncode == 2 and not again.stdout
        assert again.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/run/logs/jobs.txt: {message}")
        assert (held.read_text(), recipe.read_text()) == before
    held.unlink()  # scancel
    again = script(queue, *arguments)
    assert again.returncode == 0 and held.read_text() == before[0]


def test_what_is_missing_is_said_at_once(slurm: dict[str, str], arguments: list[str]) -> None:
    done = script(slurm | {"LAUNCHER": "slurm"}, *arguments, "--set", "train.tokens=0")
    assert done.returncode == 2 and "train.tokens 0 is not a number of tokens" in done.stderr
    done = script(slurm | {"LAUNCHER": "slurm", "SLURM_JOB_ID": "7", "DRY_RUN": "1"}, *arguments)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: LAUNCHER=slurm within job 7: submit from outside")


@pytest.mark.slow
def test_a_chain_of_jobs(slurm: dict[str, str], arguments: list[str], tmp_path: Path) -> None:
    with reserved_port() as port:
        more = [*arguments, "--master-port", str(port), "--nnodes", "1"]
        done = script(slurm | {"LAUNCHER": "slurm"}, *more, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = done.stdout.splitlines()
        assert lines[0] == "teacher/evaluate: job 4242"
        assert lines[-1] == "phase-1/evaluate: job 4242, afterok:4242"
        results = json.loads((tmp_path / "run/results/phase-1-evaluate.json").read_text())
        assert 0 < results["loss"] < 6
        again = script(slurm | {"LAUNCHER": "slurm"}, *more)
        assert again.stdout.splitlines() == ["everything is done"]
        here = script(slurm, *more)
    assert here.returncode == 0 and here.stderr.count("done before") == 7
