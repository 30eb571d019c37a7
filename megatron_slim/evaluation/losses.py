"""The losses of a model's heads, measured as samples stream through it."""

from __future__ import annotations

import math

import torch.nn.functional as F

from megatron_slim.errors import CheckpointError
from megatron_slim.pruning.streaming import FINAL_NORM, MTP_NORM, StreamingForward

HEAD_ROWS = 512  # positions whose logits are in memory at once: 0.3 GB of fp32 at a vocabulary of 151936
# Norm before a head -> how many positions on the token is that the head predicts.
AHEAD = {FINAL_NORM: 1, MTP_NORM: 2}


class HeadLosses(StreamingForward):
    """Mean cross entropy in nats of every head.

    Attributes:
        losses: that of the main head, then that of each MTP depth.
    """

    losses: tuple[float, ...] = ()

    def leave(self, module: str) -> None:
        """Measure where a head follows."""
        if module in AHEAD:
            self.losses += (self._loss(ahead=AHEAD[module]),)

    def _loss(self, *, ahead: int) -> float:
        weight = self.weight("lm_head")
        targets = self.samples[:, ahead:]
        total = 0.0
        for hidden, wanted in zip(self.batches(), targets.split(self.micro_batch_size), strict=True):
            rows = hidden[:, : targets.shape[1]].reshape(-1, self.shape.hidden_size).split(HEAD_ROWS)
            for chunk, ids in zip(rows, wanted.reshape(-1).split(HEAD_ROWS), strict=True):
                logits = (chunk.to(self.device) @ weight.T).float()
                total += F.cross_entropy(logits, ids.to(self.device), reduction="none").double().sum().item()
        if not math.isfinite(total):
            raise CheckpointError(
                "its loss is not finite", where=str(self.checkpoint.path), fix="its weights are broken"
            )
        return total / targets.numel()
