"""The saved checkpoints of a run, one after the other, and arguments that do nothing together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest

from megatron_slim.checkpoint.convert import Checkpoint, hf_to_torch_dist, open_checkpoint
from megatron_slim.evaluation.acceptance import Acceptance, measure_acceptance
from megatron_slim.evaluation.losses import FinalStates
from megatron_slim.evaluation.perplexity import evaluate_checkpoint
from megatron_slim.evaluation.teacher import Teacher
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.evaluation.test_perplexity import samples_for

SHAPE = tiny_shape(num_layers=2, layer_types=("linear_attention", "full_attention"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """As a run leaves it: two iterations of other weights, and a third that is not complete."""
    run = tmp_path / "run"
    for iteration in (10, 20):
        hf = write_tiny_checkpoint(tmp_path / f"hf{iteration}", SHAPE, seed=iteration)
        hf_to_torch_dist(hf, tmp_path / f"dist{iteration}")
        shutil.copytree(tmp_path / f"dist{iteration}" / "release", run / f"iter_{iteration:07d}")
    shutil.copytree(tmp_path / "dist10" / "hf", run / "hf")
    (run / "latest_checkpointed_iteration.txt").write_text("20")
    shutil.copytree(run / "iter_0000020", run / "iter_0000030")
    next((run / "iter_0000030").glob("*.distcp")).unlink()
    np.save(tmp_path / "x.npy", samples_for(SHAPE))
    return run


def test_every_complete_checkpoint_is_measured(
    run: Path, tool: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[str] = []
    measured = FinalStates.run

    def counted(self: FinalStates, description: str) -> None:
        passes.append(description)
        measured(self, description)

    monkeypatch.setattr(FinalStates, "run", counted)
    teacher = tmp_path / "hf20"
    arguments = ("--data", tmp_path / "x.npy", "--teacher", teacher, "--json")
    found = tool("tools/evaluate.py", "--load", run, "--every-checkpoint", *arguments)
    assert found.code == 0, found.stderr
    assert passes == ["evaluating the teacher"]  # one pass serves both
    assert f"{run / 'iter_0000030'}: left out, it is incomplete" in found.stderr
    (first, last) = found.json["checkpoints"]
    assert (first["iteration"], last["iteration"]) == (10, 20)
    assert first["kl"] > 0.01 and (last["kl"], last["top1_agreement"]) == (0.0, 1.0)
    for each in (first, last):
        load = tmp_path / f"hf{each['iteration']}"
        alone = evaluate_checkpoint(
            open_checkpoint(load), load, tmp_path / "x.npy", teacher=Teacher(open_checkpoint(teacher))
        )
        assert {**alone, "load": None} == {key: each[key] for key in alone} | {"load": None}
        assert f"{each['loss']:.4f}" in found.stdout and f"{each['kl']:.4f}" in found.stdout


def test_the_teachers_acceptance_is_measured_once(
    run: Path, tool: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its losses are compared, and as a student of its own measures it."""
    measured: list[Path] = []

    def counted(checkpoint: Checkpoint, *arguments: Any, **options: Any) -> Acceptance:
        measured.append(checkpoint.path)
        return measure_acceptance(checkpoint, *arguments, **options)

    monkeypatch.setattr("megatron_slim.evaluation.acceptance.measure_acceptance", counted)
    np.save(tmp_path / "prompts.npy", samples_for(SHAPE)[:2, :4])
    teacher = tmp_path / "hf20"
    arguments = ("--acceptance", tmp_path / "prompts.npy", "--max-new-tokens", 8, "--teacher", teacher, "--json")
    for data in ((), ("--data", tmp_path / "x.npy")):
        measured.clear()
        found = tool("tools/evaluate.py", "--load", run, "--every-checkpoint", *arguments, *data)
        assert found.code == 0, found.stderr
        assert measured == [run / "iter_0000010", teacher, run / "iter_0000020"]
        first, last = found.json["checkpoints"]
        assert first["teacher_acceptance"] == last["teacher_acceptance"] == last["acceptance"]
        table = found.stdout[: found.stdout.index("{")]
        assert "accepted" in table and f"{last['acceptance']['mean_accepted_length']:.3f}" in table


def test_what_does_nothing_together_is_refused(run: Path, tool: Callable[..., Any], tmp_path: Path) -> None:
    evaluate = ("tools/evaluate.py", "--load", run)
    data = ("--data", tmp_path / "x.npy")
    assert "nothing to evaluate on; give --data, --acceptance or --tasks" in tool(*evaluate).error
    assert "--teacher without --data" in tool(*evaluate, "--tasks", "mmlu", "--teacher", tmp_path).error
    assert "--record without --data" in tool(*evaluate, "--tasks", "mmlu", "--record").error
    assert "--limit without --tasks" in tool(*evaluate, *data, "--limit", 3).error
    assert "--teacher-hf-config without --teacher" in tool(*evaluate, *data, "--teacher-hf-config", run).error
    for flag in (["--num-prompts", 2], ["--draft-tokens", 5], ["--stop-at-eos"]):
        assert f"{flag[0]} without --acceptance" in tool(*evaluate, *data, *flag).error
    prompts = ("--acceptance", tmp_path / "x.npy")
    assert "--num-samples without --data" in tool(*evaluate, *prompts, "--num-samples", 2).error
    assert "--record is for one checkpoint" in tool(*evaluate, *data, "--record", "--every-checkpoint").error
    other = ("tools/evaluate.py", "--load", tmp_path / "dist10", "--every-checkpoint", *data)
    assert "has no complete iteration of a run" in tool(*other).error
