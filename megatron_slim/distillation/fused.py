"""Output layer, language-model loss and distillation loss of all heads in one, a chunk of tokens at a time.

Logits of neither model exist for more tokens than a chunk has. Where the caller knows what backward will be given, as
a training step does, a chunk's gradient follows its losses at once, so that logits are computed once; otherwise they
are computed again in backward. The gradient of the weight goes into Megatron's ``main_grad`` where there is one.

Shapes: T = s b rows, sequence first; H, Ht hidden sizes; P = this tensor-parallel rank's columns of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_slim.distillation.divergences import KDLoss
from megatron_slim.distillation.vocabulary import VocabShard
from megatron_slim.distillation.weight_gradient import WeightGradient


@dataclass(frozen=True)
class OutputLayer:
    """A model's output layer: its weight [P, H] and which tokens the rows of it stand for."""

    weight: Tensor
    shard: VocabShard

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Logits [n, valid] of hidden states [n, H], in ``out``."""
        return torch.mm(hidden, self.weight[: self.shard.valid].t(), out=out)


@dataclass(frozen=True)
class Target:
    """Hidden states [T, Ht] of one head of the teacher (None without one) and the student's heads that they supervise.

    ``student_heads`` are pairs (head, ahead): row r of the student's head is supervised by row r + ahead, and its
    last rows, for which there is none, by nothing.
    """

    hidden: Tensor | None
    student_heads: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class DistillationInputs:
    """What the student's heads are compared with.

    Attributes:
        labels: token ids [heads, T].
        targets: the first is the teacher's main head, or all heads where there is no teacher.
        teacher: its output layer, of the same columns of the vocabulary as the student's; padding may differ.
        kd: the distillation loss.
        chunk: rows of a chunk.
    """

    labels: Tensor
    targets: tuple[Target, ...]
    teacher: OutputLayer | None
    kd: KDLoss
    chunk: int


Upstream = tuple[Tensor, Tensor]  # gradients of lm and kd, [heads, T] each


def default_chunk(device: torch.device) -> int:
    """Rows that keep matrix products busy without the re-reading of ``main_grad`` showing (measured)."""
    return 512 if device.type == "cpu" else 1024


def fused_losses(
    student: OutputLayer, hidden: Sequence[Tensor], inputs: DistillationInputs, expected: Upstream | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss terms of every row of every head, in fp32.

    With upstream gradients a of lm and b of kd, forward KL at temperature 1 has
    d logits = (a + b) q - a onehot - b p; the others are in `divergences`.

    Args:
        student: whose weight and hidden states get gradients.
        hidden: [T, H] of each head, of the whole sequence. Their gradient is this rank's columns' part of the sum.
        inputs: labels, targets, teacher, loss.
        expected: what backward will be given, if that is known now. Backward fails if it was not true.

    Returns:
        lm [heads, T], kd [heads, T] (zeros without a teacher), the teacher's own cross entropy [T] (no gradient).
    """
    if inputs.teacher is not None:
        ours, theirs = student.shard, inputs.teacher.shard
        assert (ours.start, ours.valid) == (theirs.start, theirs.valid), "teacher and student are padded alike under TP"
    expected = expected if torch.is_grad_enabled() else None
    lm, kd, teacher_lm = _FusedLosses.apply(student.shard, inputs, expected, student.weight, *hidden)
    return lm, kd, teacher_lm


class _FusedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        shard: VocabShard,
        inputs: DistillationInputs,
        expected: Upstream | None,
        weight: Tensor,
        *hidden: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sweep = _Sweep(OutputLayer(weight, shard), hidden, inputs)
        ctx.shard, ctx.inputs, ctx.expected, ctx.gradients = shard, inputs, expected, None
        if expected is None:
            ctx.save_for_backward(weight, *hidden)
        else:
            ctx.gradients = _Gradients(weight, hidden)
        terms = sweep.run(expected, ctx.gradients)
        ctx.mark_non_differentiable(terms[2])
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        given, gradients = (upstream[0], upstream[1]), ctx.gradients
        if gradients is None:
            weight, *hidden = ctx.saved_tensors
            gradients = _Gradients(weight, hidden)
            _Sweep(OutputLayer(weight, ctx.shard), hidden, ctx.inputs).run(given, gradients)
        else:
            # Rounding apart: it is the same product, taken in another order.
            same = torch.isclose(torch.stack(given), torch.stack(ctx.expected), rtol=1e-4, atol=0.0).all()
            torch._assert_async(same, "backward got another gradient than the one announced in forward")
        return None, None, None, gradients.weight.finish(), *gradients.hidden


