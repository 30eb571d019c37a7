"""Per-token loss terms of distillation, and their sum (SlimQwen eq. 12).

Shapes: s sequence, b batch, V vocabulary (unpadded), P = this tensor-parallel rank's columns of the padded vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Which columns of the vocabulary this tensor-parallel rank holds; padding columns come last and never count."""

    start: int
    valid: int
    group: dist.ProcessGroup | None

    @staticmethod
    def of(group: dist.ProcessGroup | None, columns: int, vocab_size: int) -> VocabShard:
        """The shard of a rank that holds ``columns`` of the padded vocabulary."""
        start = columns * (dist.get_rank(group) if group is not None else 0)
        return VocabShard(start, min(columns, max(0, vocab_size - start)), group)

    def reduce(self, value: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """All-reduce in place over the ranks that share the vocabulary."""
        if self.group is not None and dist.get_world_size(self.group) > 1:
            dist.all_reduce(value, op=op, group=self.group)
        return value


def _softmax(logits: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 valid logits, probabilities and log-partition of the whole row from this rank's columns."""
    valid = logits[..., : shard.valid].float()
    top = valid.new_full(valid.shape[:-1], -torch.inf) if shard.valid == 0 else valid.amax(-1)
    top = shard.reduce(top, dist.ReduceOp.MAX)
    probabilities = (valid - top[..., None]).exp_()
    total = shard.reduce(probabilities.sum(-1))
    probabilities.div_(total[..., None])
    return valid, probabilities, top + total.log()


def _at_labels(valid: Tensor, labels: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's part of the labels' logits (zero where another rank holds the label), local columns, ownership."""
    column = labels - shard.start
    mine = (column >= 0) & (column < shard.valid)
    column = column.masked_fill(~mine, 0)
    if shard.valid == 0:
        return torch.zeros_like(labels, dtype=valid.dtype), column, mine
    return valid.gather(-1, column[..., None])[..., 0] * mine, column, mine


class _LanguageModelLoss(torch.autograd.Function):
    """Cross entropy with the label and, with a teacher, with the teacher's distribution.

    Closed form for gradients a (of the first) and b (of the second): d logits = (a + b) p_s - a onehot - b p_t.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, labels: Tensor, shard: VocabShard
    ) -> tuple[Tensor, Tensor, Tensor]:
        valid, p_student, log_z = _softmax(student, shard)
        at_label, column, mine = _at_labels(valid, labels, shard)
        if teacher is None:
            p_teacher = torch.empty(0)
            lm = log_z - shard.reduce(at_label)
            kd, teacher_lm = torch.zeros_like(lm), torch.zeros_like(lm)
        else:
            teacher_valid, p_teacher, teacher_log_z = _softmax(teacher, shard)
            teacher_at_label, _, _ = _at_labels(teacher_valid, labels, shard)
            sums = shard.reduce(torch.stack([at_label, (p_teacher * valid).sum(-1), teacher_at_label]))
            lm, kd, teacher_lm = log_z - sums[0], log_z - sums[1], teacher_log_z - sums[2]
        ctx.save_for_backward(p_student, p_teacher, column, mine)
        ctx.has_teacher, ctx.columns, ctx.dtype = teacher is not None, student.shape[-1], student.dtype
        ctx.mark_non_differentiable(teacher_lm)
        return lm, kd, teacher_lm

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        d_lm, d_kd, _ = gradients
        p_student, p_teacher, column, mine = ctx.saved_tensors
        gradient = p_student * (d_lm + d_kd if ctx.has_teacher else d_lm)[..., None]
        if gradient.shape[-1]:
            gradient.scatter_add_(-1, column[..., None], -(d_lm * mine)[..., None])
        if ctx.has_teacher:
            gradient.addcmul_(p_teacher, d_kd[..., None], value=-1.0)
        padding = ctx.columns - gradient.shape[-1]
        return torch.nn.functional.pad(gradient, (0, padding)).to(ctx.dtype), None, None, None


def lm_and_kd_loss(
    student: Tensor, teacher: Tensor | None, labels: Tensor, vocab_size: int, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Language-model and distillation loss of every token, in fp32.

    The distillation loss is the cross entropy H(p_teacher, p_student) over the full vocabulary, whose gradient is that
    of the forward KL divergence. Columns at or beyond ``vocab_size`` are padding and count as -inf in both models.

    Args:
        student: logits [..., P].
        teacher: logits [..., P] that need no gradient, or None.
        labels: token ids [...].
        vocab_size: V.
        group: the ranks that share the vocabulary; None when this rank holds all of it.

    Returns:
        lm [...], kd [...] (zero without a teacher) and the teacher's own cross entropy [...] (no gradient).
    """
    shard = VocabShard.of(group, student.shape[-1], vocab_size)
    lm, kd, teacher_lm = _LanguageModelLoss.apply(student, teacher, labels, shard)
    return lm, kd, teacher_lm


def shift(values: Tensor, depth: int) -> Tensor:
    """Values ``depth`` positions further on along the last dimension, zeros behind the end.

    >>> shift(torch.tensor([[1, 2, 3]]), 1).tolist()
    [[2, 3, 0]]
    """
    return torch.nn.functional.pad(values[..., depth:], (0, depth))


@dataclass(frozen=True)
class TokenLosses:
    """Loss terms of every token, each [b, s] in fp32; the ``mtp_*`` have one entry per MTP depth."""

    lm: Tensor
    kd: Tensor | None = None
    teacher_lm: Tensor | None = None
    mtp_lm: tuple[Tensor, ...] = ()
    mtp_kd: tuple[Tensor, ...] = ()

    def stack(self) -> Tensor:
        """All terms in one tensor [terms, b, s], as it travels through Megatron's schedules."""
        head = [self.lm] if self.kd is None or self.teacher_lm is None else [self.lm, self.kd, self.teacher_lm]
        return torch.stack([*head, *self.mtp_lm, *self.mtp_kd])

    @staticmethod
    def unstack(stacked: Tensor, *, has_teacher: bool) -> TokenLosses:
        """The inverse of `stack`."""
        if not has_teacher:
            return TokenLosses(stacked[0], mtp_lm=tuple(stacked[1:]))
        depths = (len(stacked) - 3) // 2
        lm, kd, teacher_lm, *mtp = stacked
        return TokenLosses(lm, kd, teacher_lm, tuple(mtp[:depths]), tuple(mtp[depths:]))


@dataclass(frozen=True)
class LossWeights:
    """lambda and beta of SlimQwen eq. 12 at one step."""

    kd_lambda: float
    mtp_beta: float


def _over_depths(terms: tuple[Tensor, ...], loss_mask: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The mean over depths of sums over tokens, as the loss takes it; and (sum, count) over all depths, for the log.

    Of S positions depth k predicts S - k, so it is scaled by S / (S - k): where no token is masked it weighs as much as
    the main head, as in Megatron. Megatron's own factor comes from the mask of the micro-batch; a constant one makes
    the loss of a batch the same however it is cut into micro-batches.
    """
    length = loss_mask.shape[-1]
    total, log_sum, log_count = (loss_mask.new_zeros(()) for _ in range(3))
    for depth, term in enumerate(terms, start=1):
        mask = shift(loss_mask, depth)
        depth_sum = (term * mask).sum()
        total = total + depth_sum * (length / max(1, length - depth)) / len(terms)
        log_sum, log_count = log_sum + depth_sum, log_count + mask.sum()
    return total, (log_sum.detach(), log_count)


def combine(
    losses: TokenLosses, loss_mask: Tensor, weights: LossWeights
) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """SlimQwen eq. 12 over one micro-batch.

    L = (1 - lambda) L_LM + lambda L_KD + beta ((1 - lambda) L_MTP-LM + lambda L_MTP-KD); without a teacher, lambda = 0.

    Args:
        losses: terms of every token.
        loss_mask: [b, s], 1 where the main head's token counts.
        weights: lambda and beta.

    Returns:
        The sum over tokens (to be divided by the number of tokens), that number, and for the log every term's
        (sum, count) under the names that Megatron and ModelOpt use: sums over micro-batches and ranks of both give the
        mean over all tokens.
    """
    mask = loss_mask.float()
    tokens = mask.sum()
    has_teacher = losses.kd is not None
    kd_lambda = weights.kd_lambda if has_teacher else 0.0
    terms = {"lm loss": (losses.lm * mask).sum()}
    report: dict[str, tuple[Tensor, Tensor]] = {}
    total = (1.0 - kd_lambda) * terms["lm loss"]
    if losses.kd is not None and losses.teacher_lm is not None:
        terms["logits distillation loss"] = (losses.kd * mask).sum()
        terms["teacher lm loss"] = (losses.teacher_lm * mask).sum()
        total = total + kd_lambda * terms["logits distillation loss"]
    if losses.mtp_lm:
        mtp_lm, report["mtp lm loss"] = _over_depths(losses.mtp_lm, mask)
        mtp = (1.0 - kd_lambda) * mtp_lm
        if losses.mtp_kd:
            mtp_kd, report["mtp distillation loss"] = _over_depths(losses.mtp_kd, mask)
            mtp = mtp + kd_lambda * mtp_kd
        total = total + weights.mtp_beta * mtp
    report |= {name: (value.detach(), tokens) for name, value in terms.items()}
    one = tokens.new_ones(())
    if has_teacher:
        report["kd lambda"] = (one * kd_lambda, one)
    if losses.mtp_lm:
        report["mtp beta"] = (one * weights.mtp_beta, one)
    return total, tokens, report
