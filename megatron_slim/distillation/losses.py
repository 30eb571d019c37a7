"""Per-token loss terms of distillation, and their sum (SlimQwen eq. 12).

Shapes: s sequence, b batch, V vocabulary (unpadded), P = this tensor-parallel rank's columns of the padded vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slim.architecture.context_parallel import local_slice

KD_LAMBDA, MTP_BETA = "kd lambda", "mtp beta"  # in the log, next to the terms


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


def _over_depths(
    terms: tuple[Tensor, ...], loss_mask: Tensor, position_ids: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The mean over depths of sums over tokens, as the loss takes it; and (sum, count) over all depths, for the log.

    Of S positions depth k predicts S - k, so it is scaled by S / (S - k): where no token is masked it weighs as much as
    the main head, as in Megatron. Megatron's own factor comes from the mask of the micro-batch; a constant one makes
    the loss of a batch the same however it is cut into micro-batches.
    """
    length = loss_mask.shape[-1]
    total, log_sum, log_count = (loss_mask.new_zeros(()) for _ in range(3))
    for depth, term in enumerate(terms, start=1):
        mask = local_slice(mtp_mask(loss_mask, depth, position_ids), positions)
        depth_sum = (term * mask).sum()
        total = total + depth_sum * (length / max(1, length - depth)) / len(terms)
        log_sum, log_count = log_sum + depth_sum, log_count + mask.sum()
    return total, (log_sum.detach(), log_count)


def combine(
    losses: TokenLosses,
    loss_mask: Tensor,
    weights: LossWeights,
    position_ids: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """SlimQwen eq. 12 over one micro-batch.

    L = (1 - lambda) L_LM + lambda L_KD + beta ((1 - lambda) L_MTP-LM + lambda L_MTP-KD); without a teacher, lambda = 0.

    Args:
        losses: terms of every token.
        loss_mask: [b, s], 1 where the main head's token counts.
        weights: lambda and beta.
        position_ids: [b, s] or [1, s], which separate the documents of a sequence for `mtp_mask`.
        positions: where in the sequence the terms are, under context parallelism; masks are those of the whole.

    Returns:
        The sum over tokens (to be divided by the number of tokens), that number, and for the log every term's
        (sum, count) under the names that Megatron and ModelOpt use: sums over micro-batches and ranks of both give the
        mean over all tokens.
    """
    whole_mask = loss_mask.float()
    mask = local_slice(whole_mask, positions)
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
        mtp_lm, report["mtp lm loss"] = _over_depths(losses.mtp_lm, whole_mask, position_ids, positions)
        mtp = (1.0 - kd_lambda) * mtp_lm
        if losses.mtp_kd:
            mtp_kd, report["mtp distillation loss"] = _over_depths(losses.mtp_kd, whole_mask, position_ids, positions)
            mtp = mtp + kd_lambda * mtp_kd
        total = total + weights.mtp_beta * mtp
    report |= {name: (value.detach(), tokens) for name, value in terms.items()}
    one = tokens.new_ones(())
    if has_teacher:
        report[KD_LAMBDA] = (one * kd_lambda, one)
    if losses.mtp_lm:
        report[MTP_BETA] = (one * weights.mtp_beta, one)
    return total, tokens, report


def gradients_of_total(
    loss_mask: Tensor,
    weights: LossWeights,
    depths: int,
    position_ids: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    has_teacher: bool,
) -> TokenLosses:
    """What the sum that `combine` returns changes by with each term of each token.

    It is the gradient that backward brings them but for a common factor; `combine` is linear, so it is known before
    the terms are.
    """
    terms = 3 + 2 * depths if has_teacher else 1 + depths
    with torch.enable_grad():
        shape = local_slice(loss_mask, positions).shape
        stacked = loss_mask.new_zeros((terms, *shape), dtype=torch.float32).requires_grad_()
        losses = TokenLosses.unstack(stacked, has_teacher=has_teacher)
        total, _, _ = combine(losses, loss_mask, weights, position_ids, positions)
        (gradient,) = torch.autograd.grad(total, stacked)
    return TokenLosses.unstack(gradient, has_teacher=has_teacher)
