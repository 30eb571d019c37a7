"""The gradient of a weight that several products add to, put where Megatron expects it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS = 4096  # of a weight gradient in bf16 that is in memory at once, where the product cannot add to fp32 itself


class WeightGradient:
    """Adds products d_logits^T hidden to a weight's ``main_grad``, or to an fp32 sum where Megatron's DDP has none.

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

    def add(self, d_logits: Tensor, hidden: Tensor) -> None:
        """Add the product of [n, valid] and [n, H] to the first ``valid`` rows."""
        if self.total is None:
            return
        total = self.total[: d_logits.shape[1]]
        if total.dtype == d_logits.dtype:
            total.addmm_(d_logits.t(), hidden)
        elif total.is_cuda:
            torch.addmm(total, d_logits.t(), hidden, out_dtype=total.dtype, out=total)
        else:
            for part, columns in zip(total.split(ROWS), d_logits.split(ROWS, dim=1), strict=True):
                part.add_(columns.t() @ hidden)

    def finish(self) -> Tensor | None:
        """What autograd is to be given."""
        if self.total is None or not self.in_main_grad:
            return None if self.total is None else self.total.to(self.weight.dtype)
        self.weight.grad_added_to_main_grad = True
        zero = getattr(self.weight, "zero_out_wgrad", False)
        return torch.zeros_like(self.weight) if zero else torch.empty_like(self.weight)
