"""The gradient of a weight that several products add to, put where Megatron expects it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_slim.products import linear_into, transposed_product, uses_onednn

ROWS = 4096  # of a weight gradient in bf16 that is in memory at once, where the product cannot add to fp32 itself
FEW_ROWS = 512  # below which adding to a gradient takes longer than the faster product saves


def ready_weight(layer: nn.Module) -> Any:
    """The weight of a layer whose own forward pass, before which DDP waits for gathered parameters, is not called."""
    for wait in layer._forward_pre_hooks.values():
        wait(layer, ())
    return layer.weight


class WeightGradient:
    """Adds products d_outputs^T inputs to a weight's ``main_grad``, or to an fp32 sum where Megatron's DDP has none.

    With Megatron's DDP the parameter then says so (``grad_added_to_main_grad``), and what autograd gets is a stand-in
    without content: only its arrival, at which DDP starts to reduce the bucket, matters. Where DDP adds it
    nevertheless (``zero_out_wgrad``, weights tied to the embedding), it is zero. So do Megatron's own linear layers
    with ``--gradient-accumulation-fusion``.
    """

    def __init__(self, weight: Any) -> None:
        """``weight``: a parameter [P, H], with or without what Megatron's DDP adds to it."""
        self.weight = weight
        self.in_main_grad = hasattr(weight, "grad_added_to_main_grad") and not hasattr(weight, "__fsdp_param__")
        self.total: Tensor | None = None
        if self.in_main_grad:
            self.total = self.weight.main_grad
        elif weight.requires_grad:
            self.total = torch.zeros_like(weight, dtype=torch.float32)

    def add(self, d_outputs: Tensor, inputs: Tensor) -> None:
        """Add the product of [n, outputs] and [n, H] to the first ``outputs`` rows."""
        if self.total is None:
            return
        total = self.total[: d_outputs.shape[1]]
        if len(inputs) >= FEW_ROWS and total.dtype == torch.float32 and uses_onednn(inputs, d_outputs.shape[1]):
            total.add_(transposed_product(d_outputs, inputs))
        elif total.dtype == d_outputs.dtype:
            total.addmm_(d_outputs.t(), inputs)
        elif total.is_cuda:
            torch.addmm(total, d_outputs.t(), inputs, out_dtype=total.dtype, out=total)
        else:
            for part, columns in zip(total.split(ROWS), d_outputs.split(ROWS, dim=1), strict=True):
                part.add_(columns.t() @ inputs)

    def finish(self) -> Tensor | None:
        """What autograd is to be given."""
        if self.total is None or not self.in_main_grad:
            return None if self.total is None else self.total.to(self.weight.dtype)
        self.weight.grad_added_to_main_grad = True
        zero = getattr(self.weight, "zero_out_wgrad", False)
        return torch.zeros_like(self.weight) if zero else torch.empty_like(self.weight)


class LayerGradients:
    """Gradients of a layer's weight [P, H] and of several inputs [T, H] to it, put together from pieces.

    Attributes:
        weight: the weight's; of one that is frozen nothing is computed.
        hidden: the inputs', None where none is needed.
    """

    def __init__(self, weight: Tensor, hidden: Sequence[Tensor], needed: Sequence[bool]) -> None:
        self.weight = WeightGradient(weight)
        self.hidden = [torch.zeros_like(each) if want else None for each, want in zip(hidden, needed, strict=True)]

    def add(self, number: int, rows: slice, d_outputs: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Those of some rows of an input, from that of their outputs [n, outputs] and the rows themselves [n, H]."""
        if (of_input := self.hidden[number]) is not None:
            linear_into(d_outputs, weight[: d_outputs.shape[1]].t(), of_input[rows])
        self.weight.add(d_outputs, hidden)


def weight_gradient(weight: Tensor, d_outputs: Tensor, inputs: Tensor) -> Tensor | None:
    """What autograd is to be given for a weight [outputs, H] of one product, from [n, outputs] and [n, H]."""
    gradient = WeightGradient(weight)
    gradient.add(d_outputs, inputs)
    return gradient.finish()
