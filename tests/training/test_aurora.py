"""Aurora's step against recorded outputs of its release, against SVDs, and matrices for which it is hard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_slim.training.aurora import aurora_step, aurora_update, balanced_polar, polar

RELEASE = np.load(Path(__file__).parent / "data/aurora_release.npz")
RATES = (0.02, 0.02, 0.015, 0.01, 0.005)
CASES = "tall wide square one_row dead_rows zero_grad k1 mu09_lr".split()
SETTINGS = {"k1": {"iterations": 1}, "mu09_lr": {"momentum_decay": 0.9}}


def recorded(name: str) -> Tensor:
    return torch.from_numpy(RELEASE[name])


def steps(case: str, precision: str) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and momentum after every step."""
    weight, weights, means = recorded(f"{case}/W0").clone(), [], []
    momentum = torch.zeros_like(weight)
    for rate, gradient in zip(RATES, recorded(f"{case}/G"), strict=True):
        before = gradient.clone()
        aurora_step(weight, gradient, momentum, rate, precision=precision, **SETTINGS.get(case, {}))  # type: ignore[arg-type]
        assert torch.equal(gradient, before)
        weights.append(weight.clone())
        means.append(momentum.clone())
    return weights, means


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_release(case: str) -> None:
    """In fp32 within its rounding: 1.5e-8 is seen, of weights that move by 0.02. Momentum is the same formula."""
    weights, means = steps(case, "fp32")
    assert torch.stack(weights[::2]).sub(recorded(f"{case}/W_fp32")).abs().max() <= 1e-6
    assert torch.stack(means[::2]).sub(recorded(f"{case}/momentum")).abs().max() <= 1e-9


@pytest.mark.parametrize("case", CASES)
def test_steps_in_bf16_are_those_of_the_release(case: str) -> None:
    """Where products are rounded depends on how they are written: 4e-4 is seen."""
    weights, _ = steps(case, "bf16")
    assert weights[-1].sub(recorded(f"{case}/W_bf16")[0]).abs().max() <= 1e-3


def test_a_polar_factor_is_that_of_the_svd() -> None:
    found = polar(recorded("polar_48x16/X"))
    assert found.sub(recorded("polar_48x16/U_fp32")).abs().max() <= 1e-6
    assert found.double().sub(recorded("polar_48x16/U_svd")).abs().max() <= 1e-6


def twelve_steps(matrix: Tensor) -> Tensor:
    """Of singular values one by one, in fp64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / (values.norm() + 1e-7)
    for _ in range(12):
        values = 2 * values - 1.5 * values**3 + 0.5 * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3, 1e5])
@pytest.mark.parametrize("shape", [(24, 24), (16, 40)])
def test_leaving_early_is_not_seen(condition: float, shape: tuple[int, int]) -> None:
    """A stack of matrices that converge after different numbers of steps, one of them never, and one that is zero."""
    generator = torch.Generator().manual_seed(3)
    stack = torch.randn((4, *shape), generator=generator)
    left, _, right = torch.linalg.svd(stack[1], full_matrices=False)
    stack[1] = left @ torch.diag(torch.logspace(0, -np.log10(condition), shape[0])) @ right
    stack[2], stack[3] = stack[2] * 1e-3, 0.0
    found = polar(stack)
    for each, matrix in zip(found, stack, strict=True):
        # Rounding of fp32 grows by the twelve doublings of what is small.
        assert each.double().sub(twelve_steps(matrix)).abs().max() <= 5e-5
        assert each.sub(polar(matrix)).abs().max() <= 1e-6  # as it is alone


@pytest.mark.parametrize("shape", [(96, 24), (24, 96)])
def test_the_longer_side_has_equal_norms(shape: tuple[int, int]) -> None:
    """Rows, or columns, over three decades; a plain polar factor keeps their order."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    scales = torch.logspace(0, -3, max(shape))
    matrix = matrix * (scales[:, None] if shape[0] > shape[1] else scales)
    side = int(shape[0] > shape[1])
    balanced, plain = balanced_polar(matrix).norm(dim=side), polar(matrix).norm(dim=side)
    assert plain.std() / plain.mean() > 0.5
    assert balanced.std() / balanced.mean() < 0.02
    assert aurora_update(matrix).square().mean().sqrt() == pytest.approx(shape[1] ** -0.5, rel=0.01)


def test_a_gradient_of_low_rank_stays_of_low_rank() -> None:
    """In fp32 what is not there stays small; in bf16 rounding is blown up to full size: the reason for the default."""
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn(512, 16, generator=generator) @ torch.randn(16, 128, generator=generator)
    values = {kind: torch.linalg.svdvals(polar(gradient, kind).float()) for kind in ("fp32", "bf16")}
    assert values["fp32"][:16].min() > 0.99 and values["fp32"][16:].max() < 0.01
    assert values["bf16"][16:].max() > 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.0},
        {"momentum_decay": 1.0},
        {"weight_decay": -1.0},
        {"iterations": 0},
        {"beta": 0.0},
        {"precision": "x"},
    ],
)
def test_numbers_out_of_range_are_refused(changes: dict[str, float]) -> None:
    weight = torch.ones(3, 2)
    with pytest.raises(ValueError):
        aurora_step(weight, weight.clone(), weight.clone(), **{"lr": 0.1, **changes})  # type: ignore[arg-type]
    assert torch.equal(weight, torch.ones(3, 2))


@pytest.mark.parametrize("gradient", [torch.ones(2, 3), torch.ones(3)])
def test_other_shapes_are_refused(gradient: Tensor) -> None:
    weight = torch.ones(3, 2)
    with pytest.raises(ValueError, match="of one shape"):
        aurora_step(weight, gradient, weight.clone(), 0.1)
