"""Aurora's step on matrices: polar factors whose rows have equal norms (torch alone; no Megatron, no process groups).

Aurora (tilde-research, released 2026-05 under MIT) is Muon with a polar factor that converges, and with rows scaled
before it so that none of the longer side is left behind. Written from the algorithm; the tests compare it with recorded
outputs of the release. All functions take stacks of matrices, [..., rows, columns], and treat each by itself.

The release makes twelve steps for every factor. What those give is found with fewer where a matrix is conditioned well
enough that they end at singular values of 1, which is looked at; else all are made.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_slim.training.polar import CUBIC, DOUBLING, DTYPES, converge, iterate

EPSILON = 1e-7
STEPS = [DOUBLING] * 12
# Singular values begin below their root mean square. What is nearly 1 after eleven steps is 1 within 3e-6 after twelve.
_LOOKS = range(4, 12)
# Twelve steps bring a singular value of this share of the Frobenius norm to 1 - 1e-11, as it is in fp64.
_SURE = 1 / 512
# Steeper steps first, and then what converges fastest. Singular values grow no more than 1400-fold: what is nearly 1
# after them was above 0.0015, of which twelve doublings make 1 within 3e-7.
_QUICK = [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), *[CUBIC] * 5]
_QUICK_LOOKS = range(4, 9)


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
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    wide = (matrix.mT if is_tall else matrix).reshape(-1, *sorted(matrix.shape[-2:]))
    found = _polar(wide, precision, quick=None)
    return (found.mT if is_tall else found).reshape(matrix.shape)


def _polar(wide: Tensor, precision: str, quick: Tensor | None) -> Tensor:
    """Factors of [N, rows, columns], rows not more than columns; ``quick``: which are well conditioned, if known."""
    x = wide.to(DTYPES[precision])
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPSILON)
    if precision != "fp32":
        return iterate(x, STEPS)
    if quick is None or not bool(quick.any()):
        return converge(x, STEPS, _LOOKS)[0]
    found, slow = torch.empty_like(x), ~quick
    found[quick], near = converge(x[quick], _QUICK, _QUICK_LOOKS, in_pairs=True)
    slow[quick] = ~near
    if bool(slow.any()):
        found[slow] = converge(x[slow], STEPS, _LOOKS)[0]
    return found


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
    # Columns of a wide matrix are scaled: those of its transpose, where it is tall.
    wide = (matrix.mT if rows > columns else matrix).reshape(-1, *sorted((rows, columns)))
    wanted, quick = wide.shape[-2] / wide.shape[-1], None
    scales = 1 / torch.linalg.vector_norm(wide, dim=-2, keepdim=True).clamp_min(EPSILON)
    for _ in range(iterations - 1):
        share, quick = _shares(scales * wide, precision)
        scales = scales * (wanted / share.clamp_min(EPSILON**2)) ** beta
    found = _polar(scales * wide, precision, quick)
    return (found.mT if rows > columns else found).reshape(matrix.shape)


def _shares(wide: Tensor, precision: str) -> tuple[Tensor, Tensor | None]:
    """Sums of squares of the columns of polar factors, [N, 1, columns], and which of the factors are sure to converge.

    Of a factor whose singular values are 1 they are x^T (X X^T)^-1 x for every column x, without the factor.
    """
    if precision != "fp32":
        return _polar(wide, precision, None).float().square().sum(dim=-2, keepdim=True), None
    exact = wide.double()
    gram = torch.bmm(exact, exact.mT)
    root, failed = torch.linalg.cholesky_ex(gram)
    instead = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)  # of one that fails, which is not used
    inverse = torch.cholesky_inverse(torch.where(failed[:, None, None] == 0, root, instead))
    # The inverse's norm bounds the inverse of the smallest singular value, squared.
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    sure = (failed == 0) & (torch.linalg.matrix_norm(inverse) * trace <= _SURE**-2)
    share = (torch.bmm(inverse, exact) * exact).sum(dim=-2, keepdim=True).float()
    if not bool(sure.all()):
        share[~sure] = _polar(wide[~sure], precision, None).square().sum(dim=-2, keepdim=True)
    return share, sure


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
        ValueError: the tensors are not three matrices of one shape, or a number is out of range.
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
