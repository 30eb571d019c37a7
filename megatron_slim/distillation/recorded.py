"""A teacher whose hidden states were recorded: of its model there is the output layer, on the last stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_slim.teacher_cache.stored_states import decode


@dataclass(frozen=True)
class StoredStates:
    """How the states of a teacher are stored: their type, of `stored_states.TYPES`, and the teacher's hidden size."""

    kind: str
    hidden_size: int


class RecordedTeacher(nn.Module):
    """The output layer of a teacher, this tensor-parallel rank's rows of it, and how its hidden states are read.

    Attributes:
        weight: [rows, hidden] of the padded vocabulary; in the host's memory where that is asked for.
        stored: how the states are stored.
    """

    def __init__(self, stored: StoredStates, rows: int, dtype: torch.dtype, *, on_host: bool = False) -> None:
        """An output layer without content."""
        super().__init__()
        self.stored, self.on_host = stored, on_host
        pinned = on_host and torch.cuda.is_available()
        device = torch.device("cpu") if on_host else torch.cuda.current_device()
        weight = torch.empty(rows, stored.hidden_size, dtype=dtype, device=device, pin_memory=pinned)
        self.weight = nn.Parameter(weight, requires_grad=False)

    @property
    def output_layer(self) -> RecordedTeacher:
        """Itself: all that there is."""
        return self

    def heads(self, content: Tensor, positions: Tensor | None) -> tuple[Tensor, ...]:
        """Hidden states [s, b, h] of every head, of stored ones.

        Args:
            content: uint8 [b, heads, S, bytes of a row].
            positions: of this rank under context parallelism; None for all.
        """
        if positions is not None:
            content = content[:, :, positions]
        by_head = content.permute(1, 2, 0, 3).contiguous()
        return tuple(decode(by_head, self.stored.kind, self.stored.hidden_size).unbind(0))
