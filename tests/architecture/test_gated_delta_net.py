"""The chunked kernel against the recurrence, step by step in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_slim import device

device.install()

from megatron_slim.architecture.gated_delta_net import chunk_gated_delta_rule  # noqa: E402


def _step_by_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, 1), state


def _inputs(length: int, strongest_decay: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    batch, heads, key_dim, value_dim = 2, 3, 8, 12
    q, k = (F.normalize(torch.randn(batch, length, heads, key_dim, generator=generator), dim=-1) for _ in range(2))
    v = torch.randn(batch, length, heads, value_dim, generator=generator)
    g = -strongest_decay * torch.rand(batch, length, heads, generator=generator)
    beta = torch.rand(batch, length, heads, generator=generator)
    state = torch.randn(batch, heads, key_dim, value_dim, generator=generator)
    return tuple(x.to(dtype).requires_grad_() for x in (q, k, v, g, beta, state))


# fp64 shows that the formulas are the same. In fp32 the decay cumulated over a chunk reaches 1280, and its
# differences are then good to 6e-5; what follows from that is small, because the decayed terms are.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("length", [1, 32, 45, 100])
@pytest.mark.parametrize("strongest_decay", [0.02, 40.0])
def test_values_and_gradients(length: int, strongest_decay: float, dtype: torch.dtype, tolerance: float) -> None:
    inputs = _inputs(length, strongest_decay, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v, g, beta, state = inputs
    output, final = chunk_gated_delta_rule(q, k, v, g, beta, state, True)
    expected, expected_final = _step_by_step(*exact)
    assert output.dtype == dtype and final is not None
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (output.double() * weights).sum().add(final.double().sum()).backward()
    ((expected * weights).sum() + expected_final.sum()).backward()
    pairs = [(output, expected), (final, expected_final)]
    pairs += [(a.grad, b.grad) for a, b in zip(inputs, exact, strict=True)]  # type: ignore[misc]
    for ours, reference in pairs:
        error, scale = (ours.double() - reference).detach().norm(), reference.detach().norm()
        assert float(error) <= tolerance * float(scale + 1e-6)


def test_bf16_inputs_are_computed_in_fp32() -> None:
    q, k, v, g, beta = (x.detach().bfloat16() for x in _inputs(40, 1.0, torch.float32)[:5])
    low, _ = chunk_gated_delta_rule(q, k, v, g, beta)
    high, final = chunk_gated_delta_rule(q.float(), k.float(), v.float(), g.float(), beta.float())
    assert low.dtype == torch.bfloat16 and final is None
    torch.testing.assert_close(low.float(), high, rtol=2**-8, atol=2**-8 * float(high.abs().max()))
