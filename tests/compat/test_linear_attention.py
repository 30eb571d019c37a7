"""What stands in for flash-linear-attention, against the recurrence in fp64; packed documents against separate ones."""

from __future__ import annotations

import weakref
from functools import partial
from itertools import pairwise
from typing import Any

import megatron_slim.mcore

import pytest
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from benchmarks.gated_delta_rule import step_by_step, value_and_gradients, weights_like
from megatron_slim.architecture.family import LINEAR_ATTENTION, MOE
from megatron_slim.architecture.layer_specs import layer_spec, transformer_config
from megatron_slim.compat import delta_rule_chunks, runtime
from megatron_slim.compat.linear_attention import CHUNK, causal_conv1d, chunk_gated_delta_rule
from megatron_slim.testing import tiny_shape

# An empty document, one of one position, of less than a chunk, of exactly one, and of several.
BOUNDS = [0, 0, 1, 20, 20 + CHUNK, 130]
DOCUMENTS = [slice(start, stop) for start, stop in pairwise(BOUNDS) if start < stop]


def _inputs(
    length: int, strongest_decay: float = 1.0, dtype: torch.dtype = torch.float32, batch: int = 1
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    heads, key_dim, value_dim = 3, 8, 12
    q, k = (F.normalize(torch.randn(batch, length, heads, key_dim, generator=generator), dim=-1) for _ in range(2))
    v = torch.randn(batch, length, heads, value_dim, generator=generator)
    g = -strongest_decay * torch.rand(batch, length, heads, generator=generator)
    beta = torch.rand(batch, length, heads, generator=generator)
    beta[:, length // 2] = 0.0
    return [x.to(dtype).requires_grad_() for x in (q, k, v, g, beta)]


# fp64 shows that the formulas are the same; what is left in fp32 is rounding, eps 6e-8.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("length", [1, CHUNK, 45, 100])
@pytest.mark.parametrize("strongest_decay", [0.02, 40.0])
def test_values_and_gradients(length: int, strongest_decay: float, dtype: torch.dtype, tolerance: float) -> None:
    inputs = _inputs(length, strongest_decay, dtype, batch=2)
    weights = weights_like(inputs[2])
    found = value_and_gradients(chunk_gated_delta_rule, inputs, weights)
    exact = value_and_gradients(step_by_step, [x.detach().double().requires_grad_() for x in inputs], weights)
    assert found[0].dtype == dtype
    for ours, reference in zip(found, exact, strict=True):
        assert float((ours.double() - reference).norm()) <= tolerance * float(reference.norm() + 1e-6)


def test_bf16_inputs_are_computed_in_fp32() -> None:
    inputs = [x.detach().bfloat16().requires_grad_() for x in _inputs(40)]
    weights = weights_like(inputs[2]).bfloat16()
    low = value_and_gradients(chunk_gated_delta_rule, inputs, weights)
    high = value_and_gradients(chunk_gated_delta_rule, [x.detach().float().requires_grad_() for x in inputs], weights)
    for rounded, full in zip(low, high, strict=True):
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded, full.bfloat16(), rtol=2**-8, atol=0)


def test_documents_are_as_they_are_alone() -> None:
    inputs, bounds = _inputs(BOUNDS[-1], dtype=torch.float64), torch.tensor(BOUNDS)
    weights, mixing = weights_like(inputs[2]), torch.randn(36, 4, dtype=torch.float64)

    def both(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **packed: Tensor) -> tuple[Tensor, None]:
        convolved, _ = causal_conv1d(v.flatten(2), mixing, **packed)
        return chunk_gated_delta_rule(q, k, convolved.view_as(v), g, beta, **packed)

    found = value_and_gradients(partial(both, cu_seqlens=bounds), inputs, weights)
    for document in DOCUMENTS:
        own = [x[:, document].detach().requires_grad_() for x in inputs]
        for packed, alone in zip(found, value_and_gradients(both, own, weights[:, document]), strict=True):
            torch.testing.assert_close(packed[:, document], alone, rtol=1e-12, atol=1e-14)


def test_the_convolution_is_torch_s() -> None:
    x, weight, bias = torch.randn(2, 9, 6, dtype=torch.float64), *torch.randn(2, 6, 4, dtype=torch.float64)
    found, _ = causal_conv1d(x, weight, bias[:, 0])
    expected = F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias[:, 0], groups=6)
    torch.testing.assert_close(found, F.silu(expected).mT, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def module() -> GatedDeltaNet:
    runtime.init_single_process()
    shape = tiny_shape()
    config = transformer_config(shape, params_dtype=torch.float64)
    layer = build_module(layer_spec((LINEAR_ATTENTION, MOE), config), config=config, layer_number=1)
    return layer.self_attention


def _output_and_gradients(
    module: GatedDeltaNet, hidden: Tensor, weights: Tensor, bounds: list[int] | None
) -> list[Tensor]:
    packed = None
    if bounds is not None:
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    hidden = hidden.detach().requires_grad_()
    output, _ = module(hidden, None, packed_seq_params=packed)
    return [output.detach(), *torch.autograd.grad(output, [hidden, *module.parameters()], weights)]


def test_megatron_s_module_keeps_packed_documents_apart(module: GatedDeltaNet) -> None:
    """Outputs and gradients of the hidden states document by document, those of the parameters as sums over them."""
    hidden, weights = torch.randn(2, BOUNDS[-1], 1, 64, dtype=torch.float64)
    output, d_hidden, *gradients = _output_and_gradients(module, hidden, weights, BOUNDS)
    sums = [torch.zeros_like(gradient) for gradient in gradients]
    for document in DOCUMENTS:
        alone = _output_and_gradients(module, hidden[document], weights[document], None)
        for found, expected in zip((output, d_hidden), alone, strict=False):
            torch.testing.assert_close(found[document], expected, rtol=1e-12, atol=1e-13)
        for total, part in zip(sums, alone[2:], strict=True):
            total += part
    for found, expected in zip(gradients, sums, strict=True):  # Megatron decays in fp32
        assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())
    crossing, *_ = _output_and_gradients(module, hidden, weights, None)
    assert float((crossing - output)[BOUNDS[3] :].abs().max()) > 1e-3, "documents that are not separated do mix"


@pytest.mark.parametrize("grad", [False, True])
def test_states_are_kept_for_a_backward_pass_only(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration and the teacher's forward pass hold the current state alone."""
    states: list[weakref.ref[Tensor]] = []
    forward = delta_rule_chunks.Chunk.forward

    def watched(self: Any, value: Tensor, state: Tensor) -> Any:
        states.append(weakref.ref(state))
        assert sum(each() is not None for each in states) == (len(states) if grad else 1)
        return forward(self, value, state)

    monkeypatch.setattr(delta_rule_chunks.Chunk, "forward", watched)
    with torch.set_grad_enabled(grad):
        output, _ = chunk_gated_delta_rule(*_inputs(4 * CHUNK))
    assert len(states) == 4 and (output.grad_fn is not None) == grad
