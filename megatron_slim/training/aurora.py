"""Aurora's step on matrices: polar factors whose rows have equal norms (torch alone; no Megatron, no process groups).

Aurora (tilde-research, released 2026-05 under MIT) is Muon with a polar factor that converges, and with rows scaled
before it so that none of the longer side is left behind. Written from the algorithm; the tests compare it with recorded
outputs of the release. All functions take stacks of matrices, [..., rows, columns], and treat each by itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILON = 1e-7
STEPS = 12  # of the polar iteration
# Singular values s become p(s) = 2 s - 1.5 s^3 + 0.5 s^5, with p(1) = 1 and p'(1) = 0.
_ONE, _THREE, _FIVE = 2.0, -1.5, 0.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Squares of singular values this close to 1 are within the rounding of fp32 after one more step: 0.5 (2e-4)^2.
_CONVERGED = 4e-4
_FIRST_LOOK = 4  # before this step nothing has converged: singular values begin below their root mean square


def polar(matrix: Tensor, precision: str = "fp32") -> Tensor:
    """The orthogonal factor of matrices, as far as twelve steps bring it.

    A singular value below 2^-10 of the Frobenius norm stays below 1. In fp32, matrices leave the iteration when further
    steps would not change them; in bf16, which never gets there, none does.

    Args:
        matrix: [..., rows, columns] in fp32.
        precision: ``fp32`` or ``bf16``, that of the products.

    Returns:
        The same shape, in that precision.
    """
    x = matrix.to(DTYPES[precision])
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPSILON)
    flat = x.reshape(-1, *x.shape[-2:])
    found = _iterate(flat, early=precision == "fp32").view(x.shape)
    return found.mT if is_tall else found


def _iterate(x: Tensor, *, early: bool) -> Tensor:
    """The steps, of a stack [N, rows, columns] with rows <= columns; those that have converged are set aside."""
    found, places = None, None
    for number in range(STEPS):
        gram = torch.bmm(x, x.mT)
        looks = early and number >= _FIRST_LOOK and number < STEPS - 1
        far = _far_from_identity(gram) if looks else None
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_THREE, alpha=_FIVE), x, beta=_ONE)
        if far is None or bool(far.all()):
            continue
        if found is None or places is None:
            found, places = torch.empty_like(x), torch.arange(len(x), device=x.device)
        found[places[~far]] = x[~far]
        x, places = x[far], places[far]
        if not len(x):
            return found
    if found is None or places is None:
        return x
    found[places] = x
    return found


def _far_from_identity(gram: Tensor) -> Tensor:
    """Which of a stack of Gram matrices are not the identity yet, [N]."""
    off = gram.clone()
    off.diagonal(dim1=-2, dim2=-1).sub_(1)
    return ~(torch.linalg.matrix_norm(off) <= _CONVERGED)  # of NaN it is true


def balanced_polar(matrix: Tensor, iterations: int = 2, beta: float = 0.5, precision: str = "fp32") -> Tensor:
    """Polar factors after the rows of the longer side were scaled until their shares of the factor are equal.

    Square matrices have a plain polar factor.

    Args:
        matrix: [..., rows, columns] in fp32.
        iterations: polar factors that are computed; between two of them the scales are refined once.
        beta: exponent of a refinement.
        precision: as of `polar`.

    Returns:
        The same shape, in that precision.
    """
    rows, columns = matrix.shape[-2:]
    if rows == columns:
        return polar(matrix, precision)
    is_wide = rows < columns
    tall = matrix.mT if is_wide else matrix
    wanted = tall.shape[-1] / tall.shape[-2]
    scales = 1 / torch.linalg.vector_norm(tall, dim=-1, keepdim=True).clamp_min(EPSILON)
    for number in range(iterations):
        factor = polar(scales * tall, precision)
        if number < iterations - 1:
            share = factor.float().square().sum(dim=-1, keepdim=True).clamp_min(EPSILON**2)
            scales = scales * (wanted / share) ** beta
    return factor.mT if is_wide else factor


def aurora_update(matrix: Tensor, iterations: int = 2, beta: float = 0.5, precision: str = "fp32") -> Tensor:
    """What a step subtracts, before the learning rate: entries of root mean square 1 / sqrt(columns), [..., r, c]."""
    rows, columns = matrix.shape[-2:]
    return balanced_polar(matrix, iterations, beta, precision) * math.sqrt(max(1.0, rows / columns))


@torch.no_grad()
def aurora_step(
    weight: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    lr: float,
    *,
    weight_decay: float = 0.025,
    momentum_decay: float = 0.95,
    nesterov: bool = True,
    iterations: int = 2,
    beta: float = 0.5,
    precision: str = "fp32",
) -> None:
    """One step on one matrix, in place on ``weight`` and ``momentum``; the gradient is left as it is.

    Args:
        weight: [rows, columns] in fp32.
        gradient: of the same shape.
        momentum: a running mean of gradients, zero before the first step.
        lr: learning rate; entries of the weight move by about lr / sqrt(columns).
        weight_decay: share of the weight that is taken off per step, times ``lr``.
        momentum_decay: share of the running mean that stays.
        nesterov: look ahead by the gradient of this step.
        iterations: as of `balanced_polar`.
        beta: as of `balanced_polar`.
        precision: ``fp32`` or ``bf16``, that of the products.

    Raises:
        ValueError: the tensors are no three matrices of one shape, or a number is out of range.
    """
    if weight.ndim != 2 or not weight.shape == gradient.shape == momentum.shape:
        raise ValueError("weight, gradient and momentum must be matrices of one shape")
    if not (0 < momentum_decay < 1 and lr > 0 and weight_decay >= 0 and iterations >= 1 and beta > 0):
        raise ValueError(
            "momentum_decay must be between 0 and 1, lr, iterations and beta positive, weight_decay not negative"
        )
    if precision not in DTYPES:
        raise ValueError(f"precision must be one of {', '.join(DTYPES)}")
    momentum.lerp_(gradient, 1 - momentum_decay)
    ahead = gradient.lerp(momentum, momentum_decay) if nesterov else momentum
    weight.mul_(1 - lr * weight_decay)
    weight.sub_(aurora_update(ahead, iterations, beta, precision).to(weight.dtype), alpha=lr)
