"""What Megatron takes from flash-linear-attention, in plain PyTorch, for machines without Triton.

Groups of chunks are worked through one after the other, forward and backward: as many as keep what they need in the
cache, because whole-sequence temporaries cost more in page faults than their arithmetic. What does not depend on the
state is computed for all chunks of a group at once; only the states follow one another chunk by chunk. A chunk never
crosses a document.

Shapes: batch B, sequence T, heads H, Z = B * H, chunk length C, chunks of a group G, key and
value dimension K and V.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_slim.compat.causal_convolution import causal_conv1d, documents_of, l2norm

__all__ = ["causal_conv1d", "chunk_gated_delta_rule", "l2norm"]

CHUNK = 32
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


def _copied(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(G, B, H, C, ...) -> (G * Z, C, ...), which is the caller's to change."""
    return x.to(dtype, memory_format=torch.contiguous_format, copy=True).flatten(0, 2)


def _add(x: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """Add a batched product to ``x``; PyTorch's counter of operations does not know `baddbmm_`."""
    return torch.baddbmm(x, left, right, alpha=alpha, out=x)


class _GatedDeltaRule(torch.autograd.Function):
    """All groups in turn; for the backward pass the state before each chunk is kept, and little else."""

    @staticmethod
    def forward(ctx: Any, chunks: _Chunks, keep: bool, *inputs: Tensor) -> Tensor:
        padded = [chunks.pad(x) for x in inputs]
        query, key, value, g, beta = map(_by_chunk, padded)
        output, scale = torch.empty_like(padded[2], dtype=query.dtype), query.shape[-1] ** -0.5
        places, state, kept = _by_chunk(output), _zero_state(query, value), list[Tensor]()
        constants, groups = _Constants.like(state), chunks.groups(state)
        after: list[Tensor | None] = [None] * chunks.number
        if keep:
            stacks = [state.new_empty(each.stop - each.start, *state.shape) for each in groups]
            before = [each for stack in stacks for each in stack.unbind()]
            state, after = before[0], [*before[1:], None]
        for number, chosen in enumerate(groups):
            group = _Group(query[chosen], key[chosen], g[chosen], beta[chosen], constants)
            weighted, inverse = group.triangle()
            wanted = _copied(value[chosen], state.dtype)
            error, read = torch.empty_like(wanted), torch.empty_like(wanted)
            serial = group.chunks(inverse, error, read, after[chosen])
            for at, chunk, part in zip(range(chunks.number)[chosen], serial, wanted.split(len(state)), strict=True):
                if at in chunks.firsts:
                    state.zero_()
                state = chunk.forward(part, state)
            _add(read, weighted[1], error).mul_(scale)
            places[chosen] = read.view(places[chosen].shape)
            kept += [stacks[number], weighted, inverse, error] if keep else []
        ctx.chunks = chunks
        ctx.save_for_backward(*inputs, *kept)
        return chunks.unpad(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        chunks, kept = ctx.chunks, ctx.saved_tensors[5:]
        padded = [chunks.pad(x) for x in (*ctx.saved_tensors[:5], d_output)]
        query, key, value, g, beta, d_read = map(_by_chunk, padded)
        gradients, scale = [torch.empty_like(x) for x in padded[:5]], query.shape[-1] ** -0.5
        places, state = [_by_chunk(x) for x in gradients], _zero_state(query, value)
        constants, groups = _Constants.like(state), chunks.groups(state)
        # Of the states before the chunks of a group, and of the state after it: before the last one is before the next.
        d_states = state.new_zeros(groups[0].stop + 1, *state.shape)
        for number, chosen in reversed(list(enumerate(groups))):
            group = _Group(query[chosen], key[chosen], g[chosen], beta[chosen], constants)
            size = chosen.stop - chosen.start
            d_states[size] = d_states[0]
            firsts = [at in chunks.firsts for at in range(chunks.number)[chosen]]
            d_reads = _copied(d_read[chosen], state.dtype).mul_(scale)
            parts = group.backward(d_reads, d_states[: size + 1], firsts, kept[4 * number : 4 * number + 4])
            for place, part in zip(places, parts, strict=True):
                place[chosen] = part.view(place[chosen].shape)
        return None, None, *map(chunks.unpad, gradients)


def _zero_state(query: Tensor, value: Tensor) -> Tensor:
    """(Z, K, V)."""
    dtype, (_, samples, heads, *_) = torch.promote_types(query.dtype, torch.float32), query.shape
    return query.new_zeros(samples * heads, query.shape[-1], value.shape[-1], dtype=dtype)


class _Constants(NamedTuple):
    """(C, C): ones on and below the diagonal, below it, and on it."""

    lower: Tensor
    below: Tensor
    identity: Tensor

    @classmethod
    def like(cls, x: Tensor) -> _Constants:
        ones = x.new_ones(CHUNK, CHUNK)
        return cls(ones.tril(), ones.tril(-1), torch.eye(CHUNK, dtype=x.dtype, device=x.device))


class _Chunk(NamedTuple):
    """The part of a chunk that needs the state before it: (Z, C, K) thrice, (Z, 1, 1), (Z, C, C), (Z, C, V) twice."""

    keys: Tensor
    queries: Tensor
    writers: Tensor
    decay: Tensor
    inverse: Tensor
    error: Tensor
    read: Tensor
    after: Tensor | None

    def forward(self, value: Tensor, state: Tensor) -> Tensor:
        """The next state, in ``after`` if there is that; fills in ``error``, and what ``read`` has of the state."""
        torch.bmm(self.inverse, _add(value, self.keys, state, alpha=-1), out=self.error)
        torch.bmm(self.queries, state, out=self.read)
        return _add(torch.mul(state, self.decay, out=self.after), self.writers.mT, self.error)


class _Group:
    """Chunks of all heads, in the chunked form of the rule (arXiv 2406.06484, with decay: 2412.06464).

    With D_ij = exp(g_j+1 + ... + g_i) for j <= i, the writers w_j = beta_j k_j, and the errors
    x_i = v_i - exp(g_i) S_{i-1}^T k_i, a chunk is the triangular system
    x_i + sum_{j<i} (k_i w_j) D_ij x_j = v_i - D_i S^T k_i, where D_i decays from the chunk's start. A query reads
    D_i S^T q_i + sum_{j<=i} (q_i w_j) D_ij x_j.
    """

    def __init__(self, query: Tensor, key: Tensor, g: Tensor, beta: Tensor, constants: _Constants) -> None:
        self.constants, dtype = constants, constants.lower.dtype
        self.heads = query.shape[1] * query.shape[2]
        self.query, self.key = _copied(query, dtype), _copied(key, dtype)
        self.write = _copied(beta, dtype)[..., None]
        # Sums of strong decays are large, and their differences small: fp32 would lose what is between neighbours.
        total = _copied(g, torch.float64).cumsum(-1)
        # Masked before exp, too: above the diagonal the difference is positive and could overflow.
        between = (total[:, :, None] - total[:, None, :]).to(dtype).mul_(constants.lower)
        self.between = between.exp_().mul_(constants.lower)
        self.since_start, self.until_end = total.exp_().to(dtype)[..., None], self.between[:, -1:].mT
        self.decay = self.since_start[:, -1:]
        self.writers = self.key * self.write
        self.writers_to_end = self.writers * self.until_end
        self.keys_from_start, self.queries_from_start = self.key * self.since_start, self.query * self.since_start

    def triangle(self) -> tuple[Tensor, Tensor]:
        """Decayed products of keys and of queries with writers, (2, G * Z, C, C), and the inverse of the system."""
        weighted = self.between.new_empty(2, *self.between.shape)
        torch.bmm(self.key, self.writers.mT, out=weighted[0])
        torch.bmm(self.query, self.writers.mT, out=weighted[1])
        weighted *= self.between
        identity = self.constants.identity.expand_as(self.between)
        return weighted, torch.linalg.solve_triangular(weighted[0], identity, upper=False, unitriangular=True)

    def chunks(self, inverse: Tensor, error: Tensor, read: Tensor, after: list[Tensor | None]) -> Iterator[_Chunk]:
        """One after the other."""
        parts = (self.keys_from_start, self.queries_from_start, self.writers_to_end, self.decay, inverse, error, read)
        return map(_Chunk, *(part.split(self.heads) for part in parts), after)

    def backward(self, d_read: Tensor, d_states: Tensor, firsts: list[bool], kept: tuple[Tensor, ...]) -> list[Tensor]:
        """Gradients of query, key, value, g and beta; fills in ``d_states`` (G + 1, Z, K, V) but for the last."""
        states, weighted, inverse, error = kept
        d_value = self._backward_in_turn(d_read, d_states, firsts, weighted[1], inverse)
        after, states = d_states[1:].flatten(0, 1), states.flatten(0, 1)
        d_key = torch.bmm(d_value, states.mT).mul_(-self.since_start)
        d_query = torch.bmm(d_read, states.mT).mul_(self.since_start)
        d_writers = torch.bmm(error, after.mT).mul_(self.until_end)
        d_pairs = torch.empty_like(weighted)
        torch.baddbmm(d_pairs[0], d_value, error.mT, beta=0, alpha=-1, out=d_pairs[0])
        torch.bmm(d_read, error.mT, out=d_pairs[1])
        d_between = (d_pairs[0] * weighted[0]).addcmul_(d_pairs[1], weighted[1])
        d_since_start = (d_key * self.key).addcmul_(d_query, self.query).sum(-1)
        d_until_end = (d_writers * self.writers).sum(-1)
        d_throughout = self.decay[:, 0] * (after * states).flatten(1).sum(1, keepdim=True)
        d_g = self._decay_gradient(d_between, d_since_start, d_until_end).add_(d_throughout)
        d_pairs *= self.between
        d_pairs[0].diagonal(dim1=1, dim2=2).zero_()  # a key does not read its own position
        _add(d_key, d_pairs[0], self.writers)
        _add(d_query, d_pairs[1], self.writers)
        _add(_add(d_writers, d_pairs[0].mT, self.key), d_pairs[1].mT, self.query)
        d_beta = (d_writers * self.key).sum(-1)
        return [d_query, d_key.addcmul_(d_writers, self.write), d_value, d_g, d_beta]

    def _backward_in_turn(
        self, d_read: Tensor, d_states: Tensor, firsts: list[bool], weighted: Tensor, inverse: Tensor
    ) -> Tensor:
        """The gradient of the values; fills in those of the states before the chunks."""
        d_error = torch.bmm(weighted.mT, d_read)
        d_value = torch.empty_like(d_error)
        torch.bmm(self.queries_from_start.mT, d_read, out=d_states[:-1].flatten(0, 1))
        before, parts = (
            d_states.unbind(),
            (self.keys_from_start, self.writers_to_end, self.decay, inverse, d_error, d_value),
        )
        chunks = list(zip(*(part.split(self.heads) for part in parts), before[:-1], before[1:], firsts, strict=True))
        for keys, writers, decay, solved, d_x, d_v, d_before, d_after, is_first in reversed(chunks):
            torch.bmm(solved.mT, _add(d_x, writers, d_after), out=d_v)
            _add(d_before.addcmul_(d_after, decay), keys.mT, d_v, alpha=-1)
            if is_first:
                d_before.zero_()
        return d_value

    def _decay_gradient(self, d_between: Tensor, d_since_start: Tensor, d_until_end: Tensor) -> Tensor:
        """All that position t or a later one reads of what was written before t has decayed by g_t.

        Only such pairs are added up: in a difference of sums over all pairs, rounding would hide strong decays.
        """
        d_g = d_since_start.flip(1).cumsum(1).flip(1)
        crossing = d_between.cumsum(2).mul_(self.constants.below).sum(1).add_(d_until_end.cumsum(1))
        d_g[:, 1:] += crossing[:, :-1]
        return d_g
