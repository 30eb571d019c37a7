"""The losses of a model's heads, measured as samples stream through it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_slim.checkpoint.reference import SAMPLES
from megatron_slim.errors import CheckpointError
from megatron_slim.products import linear
from megatron_slim.pruning.streaming import FINAL_NORM, MTP_NORM, StreamingForward

HEAD_ROWS = 512  # positions whose logits are in memory at once: 0.3 GB of fp32 at a vocabulary of 151936
# Norm before a head -> how many positions on the token is that the head predicts.
AHEAD = {FINAL_NORM: 1, MTP_NORM: 2}


class HeadLosses(StreamingForward):
    """Mean cross entropy in nats of every head.

    Attributes:
        losses: that of the main head, then that of each MTP depth.
        token_losses: those of every token that the main head predicts in the first samples, [samples][sequence - 1].
    """

    losses: tuple[float, ...] = ()
    token_losses: tuple[tuple[float, ...], ...] = ()

    def leave(self, module: str) -> None:
        """Measure where a head follows."""
        if module in AHEAD:
            self.losses += (self._loss(ahead=AHEAD[module]),)

    def _loss(self, *, ahead: int) -> float:
        weight = self.weight("lm_head")
        targets = self.samples[:, ahead:]
        total, kept = 0.0, list[Tensor]()
        for hidden, wanted in zip(self.batches(), targets.split(self.micro_batch_size), strict=True):
            rows = hidden[:, : targets.shape[1]].reshape(-1, self.shape.hidden_size).split(HEAD_ROWS)
            for chunk, ids in zip(rows, wanted.reshape(-1).split(HEAD_ROWS), strict=True):
                logits = linear(chunk.to(self.device), weight).float()
                found = F.cross_entropy(logits, ids.to(self.device), reduction="none")
                total += found.double().sum().item()
                if sum(map(len, kept)) < SAMPLES * targets.shape[1]:
                    kept.append(found.cpu())
        if not math.isfinite(total):
            raise CheckpointError(
                "its loss is not finite", where=str(self.checkpoint.path), fix="its weights are broken"
            )
        if ahead == AHEAD[FINAL_NORM]:
            by_sample = torch.cat(kept)[: SAMPLES * targets.shape[1]].reshape(-1, targets.shape[1])
            self.token_losses = tuple(map(tuple, by_sample.tolist()))
        return total / targets.numel()
