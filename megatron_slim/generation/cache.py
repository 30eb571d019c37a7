"""What decoding remembers of the tokens before: keys and values, and the states of Gated DeltaNet.

Shapes: B sequences, L places for tokens of each, G groups, D of a head; W width of the convolution, C its channels;
Z = B * value heads, K and V size of keys and values; T tokens of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class KeyValueCache:
    """Keys and values [B, L, G, D] of attention. What lies behind a sequence's end is overwritten before it is read."""

    keys: Tensor
    values: Tensor

    @property
    def places(self) -> int:
        """L."""
        return self.keys.shape[1]

    def select(self, rows: Tensor) -> KeyValueCache:
        """Some of the sequences, one also several times."""
        return KeyValueCache(self.keys[rows], self.values[rows])

    @staticmethod
    def join(parts: Sequence[KeyValueCache]) -> KeyValueCache:
        """The sequences of all."""
        return KeyValueCache(torch.cat([part.keys for part in parts]), torch.cat([part.values for part in parts]))


class Written(NamedTuple):
    """What a step of several tokens would write, until it is known how many of them stay.

    Attributes:
        window: inputs of the convolution, those of before and the step's [B, W - 1 + T, C].
        keys: [Z, T, K].
        errors: what is written at each key [Z, T, V].
        decay: sum of the logarithms of decay up to and with each token, [Z, T], fp64.
    """

    window: Tensor
    keys: Tensor
    errors: Tensor
    decay: Tensor


@dataclass
class DeltaNetCache:
    """The last inputs of the convolution [B, W - 1, C] and the recurrent state [B, value heads, K, V], fp32."""

    window: Tensor
    state: Tensor
    written: Written | None = None

    def keep(self, counts: Tensor | None) -> None:
        """Write the first tokens of the last step: so many of each sequence [B], at least one; None is all.

        The state after n tokens is the one before them, decayed, and the sum of what these wrote, decayed since: no
        state in between is ever made.
        """
        if self.written is None:
            return
        window, keys, errors, decay = self.written
        self.written, width, heads = None, self.window.shape[1], self.state.shape[1]
        if counts is None:
            self.window, total = window[:, window.shape[1] - width :], decay[:, -1:]
            since = (total - decay).exp()
        else:
            places = counts[:, None] + torch.arange(width, device=counts.device)
            self.window = window.gather(1, places[..., None].expand(-1, -1, window.shape[2]))
            last = counts.repeat_interleave(heads)[:, None] - 1
            total, order = decay.gather(1, last), torch.arange(decay.shape[1], device=counts.device)
            since = (total - decay).masked_fill(order > last, -torch.inf).exp()
        state = self.state.flatten(0, 1)
        state.mul_(total.exp().to(state.dtype)[..., None])
        state.baddbmm_((keys * since.to(keys.dtype)[..., None]).transpose(1, 2), errors)

    def select(self, rows: Tensor) -> DeltaNetCache:
        """Some of the sequences."""
        assert self.written is None
        return DeltaNetCache(self.window[rows], self.state[rows])

    @staticmethod
    def join(parts: Sequence[DeltaNetCache]) -> DeltaNetCache:
        """The sequences of all."""
        return DeltaNetCache(torch.cat([part.window for part in parts]), torch.cat([part.state for part in parts]))


LayerCache = KeyValueCache | DeltaNetCache


@dataclass
class Cache:
    """Everything remembered of some sequences.

    Attributes:
        layers: of the trunk.
        mtp: of the MTP block; None where nothing drafts.
        lengths: tokens of each sequence that the trunk has read.
    """

    layers: list[LayerCache]
    mtp: KeyValueCache | None
    lengths: list[int] = field(default_factory=list)

    def keep(self, counts: Sequence[int] | None, length: int) -> None:
        """Take the first ``counts`` of the ``length`` tokens of the last step for read; None is all of them."""
        kept = None if counts is None or min(counts) == length else torch.tensor(counts, device=self.device)
        for layer in self.layers:
            if isinstance(layer, DeltaNetCache):
                layer.keep(kept)
        added = [length] * len(self.lengths) if counts is None else counts
        self.lengths = [before + more for before, more in zip(self.lengths, added, strict=True)]

    @property
    def places(self) -> int:
        """L."""
        return self._attention.places

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._attention.keys.device

    @property
    def _attention(self) -> KeyValueCache:
        """The first layer of full attention; every model has one."""
        return next(layer for layer in self.layers if isinstance(layer, KeyValueCache))

    def select(self, rows: Sequence[int]) -> Cache:
        """Some of the sequences, in this order."""
        chosen = torch.tensor(rows, device=self.device)
        mtp = None if self.mtp is None else self.mtp.select(chosen)
        return Cache([layer.select(chosen) for layer in self.layers], mtp, [self.lengths[row] for row in rows])


def join(caches: Sequence[Cache]) -> Cache:
    """The sequences of all, in order."""
    layers: list[LayerCache] = []
    for parts in zip(*(cache.layers for cache in caches), strict=True):
        if isinstance(parts[0], KeyValueCache):
            layers.append(KeyValueCache.join(parts))
        else:
            layers.append(DeltaNetCache.join(parts))
    drafting = [cache.mtp for cache in caches if cache.mtp is not None]
    lengths = [length for cache in caches for length in cache.lengths]
    return Cache(layers, KeyValueCache.join(drafting) if drafting else None, lengths)
