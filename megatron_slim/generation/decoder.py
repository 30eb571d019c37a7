"""A checkpoint that reads tokens a few at a time and remembers them: trunk, output layer and MTP block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_slim.architecture.shape import FULL_ATTENTION, LINEAR_ATTENTION
from megatron_slim.architecture.table import count_parameters
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.generation.cache import Cache, DeltaNetCache, KeyValueCache, LayerCache
from megatron_slim.generation.experts import dense, experts
from megatron_slim.generation.sublayers import Rotary, Sizes, Step, attention, delta_net, norm
from megatron_slim.generation.weights import AttentionWeights, BlockWeights, ExpertWeights, load_weights
from megatron_slim.products import linear, threads_for

SEGMENT = 64  # tokens of a prompt that are read at once


class Decoder:
    """A model in memory as a whole.

    Attributes:
        shape: its sizes.
        device: where it is.
        dtype: of activations, keys and values; states and norms are fp32.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """Load a checkpoint; ``dtype`` is that of weights and activations."""
        self.shape, self.dtype = checkpoint.shape, dtype
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.weights = load_weights(checkpoint, dtype, self.device)
        self._sizes = Sizes.of(self.shape)
        self._rotary = Rotary(self.shape, 0, self.device)
        self._order = torch.arange(0, device=self.device)

    @contextlib.contextmanager
    def running(self, sequences: int) -> Iterator[None]:
        """Without autograd, with as many threads as steps of a token of so many sequences are worth."""
        flops = 2 * sequences * count_parameters(self.shape).active
        with torch.inference_mode(), threads_for(flops):
            yield

    def new_cache(self, batch: int, places: int, *, drafting: bool) -> Cache:
        """An empty cache of sequences of up to ``places`` tokens; ``drafting``: the MTP block's too."""
        if places > len(self._order):
            self._rotary = Rotary(self.shape, places, self.device)
            self._order = torch.arange(places, device=self.device)
        layers = [self._layer_cache(kind, batch, places) for kind in self.shape.layer_types]
        mtp = self._keys_and_values(batch, places) if drafting else None
        return Cache(layers, mtp, [0] * batch)

    def read(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Hidden states [B, T, H] of the next tokens [B, T] of sequences, after the final norm.

        Of one token the cache has everything afterwards; of several `Cache.keep` decides how many stay.
        """
        step = self._step(cache.lengths, tokens.shape[1], cache)
        hidden = self.weights.embedding.index_select(0, tokens.flatten())
        for weights, layer in zip(self.weights.blocks, cache.layers, strict=True):
            hidden = self._block(hidden, weights, step, layer)
        return norm(hidden, self.weights.norm, self._sizes.epsilon).view(*tokens.shape, -1)

    def read_mtp(self, hidden: Tensor, tokens: Tensor, starts: Sequence[int], cache: KeyValueCache) -> Tensor:
        """Hidden states [B, T, H] of the MTP block, after its norm: from those at its positions and the next tokens.

        Args:
            hidden: of the trunk, or of the block itself at the position before [B, T, H].
            tokens: at position j the token j + 1 [B, T].
            starts: first position of each sequence.
            cache: of the block; positions from the first on are overwritten.
        """
        mtp, epsilon = self.weights.mtp, self._sizes.epsilon
        assert mtp is not None
        step = self._step(starts, tokens.shape[1], cache)
        embedded = norm(self.weights.embedding.index_select(0, tokens.flatten()), mtp.embedding_norm, epsilon)
        pair = torch.cat((embedded, norm(hidden.flatten(0, 1), mtp.hidden_norm, epsilon)), -1)
        found = self._block(linear(pair, mtp.projection), mtp.block, step, cache)
        return norm(found, mtp.norm, epsilon).view(hidden.shape)

    def best(self, hidden: Tensor) -> Tensor:
        """The most probable token after each of some hidden states [.., H]."""
        return linear(hidden.flatten(0, -2), self.weights.head).argmax(-1).view(hidden.shape[:-1])

    def _block(self, hidden: Tensor, weights: BlockWeights, step: Step, cache: LayerCache) -> Tensor:
        if isinstance(weights.mixer, AttentionWeights):
            assert isinstance(cache, KeyValueCache)
            hidden = hidden + attention(hidden, weights.mixer, self._sizes, step, cache)
        else:
            assert isinstance(cache, DeltaNetCache)
            hidden = hidden + delta_net(hidden, weights.mixer, self._sizes, step, cache)
        if isinstance(weights.network, ExpertWeights):
            return hidden + experts(hidden, weights.network, self._sizes)
        return hidden + dense(hidden, weights.network, self._sizes)

    def _step(self, starts: Sequence[int], length: int, cache: Cache | KeyValueCache) -> Step:
        batch, end = len(starts), max(starts) + length
        first = torch.tensor(starts, device=self.device)[:, None]
        positions = first + self._order[:length]
        rows = positions.flatten()
        mask = None
        if length > 1 or min(starts) != max(starts):
            hidden = self._order[:end] > positions[..., None]
            added = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, -torch.inf)
            mask = added[:, None, None].expand(-1, -1, self._sizes.queries, -1, -1).reshape(batch, 1, -1, end)
        return Step(
            batch=batch,
            length=length,
            places=rows if batch == 1 else (positions + cache.places * _rows(batch, self.device)).flatten(),
            cos=self._rotary.cos.index_select(0, rows)[:, None, None],
            sin=self._rotary.sin.index_select(0, rows)[:, None, None],
            partner=self._rotary.partner,
            end=end,
            mask=mask,
        )

    def _layer_cache(self, kind: str, batch: int, places: int) -> LayerCache:
        makers: dict[str, Callable[[int, int], LayerCache]]
        makers = {FULL_ATTENTION: self._keys_and_values, LINEAR_ATTENTION: self._delta_net_state}
        return makers[kind](batch, places)

    def _delta_net_state(self, batch: int, places: int) -> DeltaNetCache:
        shape = self.shape
        keys, values = shape.linear_key_head_dim, shape.linear_value_head_dim
        channels = 2 * shape.linear_num_key_heads * keys + shape.linear_num_value_heads * values
        width = shape.linear_conv_kernel_dim - 1
        window = torch.zeros(batch, width, channels, dtype=self.dtype, device=self.device)
        state = torch.zeros(batch, shape.linear_num_value_heads, keys, values, device=self.device)
        return DeltaNetCache(window, state)

    def _keys_and_values(self, batch: int, places: int) -> KeyValueCache:
        size = (batch, places, self.shape.num_query_groups, self.shape.kv_channels)
        keys, values = (torch.zeros(size, dtype=self.dtype, device=self.device) for _ in range(2))
        return KeyValueCache(keys, values)


def _rows(batch: int, device: torch.device) -> Tensor:
    return torch.arange(batch, device=device)[:, None]
