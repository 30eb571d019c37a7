"""Matrix products with a weight, by the fastest kernel that a CPU has.

PyTorch gives products in fp32 to MKL, which does not use AVX-512 on processors that Intel did not make. oneDNN, which
PyTorch brings too, does: on such processors it is twice as fast, and as exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

# Preparing oneDNN's kernel for a shape takes as long as a product of this many operations.
LEAST_OPERATIONS = 4_000_000
# Numbers of rows that differ from step to step are rounded up to this, so that few kernels serve them all.
ROW_STEP = 32
SMALL_FLOPS = 1e8  # of a pass through a model: some milliseconds of one core


@contextlib.contextmanager
def threads_for(flops: float) -> Iterator[None]:
    """One thread for passes of few operations: to wake others for every little one takes longer than they save."""
    before = torch.get_num_threads()
    if flops < SMALL_FLOPS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def has_onednn() -> bool:
    """Whether products in fp32 go to oneDNN: on processors with AVX-512."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def uses_onednn(rows: Tensor, outputs: int) -> bool:
    """Whether the product of rows [n, k] and a weight of so many outputs goes to oneDNN."""
    large = 2 * rows.numel() * outputs >= LEAST_OPERATIONS
    return large and rows.dtype == torch.float32 and rows.device.type == "cpu" and has_onednn()


def whole(weight: Tensor) -> Tensor:
    """The weight, or its copy where neither it nor its transpose is contiguous; oneDNN is asked for no others, because
    PyTorch 2.13 did not return from all of them.
    """
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows [n, k] times the transpose of a weight [m, k]: [n, m], without autograd."""
    if uses_onednn(rows, weight.shape[0]):
        product: Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, whole(weight), None, "none", [], "")
        return product
    return rows @ weight.t()


def linear_into(rows: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """`linear` in a place [n, m] that is there."""
    if uses_onednn(rows, len(weight)):
        return out.copy_(linear(rows, weight))
    return torch.mm(rows, weight.t(), out=out)


def transposed_product(first: Tensor, second: Tensor) -> Tensor:
    """The transpose of [n, a] times [n, b], by oneDNN: [a, b]. It copies its first factor, which is the narrower."""
    if first.shape[1] > second.shape[1]:
        return linear(second.t(), first.t()).t()
    return linear(first.t(), second.t())


def linear_by_part(rows: Tensor, weights: list[Tensor], counts: list[int]) -> Tensor:
    """Parts of rows times the transpose of a weight each: [n, k], weights [m, k] and rows of each part give [n, m]."""
    output = rows.new_empty(len(rows), weights[0].shape[0])
    start = 0
    for weight, place, count in zip(weights, output.split(counts), counts, strict=True):
        part = rows[start : start + count]
        if uses_onednn(part, len(weight)):
            # Rows of the neighbours fill up the part; what becomes of them is left out.
            first = max(0, min(start, len(rows) - _rounded(count)))
            found = linear(rows[first : first + _rounded(count)], weight)
            place.copy_(found[start - first :][:count])
        else:
            torch.mm(part, weight.t(), out=place)
        start += count
    return output


def _rounded(count: int) -> int:
    return -(-count // ROW_STEP) * ROW_STEP
