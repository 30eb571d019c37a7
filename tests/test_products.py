"""Products by oneDNN and by MKL, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_slim import products
from megatron_slim.products import LEAST_OPERATIONS, linear, linear_by_part, transposed_product, uses_onednn
from megatron_slim.weight_gradient import FEW_ROWS, weight_gradient

pytestmark = pytest.mark.skipif(not products.has_onednn(), reason="no AVX-512: there is one kernel alone")
TOLERANCE = 2e-6  # relative to the norm: fp32 sums of some hundred products


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_large_products_go_to_onednn_and_small_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = random(320, 96), random(80, 96, seed=1)
    assert 2 * rows.numel() * len(weight) >= LEAST_OPERATIONS
    assert uses_onednn(rows, len(weight)) and not uses_onednn(rows[:30], len(weight))
    assert not uses_onednn(rows.bfloat16(), len(weight)) and not uses_onednn(rows.double(), len(weight))
    exact = rows.double() @ weight.double().t()
    assert error(linear(rows, weight), exact) < TOLERANCE
    assert torch.equal(linear(rows[:30], weight), rows[:30] @ weight.t())
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    assert torch.equal(linear(rows, weight), rows @ weight.t())


def test_weights_may_be_transposed() -> None:
    rows, weight = random(320, 96), random(96, 80, seed=1)
    assert error(linear(rows, weight.t()), rows.double() @ weight.double()) < TOLERANCE


def test_a_weight_with_gaps_is_copied() -> None:
    wide = random(96, 200)
    for weight in (wide, wide.t(), wide[8:], wide[8:].t()):
        assert products.whole(weight) is weight
    for gaps in (wide[:, :80], wide[:, :80].t(), wide[::2]):
        assert products.whole(gaps).is_contiguous() and torch.equal(products.whole(gaps), gaps)


@pytest.mark.parametrize("counts", [[200, 0, 37, 263], [0, 0, 500, 0], [500], [31, 33, 436, 0]], ids=str)
def test_products_by_part(counts: list[int]) -> None:
    """Parts that are rounded up take rows of their neighbours, which must not be seen."""
    rows = random(500, 256)
    weights = [random(128, 256, seed=number) for number in range(len(counts))]
    found = linear_by_part(rows, weights, counts)
    for part, place, weight in zip(rows.split(counts), found.split(counts), weights, strict=True):
        if len(part):
            assert error(place, part.double() @ weight.double().t()) < TOLERANCE
    # What the neighbours are does not matter.
    other = rows.clone()
    other[counts[0] :] = float("nan")
    assert torch.equal(linear_by_part(other, weights, counts)[: counts[0]], found[: counts[0]])


@pytest.mark.parametrize(("outputs", "inputs"), [(400, 48), (48, 400)])
def test_gradients_of_a_weight(outputs: int, inputs: int) -> None:
    d_outputs, rows = random(FEW_ROWS, outputs), random(FEW_ROWS, inputs, seed=1)
    exact = d_outputs.double().t() @ rows.double()
    assert uses_onednn(rows, outputs)
    found = transposed_product(d_outputs, rows)
    assert found.shape == (outputs, inputs) and error(found, exact) < TOLERANCE
    weight = torch.nn.Parameter(random(outputs, inputs))
    gradient = weight_gradient(weight, d_outputs, rows)
    assert gradient is not None and error(gradient, exact) < TOLERANCE
    # With a buffer of DDP's the gradient is added there, and autograd is given a stand-in.
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(outputs, inputs), False  # type: ignore[attr-defined]
    for half in (slice(0, FEW_ROWS // 2), slice(FEW_ROWS // 2, None)):
        assert weight_gradient(weight, d_outputs[half], rows[half]) is not None
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert error(weight.main_grad, exact + 1) < TOLERANCE  # type: ignore[attr-defined]
