"""A vocabulary sharded over tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slim.aliases import Context


@dataclass(frozen=True)
class VocabShard:
    """Which columns of the vocabulary this tensor-parallel rank holds; padding columns come last and never count."""

    start: int
    valid: int
    group: dist.ProcessGroup | None

    @staticmethod
    def of(group: dist.ProcessGroup | None, columns: int, vocab_size: int) -> VocabShard:
        """The shard of a rank that holds ``columns`` of the padded vocabulary."""
        start = columns * (0 if group is None else dist.get_rank(group))
        return VocabShard(start, min(columns, max(0, vocab_size - start)), group)

    @property
    def ranks(self) -> int:
        """Number of ranks that share the vocabulary."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Index of this rank among them."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def reduce(self, value: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """All-reduce in place over the ranks that share the vocabulary."""
        if self.ranks > 1:
            dist.all_reduce(value, op=op, group=self.group)
        return value

    def sum(self, parts: Tensor) -> Tensor:
        """As `reduce`, of a copy and with a gradient: that of the sum is that of every rank's part."""
        summed: Tensor = parts if self.ranks == 1 else _SumOverRanks.apply(self, parts)
        return summed

    def log_sum_exp(self, logits: Tensor) -> Tensor:
        """The logarithm [n] of the sum of exponentials over all ranks' columns, with a gradient.

        Args:
            logits: [n, valid] in fp32.
        """
        own = logits.logsumexp(-1)
        if self.ranks == 1:
            return own
        most = self.reduce(own.detach().clone(), dist.ReduceOp.MAX)
        return self.sum((own - most).exp()).log() + most

    def gather(self, value: Tensor) -> Tensor:
        """The values of all ranks that share the vocabulary, [ranks, ...], the same on each."""
        if self.ranks == 1:
            return value[None]
        of_all = [torch.empty_like(value) for _ in range(self.ranks)]
        dist.all_gather(of_all, value.contiguous(), group=self.group)
        return torch.stack(of_all)

    def at_labels(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's part of the labels' logits, zero where another rank holds the label.

        Args:
            logits: [..., valid].
            labels: token ids [...].

        Returns:
            logits [...] in fp32, the labels' columns on this rank [...], and whether they are on it [...].
        """
        column = labels - self.start
        mine = (column >= 0) & (column < self.valid)
        column = column.masked_fill(~mine, 0)
        if self.valid == 0:
            return torch.zeros_like(labels, dtype=torch.float32), column, mine
        return logits.gather(-1, column[..., None])[..., 0].float() * mine, column, mine

    def softmax(self, logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax over this rank's columns alone; times exp(first - second result) it is that over all columns.

        Args:
            logits: [n, valid].
            out: where the softmax goes, [n, valid] in fp32.

        Returns:
            log of the sum of exponentials [n] of this rank's columns, and of all.
        """
        torch.softmax(logits.float(), -1, out=out)
        return self._log_sums(logits, out)

    def _log_sums(self, logits: Tensor, softmax: Tensor) -> tuple[Tensor, Tensor]:
        if self.valid:
            # The largest of each are at the same column: finding which takes several times as long as finding them.
            log_sum = logits.amax(-1).float() - softmax.amax(-1).log_()
        else:
            log_sum = softmax.new_full(softmax.shape[:1], -torch.inf)
        return log_sum, log_sum if self.ranks == 1 else torch.logsumexp(self.gather(log_sum), 0)

    def to_all_columns_(self, softmax: Tensor, log_sum: Tensor, log_z: Tensor) -> Tensor:
        """What `softmax` gave, made that over all columns."""
        return softmax if self.ranks == 1 else softmax.mul_((log_sum - log_z).exp_()[:, None])

    def log_softmax_(self, logits: Tensor, temperature: float, softmax: Tensor) -> Tensor:
        """Log-probabilities [n, valid] at a temperature of fp32 logits, over all ranks' columns, in their place.

        ``softmax`` [n, valid] gets the probabilities.
        """
        torch.softmax(logits.div_(temperature), -1, out=softmax)
        log_sum, log_z = self._log_sums(logits, softmax)
        self.to_all_columns_(softmax, log_sum, log_z)
        return logits.sub_(log_z[:, None])


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, shard: VocabShard, parts: Tensor) -> Tensor:
        return shard.reduce(parts.clone())

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient
