"""Moments that a pruning carries: the next phase goes on with the optimizer of the one before, in any layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slim import device

device.install()

from megatron_slim.checkpoint.convert import open_checkpoint  # noqa: E402
from megatron_slim.pruning.fingerprint import fingerprint  # noqa: E402
from megatron_slim.pruning.statistics import FORMAT, Statistics, expected_shapes  # noqa: E402
from megatron_slim.testing import run_distributed  # noqa: E402
from megatron_slim.training.run_figures import KD, LM, MTP_LM  # noqa: E402
from tests.training.conftest import Workplace, refusal  # noqa: E402
from tests.training.test_progressive import TOKENS, write_plan  # noqa: E402

SCHEDULE = (3 * TOKENS, 2 * TOKENS)
RUN = "--micro-batch-size 2 --lr-warmup-iters 1 --save-interval 1".split()
# Adam makes much of rounding where a gradient is nearly zero.
CALM = "--lr 1e-4 --min-lr 1e-5 --adam-eps 1e-3".split()
BF16 = ("--bf16",)
CARRIED = "moments were carried, after 3 steps"


def write_stats(source: Path, file: Path) -> Path:
    """Statistics drawn at random."""
    checkpoint, rng = open_checkpoint(source), np.random.default_rng(5)
    tensors = {key: np.asarray(rng.random(size), dtype=np.float32) for key, size in expected_shapes(checkpoint.shape)}
    Statistics(tensors, {"format": FORMAT, "source_sha256": fingerprint(checkpoint)}).save(file)
    return file


def write_recipe(file: Path, target: dict[str, int], **experts: Any) -> Path:
    phases = [
        {"tokens": SCHEDULE[0], "target": {"num_layers": 4}},
        {"tokens": SCHEDULE[1], "target": target, "experts": experts},
    ]
    file.write_text(json.dumps({"version": 1, "phases": phases}))
    return file


def phase_flags(root: Path, student: Path, run: str) -> tuple[str, ...]:
    place = str(root / run)
    return (*RUN, "--progressive-schedule", "--pretrained-checkpoint", str(student), "--load", place, "--save", place)


@pytest.fixture
def first_phase(workplace: Workplace, tmp_path: Path) -> Callable[..., Path]:
    """Trains the first phase: ``first_phase(name, ranks, *flags)`` gives its checkpoint."""

    def train(name: str, ranks: int, *flags: str) -> Path:
        student = tmp_path / f"{name}-student"
        shutil.copytree(workplace.student, student)
        write_plan(student, number=1, count=2, tokens=SCHEDULE[0], schedule=list(SCHEDULE))
        workplace.train(name, ranks, *phase_flags(tmp_path, student, name), *flags)
        return tmp_path / name

    return train


@pytest.fixture
def prune(tool: Any, tmp_path: Path) -> Callable[..., Path]:
    """Prunes it: ``prune(run, name, target, *flags, **experts)`` gives the student of the second phase."""

    def run(run: Path, name: str, target: dict[str, int], *flags: str, **experts: Any) -> Path:
        recipe = write_recipe(tmp_path / f"{name}.yaml", target, **experts)
        stats = write_stats(run, tmp_path / f"{name}.stats")
        command = ["tools/prune_checkpoint.py", "--load", run, "--recipe", recipe, "--phase", "2", "--stats", stats]
        done = tool(*command, "--to", "torch_dist", "--save", tmp_path / name, *flags)
        assert done.code == 0, done
        return tmp_path / name

    return run


@pytest.mark.parametrize("flags", [(), BF16], ids=["fp32", "bf16"])
def test_a_pruning_that_keeps_everything_changes_nothing(
    flags: tuple[str, ...], workplace: Workplace, tmp_path: Path, first_phase: Any, prune: Any
) -> None:
    """Three steps, a pruning and two steps are five steps, bit for bit; in bf16 main weights are more than weights."""
    name = "carried-" + "".join(flags).strip("-")
    unbroken = workplace.train(f"{name}-unbroken", 2, *RUN, *flags, "--save", str(tmp_path / "unbroken"))
    student = prune(first_phase(f"{name}-1", 2, *flags), f"{name}-2", {"num_layers": 4}, "--carry-optimizer")
    second = phase_flags(tmp_path, student, "run_2")
    found = workplace.train(f"{name}-2", 2, *second, "--carry-optimizer", *flags)
    for tag in (LM, KD, MTP_LM, "grad-norm", "learning-rate", "params-norm"):
        if tag in unbroken:
            assert found[tag] == unbroken[tag][3:], tag
    assert workplace.log(f"{name}-2").read_text().count(CARRIED) == 1
    fresh = phase_flags(tmp_path, student, "fresh")
    assert workplace.train(f"{name}-fresh", 2, *fresh, *flags)[LM][1:] != found[LM][1:]
    assert (
        "its optimizer state is not used; --carry-optimizer begins with it"
        in workplace.log(f"{name}-fresh").read_text()
    )
