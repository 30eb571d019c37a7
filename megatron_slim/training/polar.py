"""Polar factors of stacks of matrices by odd polynomials of their singular values, in products alone (torch alone).

A step with the coefficients (a, b, c) makes of every singular value s the value a s + b s^3 + c s^5. Shapes: stacks are
[N, rows, columns].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Coefficients: TypeAlias = tuple[float, float, float]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# p(1) = 1 and p'(1) = 0: it converges, and doubles what is small.
DOUBLING: Coefficients = (2.0, -1.5, 0.5)
# Likewise with p''(1) = 0: of values that are off by e it makes values that are off by 2.5 e^3.
CUBIC: Coefficients = (1.875, -1.25, 0.375)
# Squares of singular values this close to 1 are within the rounding of fp32 after a cubic step: 2.5 (2.5e-3)^3.
_CONVERGED = 5e-3
# From this ratio of the sides on, two steps of the Gram matrix are cheaper than two of the matrix.
_LONG = 1.5


def iterate(x: Tensor, steps: Sequence[Coefficients], *, in_pairs: bool = True) -> Tensor:
    """Apply steps, one after the other, to a stack whose rows are not more than its columns.

    Args:
        x: with singular values up to 1.
        steps: coefficients.
        in_pairs: compute two at once where that is cheaper. It costs small singular values a digit.
    """
    number = 0
    while number < len(steps):
        count = 2 if in_pairs and _pays(x) and number + 2 <= len(steps) else 1
        x = torch.bmm(_factor(torch.bmm(x, x.mT), steps[number : number + count]), x)
        number += count
    return x


def converge(
    x: Tensor, steps: Sequence[Coefficients], looks: range, *, in_pairs: bool = False
) -> tuple[Tensor, Tensor]:
    """The same, but that matrices whose values are nearly 1 leave with a cubic step, which makes them 1.

    Args:
        x: a stack in fp32.
        steps: coefficients.
        looks: after how many steps it is looked at what has converged, which makes the host wait for the device.
        in_pairs: as of `iterate`, before the first look.

    Returns:
        The stack, and which of it has converged, [N].
    """
    rest, places = iterate(x, steps[: looks.start], in_pairs=in_pairs), torch.arange(len(x), device=x.device)
    found, near = torch.empty_like(rest), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for number in looks:
        gram = torch.bmm(rest, rest.mT)
        done = converged(gram)
        if bool(done.all()):
            found[places], near[places] = torch.bmm(_polynomial(gram, CUBIC), rest), True
            return found, near
        if bool(done.any()):
            found[places[done]], near[places[done]] = torch.bmm(_polynomial(gram[done], CUBIC), rest[done]), True
            rest, gram, places = rest[~done], gram[~done], places[~done]
        if number < len(steps):
            rest = torch.bmm(_polynomial(gram, steps[number]), rest)
    found[places] = iterate(rest, steps[looks.stop :], in_pairs=False)
    return found, near


def _pays(x: Tensor) -> bool:
    """Whether two steps of the Gram matrix cost less than two of the matrix; not in 16 bits, for their few digits."""
    return x.shape[-1] > _LONG * x.shape[-2] and x.dtype == torch.float32


def _factor(gram: Tensor, steps: Sequence[Coefficients]) -> Tensor:
    """What one or two steps multiply a matrix by from the left, of its Gram matrix."""
    first = _polynomial(gram, steps[0])
    if len(steps) == 1:
        return first
    # All of these are polynomials of one matrix, and in whatever order.
    second = _polynomial(torch.bmm(torch.bmm(first, gram), first), steps[1])
    return torch.bmm(second, first)


def _polynomial(gram: Tensor, coefficients: Coefficients) -> Tensor:
    one, three, five = coefficients
    found = torch.baddbmm(gram, gram, gram, beta=three, alpha=five)
    found.diagonal(dim1=-2, dim2=-1).add_(one)
    return found


def converged(gram: Tensor) -> Tensor:
    """Which of a stack of Gram matrices are the identity but for what one more step repairs, [N]; none with NaN."""
    off = gram.clone()
    off.diagonal(dim1=-2, dim2=-1).sub_(1)
    return torch.linalg.matrix_norm(off) <= _CONVERGED
