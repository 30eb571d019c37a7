"""What comes before the gated delta rule, with backward passes in closed form: convolution with SiLU, and L2 norm."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_slim.aliases import Context


def documents_of(length: int, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """Start and end of every document; empty ones are left out."""
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == length, f"documents {bounds} of {length} positions"
    return [(start, stop) for start, stop in pairwise(bounds) if start < stop]


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x`` over its Euclidean norm on the last axis."""
    normalised: Tensor = _Normalised.apply(x, eps)
    return normalised


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """SiLU of a causal convolution of every channel by itself; it sees nothing of the documents before.

    Args:
        x: (B, T, channels).
        weight: (channels, width); the last column weighs the position itself.
        bias: (channels,).
        activation: "silu", or "swish", which is the same.
        initial_state: not supported.
        output_final_state: not supported.
        cu_seqlens: (documents + 1,), where packed documents start and the last one ends; B is then 1.

    Returns:
        (B, T, channels), and None, the final state.
    """
    assert activation in ("silu", "swish") and initial_state is None and not output_final_state
    output: Tensor = _CausalConvolution.apply(documents_of(x.shape[1], cu_seqlens), x, weight, bias)
    return output, None


class _Normalised(torch.autograd.Function):
    """Keeps its output and the inverse norms."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, eps: float) -> Tensor:
        inverse = x.square().sum(-1, keepdim=True).add_(eps).rsqrt_()
        output = x * inverse
        ctx.save_for_backward(output, inverse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, d_output: Tensor) -> tuple[Tensor, None]:
        output, inverse = ctx.saved_tensors
        along = (d_output * output).sum(-1, keepdim=True)
        return torch.addcmul(d_output, output, along, value=-1).mul_(inverse), None


class _CausalConvolution(torch.autograd.Function):
    """Keeps what it is given; the backward pass convolves again."""

    @staticmethod
    def forward(
        ctx: Context, documents: list[tuple[int, int]], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.documents = documents
        ctx.save_for_backward(x, weight, bias)
        return F.silu(_convolved(documents, x, weight, bias), inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, d_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        d = torch.ops.aten.silu_backward(d_output, _convolved(ctx.documents, x, weight, bias))
        d_x, d_weight = d * weight[:, -1], torch.zeros_like(weight)
        d_weight[:, -1] = (d * x).sum((0, 1))
        for tap, earlier, later in _taps(ctx.documents, weight):
            d_x[:, earlier].addcmul_(d[:, later], weight[:, tap])
            d_weight[:, tap] += (d[:, later] * x[:, earlier]).sum((0, 1))
        return None, d_x, d_weight, None if bias is None else d.sum((0, 1))


def _convolved(documents: list[tuple[int, int]], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Before the SiLU."""
    output = x * weight[:, -1] if bias is None else torch.addcmul(bias, x, weight[:, -1])
    for tap, earlier, later in _taps(documents, weight):
        output[:, later].addcmul_(x[:, earlier], weight[:, tap])
    return output


def _taps(documents: list[tuple[int, int]], weight: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Every column of the weight but the last, the positions that it weighs, and those for which."""
    for start, stop in documents:
        for tap in range(weight.shape[1] - 1):
            back = weight.shape[1] - 1 - tap
            if start + back < stop:
                yield tap, slice(start, stop - back), slice(start + back, stop)
