"""The product of an output layer: its weight, the tokens that its rows stand for, and how many are computed at once."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slim.distillation.vocabulary import VocabShard
from megatron_slim.products import linear_into

COLUMNS = 1024  # of a product on a CPU: whole ones are slower, by 8% with MKL, by a third with oneDNN (measured)
HOST_ROWS = 1 << 14  # of a weight in the host's memory that are on the device at once
CACHED = 1 << 19  # numbers of a block


@dataclass(frozen=True)
class OutputLayer:
    """A model's output layer: its weight [P, H] and which tokens the rows of it stand for.

    A weight that is ``on_host`` comes to the device in pieces, for every product.
    """

    weight: Tensor
    shard: VocabShard
    on_host: bool = False

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Logits [n, valid] of hidden states [n, H], in ``out``."""
        weight = self.weight[: self.shard.valid]
        if self.on_host:
            for part, columns in zip(weight.split(HOST_ROWS), out.split(HOST_ROWS, dim=1), strict=True):
                columns.copy_(hidden @ part.to(hidden.device, non_blocking=True).t())
            return out
        if not weight.is_cpu:
            return torch.mm(hidden, weight.t(), out=out)
        hidden = hidden.contiguous()
        for part, columns in zip(weight.split(COLUMNS), out.split(COLUMNS, dim=1), strict=True):
            linear_into(hidden, part, columns)  # a piece is in the cache
        return out


def block_rows(layer: OutputLayer) -> int:
    """Rows whose logits, and a few buffers of their size, stay in a CPU's caches (measured); elsewhere all rows.

    So with a vocabulary that is sharded, where every block is several messages.
    """
    if layer.weight.device.type != "cpu" or layer.shard.ranks > 1:
        return sys.maxsize
    return max(1, CACHED // max(1, layer.shard.valid))
