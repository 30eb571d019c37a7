"""What Megatron takes from flash-linear-attention, in plain PyTorch, for machines without Triton.

Groups of chunks are worked through one after the other, forward and backward: as many as keep what they need in the
cache, because whole-sequence temporaries cost more in page bugs than their arithmetic. What does not depend on the
state is computed for all chunks of a group at once; only the states follow one another chunk by chunk. A chunk never
crosses a document.

Shapes: batch B, sequence T, heads H, Z = B * H, chunk length C, chunks of a group G, key and
value dimension K and V.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_slim.aliases import Context
from megatron_slim.compat.causal_convolution import causal_conv1d, documents_of, l2norm
from megatron_slim.compat.delta_rule_chunks import CHUNK, Constants, Group, add, copied

__all__ = ["CHUNK", "causal_conv1d", "chunk_gated_delta_rule", "l2norm"]

# Numbers of a group in its widest temporaries (C, C + K + V); measured: half or four times as many are slower.
GROUP = 1 << 18


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
    inputs = (query, key, value, g, beta)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    output: Tensor = _GatedDeltaRule.apply(_Chunks(query.shape[1], cu_seqlens), keep, *inputs)
    return output, None


class _Chunks:
    """Where positions lie in chunks: every document starts one, and zeros fill its last one up.

    Zeros neither write nor decay: the state passes them unchanged. What they read is dropped.
    """

    def __init__(self, length: int, cu_seqlens: Tensor | None) -> None:
        self.number, self.firsts = 0, set[int]()
        self.documents: list[tuple[slice, slice]] = []  # among the positions, and in the chunks
        for start, stop in documents_of(length, cu_seqlens):
            at = self.number * CHUNK
            self.documents.append((slice(start, stop), slice(at, at + stop - start)))
            self.firsts.add(self.number)
            self.number += -(-(stop - start) // CHUNK)
        self.is_padded = self.number * CHUNK != length

    def pad(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (B, chunks * C, ...)."""
        if not self.is_padded:
            return x
        padded = x.new_zeros(x.shape[0], self.number * CHUNK, *x.shape[2:])
        for positions, places in self.documents:
            padded[:, places] = x[:, positions]
        return padded

    def unpad(self, x: Tensor) -> Tensor:
        """(B, chunks * C, ...) -> (B, T, ...)."""
        return torch.cat([x[:, places] for _, places in self.documents], 1) if self.is_padded else x

    def groups(self, state: Tensor) -> list[slice]:
        """Chunks that are prepared at once."""
        size = max(1, GROUP // (len(state) * CHUNK * (CHUNK + sum(state.shape[1:]))))
        return [slice(first, min(first + size, self.number)) for first in range(0, self.number, size)]


def _by_chunk(x: Tensor) -> Tensor:
    """(B, chunks * C, H, ...) -> (chunks, B, H, C, ...), a view."""
    return x.unflatten(1, (-1, CHUNK)).transpose(2, 3).transpose(0, 1)


class _GatedDeltaRule(torch.autograd.Function):
    """All groups in turn; for the backward pass the state before each chunk is kept, and little else."""

    @staticmethod
    def forward(ctx: Context, chunks: _Chunks, keep: bool, *inputs: Tensor) -> Tensor:
        padded = [chunks.pad(x) for x in inputs]
        query, key, value, g, beta = map(_by_chunk, padded)
        output, scale = torch.empty_like(padded[2], dtype=query.dtype), query.shape[-1] ** -0.5
        places, state, kept = _by_chunk(output), _zero_state(query, value), list[Tensor]()
        constants, groups = Constants.like(state), chunks.groups(state)
        after: list[Tensor | None] = [None] * chunks.number
        if keep:
            stacks = [state.new_empty(each.stop - each.start, *state.shape) for each in groups]
            before = [each for stack in stacks for each in stack.unbind()]
            state, after = before[0], [*before[1:], None]
        for number, chosen in enumerate(groups):
            group = Group(query[chosen], key[chosen], g[chosen], beta[chosen], constants)
            weighted, inverse = group.triangle()
            wanted = copied(value[chosen], state.dtype)
            error, read = torch.empty_like(wanted), torch.empty_like(wanted)
            serial = group.chunks(inverse, error, read, after[chosen])
            for at, chunk, part in zip(range(chunks.number)[chosen], serial, wanted.split(len(state)), strict=True):
                if at in chunks.firsts:
                    state.zero_()
                state = chunk.forward(part, state)
            add(read, weighted[1], error).mul_(scale)
            places[chosen] = read.view(places[chosen].shape)
            kept += [stacks[number], weighted, inverse, error] if keep else []
        ctx.chunks = chunks
        ctx.save_for_backward(*inputs, *kept)
        return chunks.unpad(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, d_output: Tensor) -> tuple[Tensor | None, ...]:
        chunks, kept = ctx.chunks, ctx.saved_tensors[5:]
        padded = [chunks.pad(x) for x in (*ctx.saved_tensors[:5], d_output)]
        query, key, value, g, beta, d_read = map(_by_chunk, padded)
        gradients, scale = [torch.empty_like(x) for x in padded[:5]], query.shape[-1] ** -0.5
        places, state = [_by_chunk(x) for x in gradients], _zero_state(query, value)
        constants, groups = Constants.like(state), chunks.groups(state)
        # Of the states before the chunks of a group, and of the state after it: before the last one is before the next.
        d_states = state.new_zeros(groups[0].stop + 1, *state.shape)
        for number, chosen in reversed(list(enumerate(groups))):
            group = Group(query[chosen], key[chosen], g[chosen], beta[chosen], constants)
            size = chosen.stop - chosen.start
            d_states[size] = d_states[0]
            firsts = [at in chunks.firsts for at in range(chunks.number)[chosen]]
            d_reads = copied(d_read[chosen], state.dtype).mul_(scale)
            parts = group.backward(d_reads, d_states[: size + 1], firsts, kept[4 * number : 4 * number + 4])
            for place, part in zip(places, parts, strict=True):
                place[chosen] = part.view(place[chosen].shape)
        return None, None, *map(chunks.unpad, gradients)


def _zero_state(query: Tensor, value: Tensor) -> Tensor:
    """(Z, K, V)."""
    dtype, (_, samples, heads, *_) = torch.promote_types(query.dtype, torch.float32), query.shape
    return query.new_zeros(samples * heads, query.shape[-1], value.shape[-1], dtype=dtype)