class _Gradients:
    """Where gradients are put together."""

    def __init__(self, weight: Tensor, hidden: Sequence[Tensor]) -> None:
        self.weight = WeightGradient(weight)
        self.hidden = [torch.zeros_like(each) for each in hidden]

    def add(self, head: int, rows: slice, d_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Those of some rows of a head, from that of their logits [n, valid] and their hidden states [n, H]."""
        torch.mm(d_logits, weight[: d_logits.shape[1]], out=self.hidden[head][rows])
        self.weight.add(d_logits, hidden)


class _Sweep:
    """One pass over all rows."""

    def __init__(self, student: OutputLayer, hidden: Sequence[Tensor], inputs: DistillationInputs) -> None:
        self.student, self.hidden, self.inputs = student, hidden, inputs
        self.shard, self.rows = student.shard, hidden[0].shape[0]
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def run(self, upstream: Upstream | None, gradients: _Gradients | None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss terms as of `fused_losses`, and gradients if they are wanted."""
        lm = self.student.weight.new_zeros(len(self.hidden), self.rows, dtype=torch.float32)
        kd, teacher_lm = torch.zeros_like(lm), torch.zeros_like(lm[0])
        for number, target in enumerate(self.inputs.targets):
            for start in range(0, self.rows, self.inputs.chunk):
                stop = min(start + self.inputs.chunk, self.rows)
                teacher = None
                if target.hidden is not None:
                    teacher, own = self._teacher_part(target.hidden[start:stop], self.inputs.labels[0, start:stop])
                    if number == 0:
                        teacher_lm[start:stop] = own
                for head, ahead in target.student_heads:
                    rows = slice(max(0, start - ahead), max(0, stop - ahead))
                    if rows.stop == 0:
                        continue
                    of_rows = None if teacher is None else teacher[rows.start + ahead - start :]
                    a_b = None if upstream is None else (upstream[0][head, rows], upstream[1][head, rows])
                    lm[head, rows], kd[head, rows] = self._student_part(head, rows, of_rows, a_b, gradients)
        return lm, kd, teacher_lm

    def _buffer(self, name: str, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The first rows of a [chunk, valid] buffer that is allocated once: fresh memory costs more than filling it."""
        if (name, dtype) not in self.buffers:
            size = min(self.inputs.chunk, self.rows), self.shard.valid
            self.buffers[name, dtype] = self.student.weight.new_empty(size, dtype=dtype)
        return self.buffers[name, dtype][:rows]

    def _teacher_part(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's part in a chunk.

        Returns:
            probabilities [n, valid], or log-probabilities at the temperature for losses that need these; and its own
            cross entropy [n].
        """
        assert self.inputs.teacher is not None
        layer, kd, shard = self.inputs.teacher, self.inputs.kd, self.shard
        dtype, n = layer.weight.dtype, hidden.shape[0]
        logits = layer.logits(hidden.to(dtype), self._buffer("logits", n, dtype))
        out = self._buffer("teacher", n)
        at_label, _, _ = shard.at_labels(logits, labels)
        log_sum, log_z = shard.softmax(logits, out)
        if not kd.shares_softmax:
            shard.log_softmax_(out.copy_(logits), kd.temperature)
        elif shard.ranks > 1:
            out.mul_((log_sum - log_z).exp_()[:, None])
        return out, log_z - shard.reduce(at_label)

    def _student_part(
        self, head: int, rows: slice, teacher: Tensor | None, upstream: Upstream | None, gradients: _Gradients | None
    ) -> tuple[Tensor, Tensor]:
        """Losses lm [n] and kd [n] of some rows of a head; their gradients, if wanted, are added to the others."""
        hidden, labels = self.hidden[head][rows], self.inputs.labels[head, rows]
        shard, kd_loss, dtype = self.shard, self.inputs.kd, self.student.weight.dtype
        logits = self.student.logits(hidden, self._buffer("logits", hidden.shape[0], dtype))
        q = self._buffer("student", hidden.shape[0])
        at_label, column, mine = shard.at_labels(logits, labels)
        p = teacher if kd_loss.shares_softmax else None
        cross = torch.zeros_like(at_label) if p is None else torch.mul(logits, p, out=q).sum(-1)
        log_sum, log_z = shard.softmax(logits, q)
        at_label, cross = shard.reduce(torch.stack([at_label, cross]))
        kd = torch.zeros_like(cross) if p is None else log_z - cross
        # d logits = q (a + share b) - a onehot + direction size b
        direction, size, share = p, -1.0, float(p is not None)
        if teacher is not None and p is None:
            log_q = shard.log_softmax_(logits.float(), kd_loss.temperature)
            kd, direction = kd_loss.divergence(log_q, teacher, shard)
            kd, size = kd * kd_loss.temperature**2, kd_loss.temperature
        if upstream is not None and gradients is not None:
            a, b = upstream
            q.mul_(((a + share * b) * (log_sum - log_z).exp_())[:, None])
            if direction is not None:
                q.addcmul_(direction, (size * b)[:, None])
            if shard.valid:
                q.scatter_add_(1, column[:, None], -(a * mine)[:, None])
            d_logits = q if dtype == q.dtype else logits.copy_(q)
            gradients.add(head, rows, d_logits, hidden, self.student.weight)
        return log_z - at_label, kd
