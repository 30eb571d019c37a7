"""Attention on machines without Transformer Engine: torch's fused one on a CPU, Megatron's own elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import megatron_slim.mcore

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_slim.architecture.context_parallel import positions_of
from megatron_slim.compat.causal_convolution import documents_of


class LocalAttention(DotProductAttention):
    """Megatron's attention, and under context parallelism that of this rank's queries to the keys of all.

    Keys and values are gathered whole, so that their memory does not shrink with the context parallel size as it does
    with Transformer Engine. On a CPU scores of all pairs of positions are never in memory: `torch`'s fused attention
    takes a fraction of the time, and half of the products where the mask is causal.
    """

    def __init__(self, config: TransformerConfig, *args: object, **kwargs: object) -> None:
        whole = copy.copy(config)
        whole.context_parallel_size = 1  # others are refused there
        super().__init__(whole, *args, **kwargs)
        self.context_parallel = config.context_parallel_size > 1
        softmax = self.scale_mask_softmax
        options = self.softmax_offset, softmax.scale, softmax.window_size, self.attention_dropout.p or None
        self.is_plain = all(option is None for option in options)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend causally, or as a mask says whose True hides.

        Args:
            query: [s, b, heads, head dim], of this rank's part of the sequence; of packed documents [s, heads, head
                dim].
            key: [s, b, groups of heads, head dim], likewise.
            value: as the key.
            attention_mask: broadcast to [b, heads, s, s]; None: causal.
            args: as for Megatron's.
            packed_seq_params: bounds of packed documents, each of which attends to itself alone.
            kwargs: as for Megatron's.

        Returns:
            [s, b, heads x head dim].
        """
        if packed_seq_params is not None:
            assert attention_mask is None and not self.context_parallel
            bounds = packed_seq_params.cu_seqlens_q
            each = (slice(*ends) for ends in documents_of(len(query), bounds))
            parts = ([x[place].unsqueeze(1) for x in (query, key, value)] for place in each)
            return torch.cat([self.forward(*part, None, *args, **kwargs) for part in parts])
        if self.context_parallel:
            group = self.pg_collection.cp
            key, value = (gather_from_sequence_parallel_region(each, group=group) for each in (key, value))
            ranks, length = dist.get_world_size(group), len(key)
            of_keys = torch.cat([positions_of(rank, ranks, length) for rank in range(ranks)])
            attention_mask = of_keys[None, :] > positions_of(dist.get_rank(group), ranks, length)[:, None]
        if query.is_cuda or not self.is_plain:
            context: Tensor = super().forward(query, key, value, attention_mask, *args, **kwargs)
            return context
        return self._fused(query, key, value, attention_mask)

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
        context = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=None if hidden is None else ~hidden,
            is_causal=hidden is None,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return context.permute(2, 0, 1, 3).flatten(2)
