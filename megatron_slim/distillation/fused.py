"""Output layer, language-model loss and distillation loss of all heads in one, a chunk of tokens at a time.

Logits of neither model exist for more tokens than a chunk has. Where the caller knows what backward will be given, as
a training step does, a chunk's gradient follows its losses at once, so that logits are computed once; otherwise they
are computed again in backward. The gradient of the weight goes into Megatron's ``main_grad`` where there is one.

Shapes: T = s b rows, sequence first; H, Ht hidden sizes; P = this tensor-parallel rank's columns of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_slim.aliases import Context
from megatron_slim.distillation.divergences import KDLoss
from megatron_slim.distillation.functions import values_and_gradient
from megatron_slim.distillation.output_layer import OutputLayer, block_rows
from megatron_slim.distillation.terms import LossTerm, TermInputs
from megatron_slim.distillation.vocabulary import VocabShard
from megatron_slim.weight_gradient import LayerGradients


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
        functions: terms that are computed by a function of their own.
    """

    labels: Tensor
    targets: tuple[Target, ...]
    teacher: OutputLayer | None
    kd: KDLoss
    chunk: int
    functions: tuple[LossTerm, ...] = ()


Upstream = tuple[Tensor, ...]  # gradients of lm, kd and the functions, [heads, T] each


def default_chunk(device: torch.device) -> int:
    """Rows that keep matrix products busy without the re-reading of ``main_grad`` showing (measured)."""
    return 512 if device.type == "cpu" else 1024


def fused_losses(
    student: OutputLayer, hidden: Sequence[Tensor], inputs: DistillationInputs, expected: Upstream | None = None
) -> tuple[Tensor, ...]:
    """Loss terms of every row of every head, in fp32.

    With upstream gradients a of lm and b of kd, forward KL at temperature 1 has
    d logits = (a + b) q - a onehot - b p; the others are in `divergences`. Those of functions are autograd's, added.

    Args:
        student: whose weight and hidden states get gradients.
        hidden: [T, H] of each head, of the whole sequence. Their gradient is this rank's columns' part of the sum.
        inputs: labels, targets, teacher, loss.
        expected: what backward will be given, if that is known now. Backward fails if it was not true.

    Returns:
        lm [heads, T], kd [heads, T] (zeros without a teacher), the teacher's own cross entropy [T] (no gradient), and
        [heads, T] of each function, zeros where it is not of the head.
    """
    if inputs.teacher is not None:
        ours, theirs = student.shard, inputs.teacher.shard
        assert (ours.start, ours.valid) == (theirs.start, theirs.valid), "teacher and student are padded alike under TP"
    expected = expected if torch.is_grad_enabled() else None
    terms: tuple[Tensor, ...] = _FusedLosses.apply(student.shard, inputs, expected, student.weight, *hidden)
    return terms


class _FusedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        shard: VocabShard,
        inputs: DistillationInputs,
        expected: Upstream | None,
        weight: Tensor,
        *hidden: Tensor,
    ) -> tuple[Tensor, ...]:
        sweep = _Sweep(OutputLayer(weight, shard), hidden, inputs)
        ctx.shard, ctx.inputs, ctx.expected, ctx.gradients = shard, inputs, expected, None
        if expected is None:
            ctx.save_for_backward(weight, *hidden)
        else:
            ctx.gradients = LayerGradients(weight, hidden, ctx.needs_input_grad[-len(hidden) :])
        terms = sweep.run(expected, ctx.gradients)
        ctx.mark_non_differentiable(terms[2])
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        given, gradients = (*upstream[:2], *upstream[3:]), ctx.gradients
        if gradients is None:
            weight, *hidden = ctx.saved_tensors
            gradients = LayerGradients(weight, hidden, ctx.needs_input_grad[-len(hidden) :])
            _Sweep(OutputLayer(weight, ctx.shard), hidden, ctx.inputs).run(given, gradients)
        else:
            # Rounding apart: it is the same product, taken in another order.
            same = torch.isclose(torch.stack(given), torch.stack(ctx.expected), rtol=1e-4, atol=0.0).all()
            torch._assert_async(same, "backward got another gradient than the one announced in forward")
        return None, None, None, gradients.weight.finish(), *gradients.hidden


