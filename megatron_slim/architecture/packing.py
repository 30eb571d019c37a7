"""Documents packed into one sequence: where they begin, for layers in which each sees nothing of those before it.

Megatron's layers take the bounds as `PackedSeqParams`: full attention and rotary angles then begin anew at every
document, and so do the state and the convolution of Gated DeltaNet. They take one sequence at a time.
"""

from __future__ import annotations

import megatron_slim.mcore

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


def packed_documents(position_ids: Tensor) -> PackedSeqParams:
    """The documents of samples that lie one behind the other in a single sequence.

    Args:
        position_ids: [b, S], 0 where a document begins; a sample begins with one of its own.

    Returns:
        Bounds for Megatron's layers. The longest length is that of a document: Megatron takes rotary angles that are as
        many as the positions of all documents together for those of one text.
    """
    first = torch.zeros_like(position_ids, dtype=torch.bool)
    first[:, 0] = True
    starts = ((position_ids == 0) | first).flatten().nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([position_ids.numel()])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def in_one_sequence(states: Tensor) -> Tensor:
    """Hidden states [S, b, h] as one sequence [b S, 1, h], sample by sample."""
    return states.transpose(0, 1).flatten(0, 1).unsqueeze(1)


def by_sample(states: Tensor, samples: int) -> Tensor:
    """The inverse of `in_one_sequence`."""
    return states.squeeze(1).unflatten(0, (samples, -1)).transpose(0, 1)
