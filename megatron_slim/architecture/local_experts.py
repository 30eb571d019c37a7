"""Routed experts on machines without Transformer Engine: the products of all experts in one function of autograd.

Shapes: P routed (token, expert) pairs sorted by expert, E experts of this rank, H hidden, F neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import megatron_slim.mcore

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_slim.aliases import Context
from megatron_slim.products import linear_by_part
from megatron_slim.weight_gradient import ready_weight, weight_gradient


class LocalExperts(SequentialMLP):
    """Megatron's experts one after the other, without the modules, small operations and copies in between.

    Their activation is that of all pairs at once, and every product is written where it belongs. Parameters and their
    names are Megatron's.

    Attributes:
        activations: what is multiplied by the experts' last matrices, [P, F], passes it; to be listened to.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.activations = nn.Identity()
        config = self.config
        assert config.gated_linear_unit and config.activation_func is F.silu and not config.add_bias_linear
        assert config.activation_func_clamp_value is None and not config.glu_linear_offset

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Apply every expert to its pairs.

        Args:
            permuted_local_hidden_states: [P, H].
            tokens_per_expert: [E], on the host.
            permuted_probs: gates [P].

        Returns:
            [P, H], and None, the bias.
        """
        if self.config.moe_apply_probs_on_input:
            output, _ = super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
            return output, None
        first = [ready_weight(expert.linear_fc1) for expert in self.local_experts]
        last = [ready_weight(expert.linear_fc2) for expert in self.local_experts]
        counts = tokens_per_expert.tolist()
        pairs, gates = permuted_local_hidden_states, permuted_probs
        return _Experts.apply(counts, self.activations, pairs, gates, *first, *last), None


class _Experts(torch.autograd.Function):
    """silu(x G^T) * (x U^T) * gate, times the last matrix, by expert; its first matrix holds G and U."""

    @staticmethod
    def forward(
        ctx: Context, counts: list[int], activations: nn.Module, pairs: Tensor, gates: Tensor, *weights: Tensor
    ) -> Tensor:
        first, last = weights[: len(counts)], weights[len(counts) :]
        both = linear_by_part(pairs, list(first), counts)
        gate, up = both.chunk(2, dim=-1)
        active = activations(_gated(F.silu(gate) * up, gates))
        ctx.counts = counts
        ctx.save_for_backward(pairs, gates, both, active, *weights)
        return linear_by_part(active, list(last), counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, d_output: Tensor) -> tuple[Tensor | None, ...]:
        counts = ctx.counts
        pairs, gates, both, active, *weights = ctx.saved_tensors
        first, last = weights[: len(counts)], weights[len(counts) :]
        d_active = linear_by_part(d_output, [weight.t() for weight in last], counts)
        d_last = _weight_gradients(last, d_output, active, counts)
        d_both, d_gates = _activation_gradients(d_active, both, gates)
        d_first = _weight_gradients(first, d_both, pairs, counts)
        d_pairs = None
        if ctx.needs_input_grad[2]:
            d_pairs = linear_by_part(d_both, [weight.t() for weight in first], counts)
        return None, None, d_pairs, d_gates, *d_first, *d_last


def _gated(active: Tensor, gates: Tensor) -> Tensor:
    """Products with the gates [P], which are in fp32, in the type of the activations [P, F]."""
    if active.dtype == gates.dtype:
        return active.mul_(gates[:, None])
    return (active * gates[:, None]).to(active.dtype)


def _activation_gradients(d_active: Tensor, both: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the first products [P, 2 F] and of the gates [P]."""
    gate, up = both.chunk(2, dim=-1)
    d_both = torch.empty_like(both)
    d_gate, d_up = d_both.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    d_gates = (d_active * silu).mul_(up).sum(-1, dtype=gates.dtype)
    d_active = _gated(d_active, gates)
    torch.mul(d_active, silu, out=d_up)
    # silu' = sigmoid + silu (1 - sigmoid)
    slope = silu.mul_(1 - sigmoid).add_(sigmoid)
    torch.mul(d_active.mul_(up), slope, out=d_gate)
    return d_both, d_gates


def _weight_gradients(
    weights: Sequence[Tensor], d_rows: Tensor, rows: Tensor, counts: list[int]
) -> list[Tensor | None]:
    """What autograd is given for the weight of every expert."""
    parts = zip(weights, d_rows.split(counts), rows.split(counts), strict=True)
    return [weight_gradient(weight, d_part, part) for weight, d_part, part in parts]
