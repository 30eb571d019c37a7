"""What Megatron takes from flash-linear-attention, in plain PyTorch, for machines without Triton.

Chunks are worked through one after the other, forward and backward, so that what a chunk needs stays in the cache:
whole-sequence temporaries cost more in page faults than their arithmetic. A chunk never crosses a document.

Shapes: batch B, sequence T, heads H, Z = B * H, chunk length C, key dimension K, value dimension V.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 32


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x`` over its Euclidean norm on the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


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
    width, documents = weight.shape[1], []
    for start, stop in _documents(x.shape[1], cu_seqlens):
        padded = F.pad(x[:, start:stop], (0, 0, width - 1, 0))
        taps = [padded[:, tap : tap + stop - start] * weight[:, tap] for tap in range(width)]
        documents.append(sum(taps[1:], taps[0]))
    convolved = torch.cat(documents, 1)
    return F.silu(convolved if bias is None else convolved + bias), None


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
) -> tuple[Tensor, None]:
    """The gated delta rule (arXiv 2412.06464), in fp32 (fp64 for fp64 inputs).

    Per head, S_t = exp(g_t) S_{t-1} + k_t (x) beta_t (v_t - exp(g_t) S_{t-1}^T k_t) and o_t = S_t^T q_t / sqrt(K);
    S is zero where a document starts. Nothing is kept for a backward pass under `torch.no_grad`.

    Args:
        query: (B, T, H, K).
        key: (B, T, H, K), normalised.
        value: (B, T, H, V).
        g: (B, T, H), logarithm of the decay, at most 0.
        beta: (B, T, H), writing strength.
        initial_state: not supported.
        output_final_state: not supported.
        use_qk_l2norm_in_kernel: not supported; Megatron normalises before.
        cu_seqlens: (documents + 1,), where packed documents start and the last one ends; B is then 1.

    Returns:
        (B, T, H, V) in the dtype of ``query``, and None, the final state.
    """
    assert initial_state is None and not output_final_state and not use_qk_l2norm_in_kernel
    chunks = [
        (first, min(first + CHUNK, stop), first == start)
        for start, stop in _documents(query.shape[1], cu_seqlens)
        for first in range(start, stop, CHUNK)
    ]
    inputs = (query, key, value, g, beta)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    output: Tensor = _GatedDeltaRule.apply(chunks, keep, *inputs)
    return output, None


def _documents(length: int, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """Start and end of every document; empty ones are left out."""
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == length, f"documents {bounds} of {length} positions"
    return [(start, stop) for start, stop in pairwise(bounds) if start < stop]


class _GatedDeltaRule(torch.autograd.Function):
    """All chunks in turn; for the backward pass the state before each of them is kept, and little else."""

    @staticmethod
    def forward(ctx: Any, chunks: list[tuple[int, int, bool]], keep: bool, *inputs: Tensor) -> Tensor:
        query, key, value, g, beta = map(_by_head, inputs)
        output, scale = torch.empty_like(inputs[2], dtype=query.dtype), query.shape[-1] ** -0.5
        state, kept = _zero_state(query, value), []
        for start, stop, is_first in chunks:
            if is_first:
                state = torch.zeros_like(state)
            chunk = _Chunk(query[:, start:stop], key[:, start:stop], g[:, start:stop], beta[:, start:stop])
            read, next_state, needed = chunk.forward(value[:, start:stop].to(state.dtype), state)
            _write(output, start, stop, read * scale)
            kept += [state, *needed] if keep else []
            state = next_state
        ctx.chunks = chunks
        ctx.save_for_backward(*inputs, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        inputs, kept = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        query, key, value, g, beta, d_read = map(_by_head, (*inputs, d_output))
        gradients, scale = [torch.empty_like(x) for x in inputs], query.shape[-1] ** -0.5
        d_state = _zero_state(query, value)
        for number, (start, stop, is_first) in reversed(list(enumerate(ctx.chunks))):
            chunk = _Chunk(query[:, start:stop], key[:, start:stop], g[:, start:stop], beta[:, start:stop])
            d_chunk, d_state = chunk.backward(
                d_read[:, start:stop].to(d_state.dtype) * scale, d_state, *kept[4 * number : 4 * number + 4]
            )
            for gradient, part in zip(gradients, d_chunk, strict=True):
                _write(gradient, start, stop, part)
            if is_first:
                d_state = torch.zeros_like(d_state)
        return None, None, *gradients


def _by_head(x: Tensor) -> Tensor:
    """(B, T, H, ...) -> (Z, T, ...), a view for a batch of one."""
    return x.transpose(1, 2).flatten(0, 1)


def _write(into: Tensor, start: int, stop: int, chunk: Tensor) -> None:
    """Put (Z, C, ...) at its positions of (B, T, H, ...)."""
    place = into[:, start:stop].transpose(1, 2)
    place.copy_(chunk.view(place.shape))


def _zero_state(query: Tensor, value: Tensor) -> Tensor:
    """(Z, K, V)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_zeros(query.shape[0], query.shape[-1], value.shape[-1], dtype=dtype)