@dataclass(frozen=True)
class _OfTeacher:
    """The teacher's part in some rows [n, valid].

    Attributes:
        compared: probabilities, or log-probabilities at the temperature for losses that need these.
        logits: in fp32, if a function needs them.
    """

    compared: Tensor
    logits: Tensor | None

    def rows(self, rows: slice) -> _OfTeacher:
        """That of some of the rows."""
        return _OfTeacher(self.compared[rows], None if self.logits is None else self.logits[rows])


class _Sweep:
    """One pass over all rows: matrix products of a chunk, and what is between them a block of its rows at a time."""

    def __init__(self, student: OutputLayer, hidden: Sequence[Tensor], inputs: DistillationInputs) -> None:
        self.student, self.hidden, self.inputs = student, hidden, inputs
        self.shard, self.rows = student.shard, hidden[0].shape[0]
        self.chunk = min(inputs.chunk, self.rows)
        self.block = min(block_rows(student), self.chunk)
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def run(self, upstream: Upstream | None, gradients: LayerGradients | None) -> tuple[Tensor, ...]:
        """Loss terms as of `fused_losses`, and gradients if they are wanted."""
        lm = self.student.weight.new_zeros(len(self.hidden), self.rows, dtype=torch.float32)
        kd, teacher_lm = torch.zeros_like(lm), torch.zeros_like(lm[0])
        others = [torch.zeros_like(lm) for _ in self.inputs.functions]
        for number, target in enumerate(self.inputs.targets):
            for start in range(0, self.rows, self.chunk):
                stop = min(start + self.chunk, self.rows)
                teacher = None
                if target.hidden is not None:
                    teacher, own = self._teacher_part(target.hidden[start:stop], self.inputs.labels[0, start:stop])
                    if number == 0:
                        teacher_lm[start:stop] = own
                for head, ahead in target.student_heads:
                    rows = slice(max(0, start - ahead), max(0, stop - ahead))
                    if rows.stop == 0:
                        continue
                    of_rows = None if teacher is None else teacher.rows(slice(rows.start + ahead - start, None))
                    given = None if upstream is None else torch.stack([each[head, rows] for each in upstream])
                    values = self._student_part(head, rows, of_rows, given, gradients)
                    for term, of_term in zip((lm, kd, *others), values, strict=True):
                        term[head, rows] = of_term
        return lm, kd, teacher_lm, *others

    def _buffer(self, name: str, rows: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The first rows of a [size, valid] buffer that is allocated once: fresh memory costs more than filling it."""
        if (name, dtype) not in self.buffers:
            self.buffers[name, dtype] = self.student.weight.new_empty((size, self.shard.valid), dtype=dtype)
        return self.buffers[name, dtype][:rows]

    def _logits(self, layer: OutputLayer, hidden: Tensor) -> Tensor:
        hidden = hidden.to(layer.weight.dtype)
        return layer.logits(hidden, self._buffer("logits", len(hidden), self.chunk, hidden.dtype))

    def _blocks(self, rows: int) -> Iterator[slice]:
        return (slice(start, min(start + self.block, rows)) for start in range(0, rows, self.block))

    def _in_fp32(self, logits: Tensor) -> Tensor:
        """A block's logits, themselves or in a buffer."""
        if logits.dtype == torch.float32:
            return logits
        return self._buffer("in fp32", len(logits), self.block).copy_(logits)

    def _teacher_part(self, hidden: Tensor, labels: Tensor) -> tuple[_OfTeacher, Tensor]:
        """The teacher's part in a chunk, and its own cross entropy [n]."""
        assert self.inputs.teacher is not None
        logits, out = self._logits(self.inputs.teacher, hidden), self._buffer("teacher", len(hidden), self.chunk)
        kept = None
        if any(term.needs_teacher for term in self.inputs.functions):
            kept = self._buffer("teacher's logits", len(hidden), self.chunk).copy_(logits)
        blocks = [self._teacher_block(logits[rows], labels[rows], out[rows]) for rows in self._blocks(len(hidden))]
        return _OfTeacher(out, kept), torch.cat(blocks)

    def _teacher_block(self, logits: Tensor, labels: Tensor, out: Tensor) -> Tensor:
        shard, kd, logits = self.shard, self.inputs.kd, self._in_fp32(logits)
        p = out if kd.shares_softmax else self._buffer("p", len(logits), self.block)
        at_label, _, _ = shard.at_labels(logits, labels)
        log_sum, log_z = shard.softmax(logits, p)
        if kd.shares_softmax:
            shard.to_all_columns_(p, log_sum, log_z)
        elif kd.temperature == 1.0:
            torch.sub(logits, log_z[:, None], out=out)
        else:
            shard.log_softmax_(out.copy_(logits), kd.temperature, p)
        return log_z - shard.reduce(at_label)

    def _student_part(
        self,
        head: int,
        rows: slice,
        teacher: _OfTeacher | None,
        upstream: Tensor | None,
        gradients: LayerGradients | None,
    ) -> list[Tensor]:
        """Losses [n] of some rows of a head: lm, kd, functions; gradients, if wanted, are added to the others."""
        hidden, labels = self.hidden[head][rows], self.inputs.labels[head, rows]
        logits, found = self._logits(self.student, hidden), []
        for block in self._blocks(len(hidden)):
            of_block = None if teacher is None else teacher.rows(block)
            given = None if upstream is None else upstream[:, block]
            found.append(self._student_block(head, logits[block], labels[block], of_block, given))
        if gradients is not None:
            gradients.add(head, rows, logits, hidden, self.student.weight)
        return [torch.cat(of_term) for of_term in zip(*found, strict=True)]

    def _student_block(
        self, head: int, logits: Tensor, labels: Tensor, of_teacher: _OfTeacher | None, upstream: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Losses [n] of a block, whose logits are replaced by their gradients if there is an upstream."""
        shard, wide = self.shard, self._in_fp32(logits)
        teacher, theirs = (None, None) if of_teacher is None else (of_teacher.compared, of_teacher.logits)
        inputs, given = TermInputs(wide, labels, theirs, shard), None if upstream is None else upstream[2:]
        others, of_others = values_and_gradient(self.inputs.functions, head, inputs, given)
        q = self._buffer("q", len(logits), self.block)
        at_label, column, mine = shard.at_labels(wide, labels)
        p = teacher if self.inputs.kd.shares_softmax else None
        cross = torch.zeros_like(at_label) if p is None else torch.mul(wide, p, out=q).sum(-1)
        log_sum, log_z = shard.softmax(wide, q)
        at_label, cross = shard.reduce(torch.stack([at_label, cross]))
        kd = torch.zeros_like(cross) if p is None else log_z - cross
        # d logits = q (a + share b) - a onehot + direction size b
        direction, size, share = p, -1.0, float(p is not None)
        if teacher is not None and p is None:
            kd, direction = self._compare(wide, q, (log_sum, log_z), teacher)
            size = self.inputs.kd.temperature
        if upstream is not None:
            a, b = upstream[:2]
            of_q = ((a + share * b) * (log_sum - log_z).exp_())[:, None]
            if direction is None:
                torch.mul(q, of_q, out=wide)
            else:
                torch.addcmul(q.mul_(of_q), direction, (size * b)[:, None], out=wide)
            if shard.valid:
                wide.scatter_add_(1, column[:, None], -(a * mine)[:, None])
            if of_others is not None:
                wide.add_(of_others)
            if wide is not logits:
                logits.copy_(wide)
        return log_z - at_label, kd, *others

    def _compare(
        self, logits: Tensor, q: Tensor, log_sums: tuple[Tensor, Tensor], log_p: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Values [n] of the distillation loss, and gradients as of `divergences`, which may take the logits' place."""
        shard, kd = self.shard, self.inputs.kd
        if kd.temperature != 1.0:
            q = self._buffer("q at the temperature", len(q), self.block)
            log_q = shard.log_softmax_(logits, kd.temperature, q)
        else:
            q = q if shard.ranks == 1 else shard.to_all_columns_(q.clone(), *log_sums)
            log_q = logits.sub_(log_sums[1][:, None])
        p = torch.exp(log_p, out=self._buffer("p", len(q), self.block))
        value, gradient = kd.divergence(log_q, log_p, shard, q, p)
        return value * kd.temperature**2, gradient
