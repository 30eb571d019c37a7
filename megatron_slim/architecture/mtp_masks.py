"""Which predictions of MTP heads count."""

from __future__ import annotations

import torch
from torch import Tensor


def shift(values: Tensor, depth: int) -> Tensor:
    """Values ``depth`` positions further on along the last dimension, zeros behind the end.

    >>> shift(torch.tensor([[1, 2, 3]]), 1).tolist()
    [[2, 3, 0]]
    """
    return torch.nn.functional.pad(values[..., depth:], (0, depth))


def mtp_mask(loss_mask: Tensor, depth: int, position_ids: Tensor | None = None) -> Tensor:
    """Where the prediction of MTP depth ``depth`` counts.

    At position i that is token i + 1 + depth. It counts if all predictions of the main head on the way there count, and
    if it is in the document of position i as far as position ids show. Megatron's own MTP loss looks at the main head's
    prediction of that one token alone: from the end of a document it is given the second token of the next one.

    >>> mtp_mask(torch.tensor([[1, 1, 0, 1, 1, 1]]), 1).tolist()
    [[1, 0, 0, 1, 1, 0]]

    Args:
        loss_mask: [b, s], 1 where the main head's prediction counts; with ``--eod-mask-loss`` 0 at a document's end.
        depth: 1 and up.
        position_ids: [b, s] or [1, s]; with ``--reset-position-ids`` they start again at every document.

    Returns:
        [b, s], of the loss mask's type.
    """
    mask = loss_mask
    for ahead in range(1, depth + 1):
        mask = mask * shift(loss_mask, ahead)
    if position_ids is None:
        return mask
    predicted = torch.cat([position_ids[:, 1:], position_ids[:, -1:] + 1], dim=1)  # positions of the main head's tokens
    return mask * (shift(predicted, depth) == position_ids + depth + 1)
