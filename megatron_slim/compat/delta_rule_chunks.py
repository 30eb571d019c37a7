"""The arithmetic of the gated delta rule within chunks, forward and backward.

Shapes: as in `linear_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 32


def copied(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(G, B, H, C, ...) -> (G * Z, C, ...), which is the caller's to change."""
    return x.to(dtype, memory_format=torch.contiguous_format, copy=True).flatten(0, 2)


def add(x: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """Add a batched product to ``x``; PyTorch's counter of operations does not know `baddbmm_`."""
    return torch.baddbmm(x, left, right, alpha=alpha, out=x)


class Constants(NamedTuple):
    """(C, C): ones on and below the diagonal, below it, and on it."""

    lower: Tensor
    below: Tensor
    identity: Tensor

    @classmethod
    def like(cls, x: Tensor) -> Constants:
        """In the dtype of ``x``, where it is."""
        ones = x.new_ones(CHUNK, CHUNK)
        return cls(ones.tril(), ones.tril(-1), torch.eye(CHUNK, dtype=x.dtype, device=x.device))


class Chunk(NamedTuple):
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
        torch.bmm(self.inverse, add(value, self.keys, state, alpha=-1), out=self.error)
        torch.bmm(self.queries, state, out=self.read)
        return add(torch.mul(state, self.decay, out=self.after), self.writers.mT, self.error)


class Group:
    """Chunks of all heads, in the chunked form of the rule (arXiv 2406.06484, with decay: 2412.06464).

    With D_ij = exp(g_j+1 + ... + g_i) for j <= i, the writers w_j = beta_j k_j, and the errors
    x_i = v_i - exp(g_i) S_{i-1}^T k_i, a chunk is the triangular system
    x_i + sum_{j<i} (k_i w_j) D_ij x_j = v_i - D_i S^T k_i, where D_i decays from the chunk's start. A query reads
    D_i S^T q_i + sum_{j<=i} (q_i w_j) D_ij x_j.
    """

    def __init__(self, query: Tensor, key: Tensor, g: Tensor, beta: Tensor, constants: Constants) -> None:
        self.constants, dtype = constants, constants.lower.dtype
        self.heads = query.shape[1] * query.shape[2]
        self.query, self.key = copied(query, dtype), copied(key, dtype)
        self.write = copied(beta, dtype)[..., None]
        # Sums of strong decays are large, and their differences small: fp32 would lose what is between neighbours.
        total = copied(g, torch.float64).cumsum(-1)
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

    def chunks(self, inverse: Tensor, error: Tensor, read: Tensor, after: list[Tensor | None]) -> Iterator[Chunk]:
        """One after the other."""
        parts = (self.keys_from_start, self.queries_from_start, self.writers_to_end, self.decay, inverse, error, read)
        return map(Chunk, *(part.split(self.heads) for part in parts), after)

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
        add(d_key, d_pairs[0], self.writers)
        add(d_query, d_pairs[1], self.writers)
        add(add(d_writers, d_pairs[0].mT, self.key), d_pairs[1].mT, self.query)
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
            torch.bmm(solved.mT, add(d_x, writers, d_after), out=d_v)
            add(d_before.addcmul_(d_after, decay), keys.mT, d_v, alpha=-1)
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
