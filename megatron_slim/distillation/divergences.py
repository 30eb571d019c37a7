"""By what a student's distribution is compared with its teacher's: values and gradients in closed form.

Shapes: n tokens, P = this tensor-parallel rank's columns of the vocabulary, padding left out. q is the student's
distribution, p the teacher's, both at the temperature; gradients are with respect to the student's logits divided by
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_slim.distillation.loss_options import DEFAULTS, FORWARD_KL, JSD, REVERSE_KL, TOP_K
from megatron_slim.distillation.vocabulary import VocabShard

Divergence = Callable[[Tensor, Tensor, VocabShard, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class KDLoss:
    """What distillation minimises, per token.

    With temperature T, q = softmax(student logits / T), p = softmax(teacher logits / T), and the loss is T^2 times one
    of `loss_options.KD_LOSSES`, which has the definitions.

    T^2 keeps the size of gradients as T grows (Hinton et al., arXiv 1503.02531). The language-model losses and the
    teacher's own cross entropy are at temperature 1 whatever T is.

    Attributes:
        kind: one of `KD_LOSSES`.
        temperature: T > 0.
        top_k: k >= 1, for ``top-k`` alone.
    """

    kind: str = DEFAULTS.kd_loss
    temperature: float = DEFAULTS.kd_temperature
    top_k: int = DEFAULTS.kd_top_k

    @property
    def shares_softmax(self) -> bool:
        """Whether the softmax of the language-model loss is all that the gradient needs of the student."""
        return self.kind == FORWARD_KL and self.temperature == 1.0

    @property
    def divergence(self) -> Divergence:
        """The function of log q, log p, the shard, q and p that gives values [n] and gradients [n, P].

        All but the shard are [n, P]. It may overwrite log q, and leaves the others alone.
        """
        found = DIVERGENCES[self.kind]
        return partial(found, k=self.top_k) if self.kind == TOP_K else found


def forward_kl(log_q: Tensor, log_p: Tensor, shard: VocabShard, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """H(p, q); its gradient is q - p."""
    value = shard.reduce(-log_q.mul_(p).sum(-1))
    return value, torch.sub(q, p, out=log_q)


def reverse_kl(log_q: Tensor, log_p: Tensor, shard: VocabShard, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p); its gradient is q (log q/p - KL)."""
    ratio = log_q.sub_(log_p)
    value = shard.reduce((q * ratio).sum(-1))
    return value, ratio.sub_(value[:, None]).mul_(q)


def jsd(log_q: Tensor, log_p: Tensor, shard: VocabShard, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Jensen-Shannon divergence; its gradient is q (log q/m - KL(q || m)) / 2."""
    # Where both are below the smallest number, so are their summands; the logarithm only has to be finite.
    log_m = torch.add(p, q).clamp_(min=torch.finfo(q.dtype).tiny).log_().sub_(math.log(2))
    ratio = log_q.sub_(log_m)
    from_teacher = torch.sub(log_p, log_m, out=log_m).mul_(p).sum(-1)
    sums = shard.reduce(torch.stack([from_teacher, torch.mul(q, ratio, out=log_m).sum(-1)]))
    return sums.mean(0), ratio.sub_(sums[1][:, None]).mul_(q).mul_(0.5)


def top_k(log_q: Tensor, log_p: Tensor, shard: VocabShard, q: Tensor, p: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """Cross entropy over the teacher's k most probable tokens and the rest of the vocabulary as one event.

    Its gradient is q - p on those tokens and q (1 - p_rest / q_rest) on each of the rest.
    """
    columns, mine = _most_probable(log_p, k, shard)
    p_at, q_at = p.gather(1, columns), q.gather(1, columns)
    value_at = torch.where(mine, p_at * log_q.gather(1, columns), 0.0).sum(-1)
    # Sums over the rest itself: 1 - (sum over the k) would lose all digits where the k have nearly everything.
    p_rest = log_q.copy_(p).scatter_(1, columns, p_at.masked_fill(mine, 0.0)).sum(-1)
    rest = log_q.copy_(q).scatter_(1, columns, q_at.masked_fill(mine, 0.0))
    at, p_rest, q_rest = shard.reduce(torch.stack([value_at, p_rest, rest.sum(-1)]))
    q_rest = q_rest.clamp_(min=torch.finfo(q_rest.dtype).tiny)
    rest.mul_((1.0 - p_rest / q_rest)[:, None])
    rest.scatter_(1, columns, torch.where(mine, q_at - p_at, rest.gather(1, columns)))
    return -at - p_rest * q_rest.log(), rest


def _most_probable(log_p: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """This rank's k (or all its) most probable columns [n, <= k], and which are among the k of the whole vocabulary.

    Of equally probable ones, which logits in 16 bits often are, the first: a tensor-parallel size changes no choice.
    """
    values, columns = _largest(log_p, min(k, log_p.shape[-1]))
    padded = torch.nn.functional.pad(values, (0, k - values.shape[-1]), value=-math.inf)
    # Every rank chooses from the same k values of each rank, so that all agree.
    of_all = shard.gather(padded)
    ranks, n, _ = of_all.shape
    of_all = of_all.transpose(0, 1).reshape(n, ranks * k)
    first = of_all.sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen = torch.zeros_like(of_all, dtype=torch.bool).scatter_(1, first, True)
    return columns, chosen[:, shard.rank * k :][:, : values.shape[-1]]


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As ``topk``, whose choice among equal ones is arbitrary; here the first ones, in order."""
    found, columns = values.topk(count)
    # Rows without a tie at the least one that counts, nearly all, need no sorting of the whole vocabulary.
    if len(tied := ((values >= found[:, -1:]).sum(1) > count).nonzero()[:, 0]):
        columns[tied] = values[tied].sort(dim=1, descending=True, stable=True).indices[:, :count]
    columns = columns.sort(dim=1).values
    found, order = values.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return found, columns.gather(1, order)


# A further one is another entry here and in `KD_LOSSES`, from this package or from outside.
DIVERGENCES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    FORWARD_KL: forward_kl,
    REVERSE_KL: reverse_kl,
    JSD: jsd,
    TOP_K: top_k,
}
