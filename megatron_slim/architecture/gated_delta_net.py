"""Gated DeltaNet on machines without flash-linear-attention: Megatron's module with a kernel in plain PyTorch.

Shapes: batch B, sequence T, heads H, chunks N, chunk length C, key dimension K, value dimension V.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

CHUNK = 32


class _UnitLowerInverse(torch.autograd.Function):
    """(I + A)^-1 for strictly lower triangular A; its gradient is two products instead of another solve."""

    @staticmethod
    def forward(ctx: FunctionCtx, strictly_lower: Tensor) -> Tensor:
        identity = torch.eye(strictly_lower.shape[-1], dtype=strictly_lower.dtype, device=strictly_lower.device)
        inverse = torch.linalg.solve_triangular(
            strictly_lower, identity.expand_as(strictly_lower), upper=False, unitriangular=True
        )
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        transposed = inverse.mT
        return -(transposed @ grad @ transposed).tril(-1)


def _to_chunks(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, H, ...) -> (N, B * H, C, ...), padded with zeros: padding neither decays nor writes the state."""
    batch, length, heads = x.shape[:3]
    padding = -length % CHUNK
    x = F.pad(x.to(dtype), (0, 0) * (x.dim() - 2) + (0, padding))
    x = x.reshape(batch, -1, CHUNK, heads, *x.shape[3:])
    return x.permute(1, 0, 3, 2, *range(4, x.dim())).flatten(1, 2).contiguous()


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule (arXiv 2412.06464) in chunks of 32, in fp32 (fp64 for fp64 inputs).

    Per head, S_t = exp(g_t) S_{t-1} + k_t (x) beta_t (v_t - exp(g_t) S_{t-1}^T k_t) and o_t = S_t^T q_t / sqrt(K).
    The chunk axis comes first and is unbound once: slicing it inside the loop would zero-fill whole tensors in the
    backward pass, which is most of the time of the usual implementation.

    Args:
        query: (B, T, H, K).
        key: (B, T, H, K), normalised.
        value: (B, T, H, V).
        g: (B, T, H), logarithm of the decay, at most 0.
        beta: (B, T, H), writing strength.
        initial_state: (B, H, K, V).
        output_final_state: return the state after the last position.
        use_qk_l2norm_in_kernel: not supported; Megatron normalises before.
        cu_seqlens: not supported: no packed sequences.

    Returns:
        (B, T, H, V) in the dtype of ``query``, and (B, H, K, V) or None.
    """
    assert not use_qk_l2norm_in_kernel and cu_seqlens is None
    (batch, length, heads, key_dim), value_dim = query.shape, value.shape[-1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v, decay, write = (_to_chunks(x, dtype) for x in (query * key_dim**-0.5, key, value, g, beta))
    decay = decay.cumsum(-1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    # Masked before exp: above the diagonal the difference is positive and could overflow.
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(later, float("-inf")).exp()
    grown, left = decay.exp()[..., None], (decay[..., -1:] - decay).exp()[..., None]
    k_write = k * write[..., None]
    similarity = torch.cat([k_write, q], -2) @ k.mT
    inverse = _UnitLowerInverse.apply((similarity[..., :CHUNK, :] * between).tril(-1))
    solved = inverse @ torch.cat([v * write[..., None], k_write * grown], -1)
    new, readers = solved[..., :value_dim], torch.cat([solved[..., value_dim:], q * grown], -2)

    state = q.new_zeros(batch * heads, key_dim, value_dim)
    if initial_state is not None:
        state = initial_state.to(dtype).flatten(0, 1)
    written, read = [], []
    for new_n, readers_n, keys_n, decay_n in zip(
        new.unbind(0), readers.unbind(0), (k * left).mT.unbind(0), grown[:, :, -1:].unbind(0), strict=True
    ):
        from_state = readers_n @ state
        new_n = new_n - from_state[:, :CHUNK]
        written.append(new_n)
        read.append(from_state[:, CHUNK:])
        state = torch.baddbmm(state * decay_n, keys_n, new_n)
    output = torch.stack(read) + (similarity[..., CHUNK:, :] * between) @ torch.stack(written)

    output = output.reshape(-1, batch, heads, CHUNK, value_dim).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
    final = state.view(batch, heads, key_dim, value_dim) if output_final_state else None
    return output.to(query.dtype).contiguous(), final


class TorchGatedDeltaNet(GatedDeltaNet):
    """Megatron's Gated DeltaNet on its deterministic path, which needs no Triton, with the kernel above."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.deterministic_mode = True
        super().__init__(config, *args, **kwargs)

    def _setup_variant_attrs(self) -> None:
        super()._setup_variant_attrs()
        self.gated_delta_rule = chunk_gated_delta_rule
