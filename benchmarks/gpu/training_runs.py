"""Short training runs of tiny models by tools/pretrain.py, and the losses of their steps."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.hide import LIBRARIES
from benchmarks.gpu.parts import Check, Setting
from benchmarks.processes import ROOT, free_port
from megatron_slim.distillation.terms import terms_of
from megatron_slim.errors import SlimError

STEPS = 5
LOSSES = tuple(term.name for term in terms_of(has_teacher=True, has_mtp=True).values() if term.weight is not None)
GRADIENT = ("grad-norm",)
TERMS = (*LOSSES, *GRADIENT)
# Two periods of one linear and one full attention layer. All widths are multiples of 16, which FP8 needs, the one of
# Gated DeltaNet's projection (2 x 2 x 16 + 2 x 8 x 16 + 2 x 8 = 336) too.
SIZES: dict[str, Any] = {
    "num_layers": 4,
    "layer_types": ("linear_attention", "full_attention") * 2,
    "linear_num_value_heads": 8,
    "vocab_size": 120,
}
FLAGS = (
    f"--no-teacher-check --seq-length 32 --micro-batch-size 2 --global-batch-size 4 --train-iters {STEPS} "
    "--lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --log-interval 1 --tensorboard-log-interval 1 "
    "--eval-interval 1000 --eval-iters 0 --use-distributed-optimizer"
).split()
Losses = dict[str, list[float]]


def write_models(directory: Path) -> None:
    """A random teacher and a student of other widths and fewer experts, in fp32."""
    import torch

    from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

    write_tiny_checkpoint(directory / "teacher", tiny_shape(**SIZES), seed=1, dtype=torch.float32)
    student = tiny_shape(**SIZES, hidden_size=48, num_moe_experts=4)
    write_tiny_checkpoint(directory / "student", student, seed=3, dtype=torch.float32)


def train(
    setting: Setting,
    name: str,
    *flags: str,
    ranks: int = 1,
    hidden: Sequence[str] = tuple(LIBRARIES),
    on_cpu: bool = False,
    data: Sequence[object] = ("--mock-data",),
    teacher: bool = True,
) -> Losses:
    """Train the student of `write_models` for `STEPS` steps with all four losses.

    Args:
        setting: its work directory holds the models and gets the run's tensorboard.
        name: of the run.
        flags: further ones; they win over `FLAGS`.
        ranks: processes.
        hidden: keys of `LIBRARIES` that are not to be used.
        on_cpu: on the CPU though there is a GPU.
        data: flags that name the data.
        teacher: give it the teacher.

    Returns:
        The value of every step by term.

    Raises:
        SlimError: the run failed; holds the end of what it printed.
    """
    from benchmarks.soak_compare import scalars

    tensorboard = setting.work / name
    command = [sys.executable, ROOT / "tools/torchrun.py", "--nproc-per-node", ranks, "--master-port", free_port()]
    command += [ROOT / "benchmarks/gpu/hide.py", ",".join(hidden), ROOT / "tools/pretrain.py", *FLAGS]
    command += ["--pretrained-checkpoint", setting.work / "student", "--tensorboard-dir", tensorboard, *data]
    command += [*(["--teacher-load", setting.work / "teacher"] if teacher else []), *flags]
    # Compiling element-wise functions takes half a minute; benchmarks/kd_step.py does.
    environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    print(done.stdout, done.stderr, sep="\n")  # into the part's log
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing printed"]
        raise SlimError(f"run {name} ended with exit code {done.returncode}: {lines[-1]}")
    found: Losses = {term: [] for term in TERMS}
    for (term, _), values in sorted(scalars(tensorboard).items()):
        if term in found:
            found[term].append(max(values))
    return found


def worst(found: Losses, expected: Losses, terms: Sequence[str] = TERMS, steps: int = STEPS) -> float:
    """Largest relative difference over these terms and the first steps; infinity if one of them is not a number."""
    differences = [
        abs(a - b) / abs(b) for term in terms for a, b in zip(found[term][:steps], expected[term][:steps], strict=True)
    ]
    assert differences, f"nothing to compare in {found}"
    return max(math.inf if math.isnan(each) else each for each in differences)


def narrow_checks(what: str, found: Losses, expected: Losses, losses: float, gradient: float) -> list[Check]:
    """Checks of a run in fewer bits: all losses, and the gradient norm of the first step.

    A router that decides otherwise changes a token's gradient altogether, and Adam what follows: later norms differ by
    tens of percent between fp32 and bf16 on one machine.
    """
    return [
        Check.at_most(
            f"{what}: losses of {STEPS} steps, worst relative difference", worst(found, expected, LOSSES), losses
        ),
        Check.at_most(
            f"{what}: first gradient norm, relative difference", worst(found, expected, GRADIENT, steps=1), gradient
        ),
    ]
