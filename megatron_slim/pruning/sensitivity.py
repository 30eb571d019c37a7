"""What pruning the experts of one layer alone adds to the loss: of every layer, in one pass over the weights.

Every layer starts another stream of hidden states, which differs from the model's own in the experts of that layer.
All streams then go through the layers that follow, while these are in memory. So weights are read once, and the work is
that of about half as many forward passes as there are layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import megatron_slim.mcore

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_slim.architecture.table import OUTPUT
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.compat.runtime import default_dtype, init_single_process
from megatron_slim.data import Tokens
from megatron_slim.errors import CheckpointError
from megatron_slim.products import linear
from megatron_slim.pruning.apply import PrunedCheckpoint
from megatron_slim.pruning.plan import Plan
from megatron_slim.streaming.block import block_config, build_block
from megatron_slim.streaming.forward import EMBEDDING, FINAL_NORM, Step, StreamingForward
from megatron_slim.streaming.model_input import Samples

HEAD_ROWS = 512  # positions whose logits are in memory at once


@torch.no_grad()
def expert_sensitivity(checkpoint: Checkpoint, plan: Plan, samples: Tokens | Samples) -> dict[str, float]:
    """Losses that experts which go add, in nats per token of the main head, by block of the trunk.

    Args:
        checkpoint: the model.
        plan: of experts alone, for all blocks; each is measured by itself.
        samples: samples, or token ids [samples, sequence].

    Raises:
        CheckpointError: a loss is not finite.
    """
    init_single_process()
    given = Samples.of(samples)
    run = _Sensitivity(checkpoint, given.read, micro_batch_size=1, dtype=default_dtype(), position_ids=given.documents)
    run.given = given
    run.pruned = PrunedCheckpoint(plan, checkpoint, check_source=False)
    run.pruned_config = block_config(run.pruned.shape, run.dtype)
    run.run("measuring layers")
    own, *others = run.losses
    return {block: loss - own for block, loss in zip(run.started, others, strict=True)}


class _Sensitivity(StreamingForward):
    """Streams of hidden states one after the other, the model's own first: each has a micro-batch for every sample.

    Attributes:
        given: the samples, and which of their predictions count.
        pruned: the model with fewer experts in every block.
        pruned_config: of its blocks, whose top-k may be another.
        started: blocks that streams differ in, in order.
        losses: by stream.
    """

    given: Samples
    pruned: PrunedCheckpoint
    pruned_config: TransformerConfig

    def run(self, description: str) -> None:
        """Pass everything through the trunk."""
        self.streams = 1 + self.shape.num_layers
        self.started: list[str] = []
        self.losses: list[float] = []
        super().run(description)

    def batches(self) -> Iterator[Tensor]:
        """Those of all streams."""
        return (self._hidden.load(batch) for batch in range(len(self._micro_batches) * (1 + len(self.started))))

    def leave(self, module: str) -> None:
        """Measure all streams at the trunk's end."""
        if module != FINAL_NORM:
            return
        weight, count = self.weight(OUTPUT).float(), len(self._micro_batches)
        streams = enumerate(self.batches())
        ids, counted = torch.from_numpy(self.given.ids[:, 1:]).unsqueeze(1), self.given.counted(1)
        masks = [slice(None)] * count if counted is None else [*counted.unsqueeze(1)]
        totals = [self._loss(hidden, ids[n % count], masks[n % count], weight) for n, hidden in streams]
        by_stream = torch.tensor(totals, dtype=torch.float64).view(-1, count).sum(1)
        if not torch.isfinite(by_stream).all():
            raise CheckpointError("a loss is not finite", where=str(self.checkpoint.path), fix="its weights are broken")
        self.losses = (by_stream / self.given.number(1)).tolist()

    def _modules(self) -> Iterator[str]:
        for module in super()._modules():
            yield module
            if module == FINAL_NORM:
                return

    def _pass(self, module: str) -> None:
        step, count = self._step(module), len(self._micro_batches)
        other = self._pruned_block(module)
        added = [] if other is None else [other(self._load(n), self._micro_batches[n]) for n in range(count)]
        for number in range(count * (1 + len(self.started))):
            batch = self._micro_batches[number % count]
            self._hidden.store(step(batch.tokens if module == EMBEDDING else self._load(number), batch))
        for output in added:
            self._hidden.store(output)
        self._hidden.turn()
        self.started += [] if other is None else [module]
        self.leave(module)

    def _load(self, number: int) -> Tensor:
        return self._hidden.load(number).to(self.device)

    def _pruned_block(self, module: str) -> Step | None:
        """What a block does with fewer experts; None where there are as many, or none."""
        if module not in self.shape.routed_blocks:
            return None
        return self._through(build_block(self.pruned, module, self.pruned_config), module, lambda inputs, output: None)

    def _loss(self, hidden: Tensor, wanted: Tensor, counted: Tensor | slice, weight: Tensor) -> float:
        """Sum of the losses of a micro-batch, of the predictions [samples, predictions] that count."""
        rows, wanted = hidden[:, : wanted.shape[1]][counted].flatten(0, -2), wanted[counted].flatten()
        parts = zip(rows.split(HEAD_ROWS), wanted.split(HEAD_ROWS), strict=True)
        return sum(
            float(F.cross_entropy(linear(row.to(self.device).float(), weight), ids.to(self.device), reduction="sum"))
            for row, ids in parts
        )
