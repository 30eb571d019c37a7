"""What a model's heads predict, measured as samples stream through it: losses, and the distance from a teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.reference import SAMPLES
from megatron_slim.errors import CheckpointError
from megatron_slim.products import linear
from megatron_slim.pruning.streaming import FINAL_NORM, MTP_NORM, OUTPUT, StreamingForward

HEAD_ROWS = 512  # positions whose logits are in memory at once: 0.3 GB of fp32 at a vocabulary of 151936

# Norm before a head -> how many positions on the token is that the head predicts.
AHEAD = {FINAL_NORM: 1, MTP_NORM: 2}


@dataclass(frozen=True)
class Head:
    """Means over all tokens that a head predicts.

    Attributes:
        loss: cross entropy in nats.
        teacher_loss: that of the teacher's head.
        kl: KL(teacher || student) in nats.
        top1_agreement: share of the positions at which both have the same most probable token.
    """

    loss: float
    teacher_loss: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None


class FinalStates(StreamingForward):
    """The hidden states that a model's heads are given, kept in the host's memory.

    Attributes:
        wanted: the norms before the heads that count; nothing is computed after the last of them.
        states: by norm, micro-batches [samples, positions, hidden] of its outputs.
    """

    wanted: tuple[str, ...] = tuple(AHEAD)

    def leave(self, module: str) -> None:
        """Keep what a head is given."""
        if module in self.wanted:
            # A copy: the hidden states' memory is used again by the modules that follow.
            self.states[module] = [batch.to("cpu", copy=True) for batch in self.batches()]

    def run(self, description: str) -> None:
        """Pass everything through the model as far as it is wanted."""
        self.states: dict[str, list[Tensor]] = {}
        super().run(description)

    def _modules(self) -> Iterator[str]:
        modules = list(super()._modules())
        last = max(number for number, module in enumerate(modules) if module in self.wanted)
        yield from modules[: last + 1]


class HeadLosses(StreamingForward):
    """What every head predicts, next to what the teacher's head of that kind does where there is one.

    Attributes:
        heads: the main head, then that of each MTP depth.
        token_losses: nats of every token that the main head predicts in the first samples, [samples][sequence - 1].
        teacher: what is compared with, or None.
    """

    heads: tuple[Head, ...] = ()
    token_losses: tuple[tuple[float, ...], ...] = ()
    teacher: FinalStates | None = None

    def leave(self, module: str) -> None:
        """Measure where a head follows."""
        if module in AHEAD:
            self.heads += (self._measure(module),)

    def _measure(self, module: str) -> Head:
        # In fp32 whatever the model computes in: rounded to 16 bits, logits of different tokens become equal.
        weight = self.weight(OUTPUT).float()
        teacher = self.teacher if self.teacher is not None and module in self.teacher.states else None
        their_weight = None if teacher is None else teacher.weight(OUTPUT).float()
        sums, kept = torch.zeros(4, dtype=torch.float64), list[Tensor]()
        positions = self.samples.shape[1] - AHEAD[module]
        for hidden, theirs, ids in self._rows(module, teacher):
            ids = ids.to(self.device)
            own = F.log_softmax(linear(hidden.to(self.device).float(), weight), dim=-1)
            losses = F.nll_loss(own, ids, reduction="none")
            sums[0] += losses.double().sum().item()
            if theirs is not None and their_weight is not None:
                other = F.log_softmax(linear(theirs.to(self.device).float(), their_weight), dim=-1)
                sums[1:] += _distance(own, other, ids).cpu()
            if sum(map(len, kept)) < SAMPLES * positions:
                kept.append(losses.cpu())
        _check_finite(self.checkpoint, sums[0])
        if module == FINAL_NORM:
            by_sample = torch.cat(kept)[: SAMPLES * positions].reshape(-1, positions)
            self.token_losses = tuple(map(tuple, by_sample.tolist()))
        means = (sums / (len(self.samples) * positions)).tolist()
        if teacher is None:
            return Head(means[0])
        _check_finite(teacher.checkpoint, sums[1])
        return Head(*means)

    def _rows(self, module: str, teacher: FinalStates | None) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Hidden states [n, hidden] of the student and of the teacher, and the token ids [n] that they predict."""
        targets = self.samples[:, AHEAD[module] :]
        batches = targets.split(self.micro_batch_size)
        others: Sequence[Tensor | None] = [None] * len(batches) if teacher is None else teacher.states[module]
        for hidden, other, wanted in zip(self.batches(), others, batches, strict=True):
            own, ids = _split(hidden, targets.shape[1]), wanted.reshape(-1).split(HEAD_ROWS)
            yield from zip(
                own, [None] * len(own) if other is None else _split(other, targets.shape[1]), ids, strict=True
            )


def _split(hidden: Tensor, positions: int) -> tuple[Tensor, ...]:
    """The first positions of hidden states [samples, positions, hidden] in chunks of rows."""
    return hidden[:, :positions].reshape(-1, hidden.shape[-1]).split(HEAD_ROWS)


def _distance(own: Tensor, other: Tensor, ids: Tensor) -> Tensor:
    """Sums in fp64 of the teacher's losses, the KL divergences and the equal most probable tokens.

    Args:
        own: log-probabilities [n, vocabulary] of the student.
        other: those of the teacher.
        ids: token ids [n] that are predicted.
    """
    agree = own.argmax(-1) == other.argmax(-1)
    loss = F.nll_loss(other, ids, reduction="none").double().sum()
    # As F.kl_div with log_target, which takes twice the time and memory.
    divergence = (other - own).mul_(other.exp()).sum(-1, dtype=torch.float64).sum()
    return torch.stack([loss, divergence, agree.double().sum()])


def _check_finite(checkpoint: Checkpoint, total: Tensor) -> None:
    if not math.isfinite(total):
        raise CheckpointError("its loss is not finite", where=str(checkpoint.path), fix="its weights are broken")
