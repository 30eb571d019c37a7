"""The losses from whole logits, which `fused` is compared with; itself compared with fp64 formulas.

Shapes: V vocabulary (unpadded), P = this tensor-parallel rank's columns of the padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slim.distillation.vocabulary import VocabShard


def _softmax(logits: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 valid logits, probabilities and log-partition of the whole row from this rank's columns."""
    valid = logits[..., : shard.valid].float()
    top = valid.new_full(valid.shape[:-1], -torch.inf) if shard.valid == 0 else valid.amax(-1)
    top = shard.reduce(top, dist.ReduceOp.MAX)
    probabilities = (valid - top[..., None]).exp_()
    total = shard.reduce(probabilities.sum(-1))
    probabilities.div_(total[..., None])
    return valid, probabilities, top + total.log()


class _LanguageModelLoss(torch.autograd.Function):
    """Cross entropy with the label and, with a teacher, with the teacher's distribution.

    Closed form for gradients a (of the first) and b (of the second): d logits = (a + b) p_s - a onehot - b p_t.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, labels: Tensor, shard: VocabShard
    ) -> tuple[Tensor, Tensor, Tensor]:
        valid, p_student, log_z = _softmax(student, shard)
        at_label, column, mine = shard.at_labels(valid, labels)
        if teacher is None:
            p_teacher = torch.empty(0)
            lm = log_z - shard.reduce(at_label)
            kd, teacher_lm = torch.zeros_like(lm), torch.zeros_like(lm)
        else:
            teacher_valid, p_teacher, teacher_log_z = _softmax(teacher, shard)
            teacher_at_label, _, _ = shard.at_labels(teacher_valid, labels)
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
