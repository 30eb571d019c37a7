"""Which part of a sequence a context-parallel rank has.

Of a sequence in 2 C chunks rank r of C has chunks r and 2 C - 1 - r, so that all have as much to attend to under a
causal mask. That is how Megatron-Core and Transformer Engine divide it, for rotary embeddings and Gated DeltaNet too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def positions_of(rank: int, ranks: int, length: int) -> Tensor:
    """Positions [length / ranks] in the whole sequence of what a context-parallel rank has.

    >>> positions_of(0, 2, 8).tolist(), positions_of(1, 2, 8).tolist()
    ([0, 1, 6, 7], [2, 3, 4, 5])
    """
    chunks = torch.arange(length, device=torch.cuda.current_device()).chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


def local_positions(group: dist.ProcessGroup | None, length: int) -> Tensor | None:
    """Those of this rank; None where it has the whole sequence."""
    if group is None or dist.get_world_size(group) == 1:
        return None
    return positions_of(dist.get_rank(group), dist.get_world_size(group), length)


def local_slice(values: Tensor, positions: Tensor | None) -> Tensor:
    """What is at ``positions`` (from `local_positions`) of values [..., length]."""
    return values if positions is None else values[..., positions]
