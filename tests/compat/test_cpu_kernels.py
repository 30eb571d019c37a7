"""What Megatron leaves out on a CPU, and that nothing else changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import megatron_slim.mcore

import pytest
import torch
from megatron.core.distributed import param_and_grad_buffer as buffers
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch import Tensor

from megatron_slim.compat import runtime


def test_chunks_that_are_sorted_stay_where_they_are() -> None:
    rows, probs, sizes = torch.randn(9, 4), torch.rand(9), torch.tensor([2, 3, 0, 4])
    found, gates = token_dispatcher.sort_chunks_by_idxs(rows, sizes, torch.arange(4), probs=probs)
    assert found is rows and gates is probs
    order = torch.tensor([0, 2, 1, 3])
    found, gates = token_dispatcher.sort_chunks_by_idxs(rows, sizes, order, probs=probs)
    wanted, wanted_gates = moe_utils.sort_chunks_by_idxs(rows, sizes, order, probs=probs)
    assert torch.equal(found, wanted) and wanted_gates is not None and torch.equal(gates, wanted_gates)


def test_buffers_of_one_rank_are_not_sent() -> None:
    group: Any = SimpleNamespace(size=lambda: 1)
    whole = torch.arange(4.0)
    with buffers._coalescing_manager(group, async_ops=True) as handle:
        assert buffers.dist_reduce_scatter_func(whole, whole, op=None, group=group, async_op=True) is None
    handle.wait()
    gathered = torch.zeros(4)
    buffers.dist_all_gather_func(gathered, whole, group=group, async_op=False)
    assert torch.equal(gathered, whole)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_linear_layers_and_their_gradients(trained: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(7, 2, 24, generator=generator, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(5, 24, generator=generator), requires_grad=trained)
    runtime.init_single_process()
    apply = layers.linear_with_grad_accumulation_and_async_allreduce if trained else layers.linear_with_frozen_weight
    plain = {"gradient_accumulation_fusion": False, "allreduce_dgrad": False, "sequence_parallel": False}

    def gradients(output: Tensor) -> list[Tensor]:
        wanted = [inputs, weight] if trained else [inputs]
        return [output.detach(), *torch.autograd.grad(output, wanted, torch.ones_like(output))]

    ours = gradients(apply(inputs, weight, bias=None, tp_group=None, **plain))
    for found, wanted in zip(ours, gradients(inputs @ weight.t()), strict=True):
        torch.testing.assert_close(found, wanted)
    bias = torch.randn(5, generator=generator)
    found = apply(inputs, weight, bias=bias, tp_group=None, **plain)  # Megatron's own
    torch.testing.assert_close(found, inputs @ weight.t() + bias)