class _Chunk:
    """One chunk of all heads, in the chunked form of the rule (arXiv 2406.06484, with decay: 2412.06464).

    Keys read the state for what is to be corrected, queries for the output, in the same way; so they are stacked as
    ``readers`` (Z, 2C, K), the keys first. With D_ij = exp(g_j+1 + ... + g_i) for j <= i, b = beta, and the errors
    x_i = v_i - exp(g_i) S_{i-1}^T k_i, the chunk is the triangular system
    x_i + sum_{j<i} (k_i k_j) D_ij b_j x_j = v_i - D_i S^T k_i, where D_i decays from the chunk's start.
    """

    def __init__(self, query: Tensor, key: Tensor, g: Tensor, beta: Tensor) -> None:
        dtype, self.length = torch.promote_types(query.dtype, torch.float32), query.shape[1]
        self.key = key.to(dtype)
        self.readers = torch.cat([self.key, query.to(dtype)], 1)
        self.write = beta.to(dtype)[..., None]
        # Sums of strong decays are large, and their differences small: fp32 would lose what is between neighbours.
        total = g.double().cumsum(-1)
        later = torch.ones(self.length, self.length, dtype=torch.bool, device=g.device).triu(1)
        # Masked before exp: above the diagonal the difference is positive and could overflow.
        between = (total[:, :, None] - total[:, None, :]).to(dtype)
        self.between = between.masked_fill_(later, float("-inf")).exp_()
        self.weights = self.between * self.write.mT
        self.until_end = self.between[:, -1:].mT
        self.since_start = torch.cat([total, total], 1).exp().to(dtype)[..., None]

    def forward(self, value: Tensor, state: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What the queries read (Z, C, V), the next state (Z, K, V), and what `backward` needs besides the state."""
        similarity = self.readers @ self.key.mT
        weighted = similarity.unflatten(1, (2, self.length)) * self.weights[:, None]
        identity = torch.eye(self.length, dtype=value.dtype, device=value.device).expand_as(self.weights)
        inverse = torch.linalg.solve_triangular(weighted[:, 0], identity, upper=False, unitriangular=True)
        from_state = (self.readers @ state) * self.since_start
        error = inverse @ (value - from_state[:, : self.length])
        read = torch.baddbmm(from_state[:, self.length :], weighted[:, 1], error)
        writers = (self.key * self.until_end).mT
        next_state = torch.baddbmm(state * self.since_start[:, -1:], writers, error * self.write)
        return read, next_state, [similarity, inverse, error]

    def backward(
        self, d_read: Tensor, d_state: Tensor, state: Tensor, similarity: Tensor, inverse: Tensor, error: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Gradients of query, key, value, g and beta, and of the state before, from those of read and next state."""
        similarity, written = similarity.unflatten(1, (2, self.length)), error * self.write
        d_written = (self.key * self.until_end) @ d_state  # by way of the next state alone
        d_error = torch.baddbmm(d_written * self.write, (similarity[:, 1] * self.weights).mT, d_read)
        d_value = inverse.mT @ d_error
        d_from = torch.cat([-d_value, d_read], 1)
        pairs = (d_from @ error.mT).unflatten(1, (2, self.length))
        pairs[:, 0].tril_(-1)
        d_similarity = (pairs * self.weights[:, None]).flatten(1, 2)
        d_between = (pairs * similarity).sum(1) * self.between
        d_beta = d_between.sum(1) + (d_written * error).sum(-1)

        d_from *= self.since_start
        d_readers = d_from @ state.mT
        d_since_start = (d_readers * self.readers).sum(-1).unflatten(1, (2, self.length)).sum(1)
        d_until_end = (d_written * written).sum(-1)
        d_throughout = self.since_start[:, -1] * (d_state * state).sum((1, 2))[:, None]
        # Rows read, the next state last; columns were written, the state before first. What position t or a later one
        # reads of what was written before t has decayed by g_t.
        rows = torch.cat([d_since_start[..., None], d_between * self.write.mT], 2)
        last = torch.cat([d_throughout, d_until_end], 1)
        d_decays = torch.cat([rows, last[:, None]], 1).flip(1).cumsum(1).flip(1)
        d_g = d_decays[:, :-1].tril().sum(-1)

        d_readers = torch.baddbmm(d_readers, d_similarity, self.key)
        d_writers = torch.baddbmm(d_similarity.mT @ self.readers, written * self.until_end, d_state.mT)
        d_query, d_key = d_readers[:, self.length :], d_readers[:, : self.length] + d_writers
        d_before = torch.baddbmm(d_state * self.since_start[:, -1:], self.readers.mT, d_from)
        return (d_query, d_key, d_value, d_g, d_beta), d_before
