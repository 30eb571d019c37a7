"""What the losses leave of logits: Megatron's cross entropy overwrites fp32 ones, ours none that KD has yet to read."""

from __future__ import annotations

from typing import Any
from unittest import mock

import megatron_slim.mcore

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slim.compat import runtime
from megatron_slim.distillation.divergences import KDLoss
from megatron_slim.distillation.fused import DistillationInputs, Target, fused_losses
from megatron_slim.distillation.loss_options import KD_LOSSES
from megatron_slim.distillation.output_layer import OutputLayer
from megatron_slim.distillation.vocabulary import VocabShard
from megatron_slim.testing import run_distributed

V, PADDED, ROWS, WIDTH = 37, 48, 11, 5
KINDS = [KDLoss(kind, temperature, 4) for kind in KD_LOSSES for temperature in (1.0, 2.0)]
DTYPES = [torch.float32, torch.bfloat16]


class Watch:
    """Sees logits as they are made, and compares them at every later step of the losses that is handed them."""

    def __init__(self) -> None:
        self.made: list[tuple[Tensor, Tensor]] = []
        self.compared = 0

    def __enter__(self) -> Watch:
        def watched(owner: type, name: str, check: Any) -> Any:
            original = getattr(owner, name)
            return mock.patch.object(owner, name, lambda *args: check(original, *args))

        self.patches = [watched(OutputLayer, "logits", self.make)]
        self.patches += [watched(VocabShard, name, self.compare) for name in ("at_labels", "softmax", "log_softmax_")]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        for patch in self.patches:
            patch.stop()

    def make(self, original: Any, *args: Any) -> Tensor:
        logits: Tensor = original(*args)
        self.made.append((logits, logits.clone()))
        return logits

    def compare(self, original: Any, shard: VocabShard, logits: Tensor, *args: Any) -> Any:
        """Before the step, whoever it is done for; and after it, if it is not the last to need them."""
        buffer, before = self.made[-1]
        assert logits.equal(before.to(logits.dtype)), "logits were changed before they were read"
        found = original(shard, logits, *args)
        assert original.__name__ == "log_softmax_" or buffer.equal(before), f"{original.__name__} changed logits"
        self.compared += 1
        return found


def all_losses(dtype: torch.dtype, group: dist.ProcessGroup | None, rank: int, ranks: int) -> list[tuple[Any, ...]]:
    """Bits of lm and the teacher's own loss without KD, and with each kind of it; kd; in fp32 without rounding."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden, labels = (
        torch.randn(ROWS, WIDTH, generator=generator).to(dtype),
        torch.randn(ROWS, WIDTH, generator=generator).to(dtype),
        torch.randint(0, V, (1, ROWS), generator=generator),
    )
    columns = slice(rank * PADDED // ranks, (rank + 1) * PADDED // ranks)
    ours, theirs = (
        OutputLayer(each[columns], VocabShard.of(group, PADDED // ranks, V))
        for each in (torch.randn(2, PADDED, WIDTH, generator=generator).to(dtype))
    )
    given = [hidden, teacher_hidden, labels, ours.weight, theirs.weight]
    before, found = [each.clone() for each in given], []
    upstream = torch.randn(2, 1, ROWS, generator=generator)
    for kd in [None, *KINDS]:
        target = Target(None if kd is None else teacher_hidden, ((0, 0),))
        teacher = None if kd is None else theirs
        weight, states = (each.clone().requires_grad_() for each in (ours.weight, hidden))
        with Watch() as watch:
            inputs = DistillationInputs(labels, (target,), teacher, kd or KDLoss(), chunk=4)
            student = OutputLayer(weight, ours.shard)
            lm, kd_loss, teacher_lm = fused_losses(student, [states], inputs, (upstream[0], upstream[1]))
        assert watch.compared >= 2 * len(watch.made) and len(watch.made) == 3 * (1 if kd is None else 2)
        found.append((lm.detach(), kd_loss.detach(), teacher_lm))
        assert all(now.equal(each) for now, each in zip(given, before, strict=True))
    return found


def check(dtype: torch.dtype, group: dist.ProcessGroup | None = None, rank: int = 0, ranks: int = 1) -> None:
    """LM is the same to the last bit without KD, and with KD of any kind before, after or in between."""
    (alone, _, _), *others = all_losses(dtype, group, rank, ranks)
    assert alone.isfinite().all() and float(alone.min()) > 0
    for (lm, kd, teacher_lm), kind in zip(others, KINDS, strict=True):
        assert lm.equal(alone), kind
        assert teacher_lm.equal(others[0][2]) and float(kd.abs().min()) > 0, kind


def on_a_rank(_: None) -> None:
    for dtype in DTYPES:
        check(dtype, dist.group.WORLD, dist.get_rank(), dist.get_world_size())


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_whole_until_the_last_loss_has_read_them(dtype: torch.dtype) -> None:
    check(dtype)


def test_on_two_tensor_parallel_ranks_too() -> None:
    run_distributed(2, on_a_rank, None)


def test_megatrons_cross_entropy_overwrites_logits_in_fp32() -> None:
    """Which is why logits are cloned wherever a test compares with it, and why the losses here do without it."""
    runtime.init_single_process()
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    labels = torch.randint(0, V, (3, 2), generator=torch.Generator().manual_seed(1))
    for dtype in DTYPES:
        logits = torch.randn(3, 2, V, generator=torch.Generator().manual_seed(0)).to(dtype)
        before = logits.clone()
        vocab_parallel_cross_entropy(logits, labels)
        assert logits.equal(before) == (dtype != torch.float32)
