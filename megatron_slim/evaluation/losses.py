"""What a model's heads predict, measured as samples stream through it: losses, and the distance from a teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_slim.architecture.table import OUTPUT
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.reference import SAMPLES
from megatron_slim.errors import CheckpointError
from megatron_slim.evaluation.means import Mean, SampleMeans
from megatron_slim.products import linear
from megatron_slim.streaming.forward import FINAL_NORM, MTP_NORM, StreamingForward
from megatron_slim.streaming.model_input import Samples

HEAD_ROWS = 512  # positions whose logits are in memory at once: 0.3 GB of fp32 at a vocabulary of 151936

# Norm before a head -> how many positions on the token is that the head predicts.
AHEAD = {FINAL_NORM: 1, MTP_NORM: 2}
# Hidden states [n, hidden] of the student and of the teacher, if there is one, and the token ids [n] they predict.
Chunk: TypeAlias = tuple[Tensor, Tensor | None, Tensor]


@dataclass(frozen=True)
class Head:
    """Means over all tokens that a head predicts.

    Attributes:
        loss: cross entropy in nats.
        teacher_loss: that of the teacher's head.
        difference: the first less the second, whose error is that of differences on the same samples.
        kl: KL(teacher || student) in nats.
        top1_agreement: share of the positions at which both have the same most probable token.
    """

    loss: Mean
    teacher_loss: Mean | None = None
    difference: Mean | None = None
    kl: Mean | None = None
    top1_agreement: Mean | None = None


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
        token_losses: nats of every token that the main head predicts in the first samples, [samples][tokens].
        teacher: what is compared with, or None.
    """

    heads: tuple[Head, ...] = ()
    token_losses: tuple[tuple[float, ...], ...] = ()
    teacher: FinalStates | None = None

    def __init__(self, checkpoint: Checkpoint, samples: Samples, *, micro_batch_size: int, dtype: torch.dtype) -> None:
        """As `StreamingForward`, of what a model reads of the samples."""
        super().__init__(
            checkpoint,
            samples.read,
            micro_batch_size=micro_batch_size,
            dtype=dtype,
            position_ids=samples.documents,
        )
        self._asked = samples

    def leave(self, module: str) -> None:
        """Measure where a head follows."""
        if module in AHEAD:
            self.heads += (self._measure(module),)

    def _measure(self, module: str) -> Head:
        # In fp32 whatever the model computes in: rounded to 16 bits, logits of different tokens become equal.
        weight = self.weight(OUTPUT).float()
        teacher = self.teacher if self.teacher is not None and module in self.teacher.states else None
        their_weight = None if teacher is None else teacher.weight(OUTPUT).float()
        means, kept = SampleMeans(), list[tuple[float, ...]]()
        for chunks, counts in self._batches(module, teacher):
            figures = torch.cat([_figures(chunk, weight, their_weight) for chunk in chunks], dim=1)
            means.add(figures, counts)
            if len(kept) < SAMPLES:
                kept += [tuple(part.tolist()) for part in figures[0].split(counts)]
        _check_finite(self.checkpoint, means.sums[0])
        if teacher is not None:
            _check_finite(teacher.checkpoint, means.sums[1])
        if module == FINAL_NORM:
            self.token_losses = tuple(kept[:SAMPLES])
        return Head(*means.result())

    def _batches(self, module: str, teacher: FinalStates | None) -> Iterator[tuple[list[Chunk], list[int]]]:
        """What predicts the tokens of every micro-batch that count, in chunks of rows, and how many a sample has."""
        targets, counted = torch.from_numpy(self._asked.ids[:, AHEAD[module] :]), self._asked.counted(AHEAD[module])
        batches = targets.split(self.micro_batch_size)
        masks = [None] * len(batches) if counted is None else counted.split(self.micro_batch_size)
        others: Sequence[Tensor | None] = [None] * len(batches) if teacher is None else teacher.states[module]
        for hidden, other, wanted, mask in zip(self.batches(), others, batches, masks, strict=True):
            own, ids = _split(hidden, mask, wanted.shape), _split(wanted, mask, wanted.shape)
            theirs = [None] * len(own) if other is None else _split(other, mask, wanted.shape)
            counts = [wanted.shape[1]] * len(wanted) if mask is None else mask.sum(1).tolist()
            yield list(zip(own, theirs, ids, strict=True)), counts


def _split(values: Tensor, mask: Tensor | None, size: tuple[int, ...]) -> tuple[Tensor, ...]:
    """What is at the positions that count, or at the first ones, of values [samples, positions, ...], in chunks.

    Args:
        values: of every position.
        mask: bool, of this size; None: all count.
        size: samples, and positions that predict.
    """
    rows = values[:, : size[1]].flatten(0, 1)
    if mask is not None:
        rows = rows[mask.flatten().to(rows.device)]
    return rows.split(HEAD_ROWS)


def _figures(chunk: Chunk, weight: Tensor, their_weight: Tensor | None) -> Tensor:
    """What a `Head` has the means of, for every token: fp64 [figures, n], in the host's memory.

    Args:
        chunk: what predicts n tokens.
        weight: of the student's head, [vocabulary, hidden].
        their_weight: of the teacher's.
    """
    hidden, theirs, ids = chunk
    ids = ids.to(weight.device)
    own = F.log_softmax(linear(hidden.to(weight.device).float(), weight), dim=-1)
    loss = F.nll_loss(own, ids, reduction="none").double()
    if theirs is None or their_weight is None:
        return loss[None].cpu()
    other = F.log_softmax(linear(theirs.to(weight.device).float(), their_weight), dim=-1)
    their_loss = F.nll_loss(other, ids, reduction="none").double()
    agree = (own.argmax(-1) == other.argmax(-1)).double()
    # As F.kl_div with log_target, which takes twice the time and memory.
    divergence = (other - own).mul_(other.exp()).sum(-1, dtype=torch.float64)
    return torch.stack([loss, their_loss, loss - their_loss, divergence, agree]).cpu()


def _check_finite(checkpoint: Checkpoint, total: Tensor) -> None:
    if not math.isfinite(total):
        raise CheckpointError("its loss is not finite", where=str(checkpoint.path), fix="its weights are broken")
