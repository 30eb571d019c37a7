"""Per-token loss terms of distillation, and their sum (SlimQwen eq. 12).

Shapes: s sequence, b batch, V vocabulary (unpadded), P = this tensor-parallel rank's columns of the padded vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slim.architecture.context_parallel import local_slice
from megatron_slim.architecture.mtp_masks import mtp_mask
from megatron_slim.distillation.terms import LOSS_TERMS, MTP_BETA, factors, terms_of, weights_of

LossWeights = dict[str, float]
"""Values of the weights of the losses at one step, by `LossWeight.key`."""


class TokenLosses(dict[str, tuple[Tensor, ...]]):
    """Loss terms of every token, by their keys in `LOSS_TERMS`: for each head of the term [b, s] in fp32.

    Terms of the main head have one, those of MTP heads one per depth.
    """

    def stack(self) -> Tensor:
        """All terms in one tensor [terms, b, s], as it travels through Megatron's schedules."""
        return torch.stack([head for heads in self.values() for head in heads])

    @staticmethod
    def unstack(stacked: Tensor, *, has_teacher: bool) -> TokenLosses:
        """The inverse of `stack`."""
        main = len(terms_of(has_teacher=has_teacher, has_mtp=False))
        terms = terms_of(has_teacher=has_teacher, has_mtp=len(stacked) > main)
        depths = (len(stacked) - main) // max(1, len(terms) - main)
        heads = iter(stacked)
        return TokenLosses(
            {key: tuple(next(heads) for _ in range(depths if term.mtp else 1)) for key, term in terms.items()}
        )


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
    """SlimQwen eq. 12 over one micro-batch, and what further terms `LOSS_TERMS` has.

    L = (1 - lambda) L_LM + lambda L_KD + beta ((1 - lambda) L_MTP-LM + lambda L_MTP-KD); without a teacher, lambda = 0.

    Args:
        losses: terms of every token.
        loss_mask: [b, s], 1 where the main head's token counts.
        weights: lambda, beta and those of further terms.
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
    terms = {key: LOSS_TERMS[key] for key in losses}
    multiplied = factors(terms, weights)
    main, mtp = tokens.new_zeros(()), tokens.new_zeros(())
    report: dict[str, tuple[Tensor, Tensor]] = {}
    for key, term in terms.items():
        if term.mtp:
            value, report[term.name] = _over_depths(losses[key], whole_mask, position_ids, positions)
            mtp = mtp + multiplied[key] * value if key in multiplied else mtp
        else:
            value = (losses[key][0] * mask).sum()
            report[term.name] = value.detach(), tokens
            main = main + multiplied[key] * value if key in multiplied else main
    one = tokens.new_ones(())
    at_work = weights_of(terms.values())
    report |= {weight.name: (one * weights[weight.key], one) for weight in at_work}
    total = main + weights[MTP_BETA.key] * mtp if MTP_BETA in at_work else main
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
    terms = terms_of(has_teacher=has_teacher, has_mtp=depths > 0).values()
    heads = sum(depths if term.mtp else 1 for term in terms)
    with torch.enable_grad():
        shape = local_slice(loss_mask, positions).shape
        stacked = loss_mask.new_zeros((heads, *shape), dtype=torch.float32).requires_grad_()
        losses = TokenLosses.unstack(stacked, has_teacher=has_teacher)
        total, _, _ = combine(losses, loss_mask, weights, position_ids, positions)
        (gradient,) = torch.autograd.grad(total, stacked)
    return TokenLosses.unstack(gradient, has_teacher=has_teacher)
