"""Losses of the rows that count are those of all rows, and so are their gradients."""

from __future__ import annotations

import pytest
import torch

from megatron_slim.distillation.counted import counted_rows, losses_of_rows
from megatron_slim.distillation.fused import DistillationInputs
from megatron_slim.distillation.output_layer import OutputLayer
from megatron_slim.distillation.vocabulary import VocabShard
from tests.distillation.test_fused import CLOSE, KINDS, ROWS, Example, V, reference, targets

MASK = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0]])  # of a batch of one, so rows are positions


@pytest.mark.parametrize("ahead", [None, 1, 3])
@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("kd", KINDS[:3])
def test_rows_that_count(kd: object, ahead: int | None, announced: bool) -> None:
    example = Example()
    example.upstream *= MASK
    expected = reference(example, kd, ahead)  # type: ignore[arg-type]
    rows = counted_rows(MASK)
    assert rows.tolist() == [0, 2, 3, 6, 8, 9]
    layers = [
        OutputLayer(weight.clone().requires_grad_(), VocabShard.of(None, len(weight), V))
        for weight in (example.weight, example.teacher_weight)
    ]
    hidden = [each.clone().requires_grad_() for each in example.hidden]
    inputs = DistillationInputs(example.labels, targets(example, ahead), layers[1], kd, 4)  # type: ignore[arg-type]
    upstream = (example.upstream[0], example.upstream[1])
    lm, loss, teacher_lm = losses_of_rows(layers[0], hidden, inputs, upstream if announced else None, rows)
    (upstream[0] * lm + upstream[1] * loss).sum().backward()
    keep = torch.stack([MASK[0], MASK[0] * (torch.arange(ROWS) < ROWS - (ahead or 0))])
    for found, name in ((lm, "lm"), (loss, "kd")):
        torch.testing.assert_close((found * keep).detach(), (expected[name] * keep).float(), **CLOSE)
        assert not found[:, MASK[0] == 0].any()
    torch.testing.assert_close(teacher_lm * MASK[0], (expected["teacher_lm"] * MASK[0]).float(), **CLOSE)
    for number, each in enumerate(hidden):
        assert each.grad is not None
        torch.testing.assert_close(each.grad, expected[f"hidden{number}"].float(), **CLOSE)
    assert layers[0].weight.grad is not None
    torch.testing.assert_close(layers[0].weight.grad, expected["weight"].float(), **CLOSE)


def test_rows_are_sequence_first() -> None:
    mask = torch.zeros(2, 3)
    mask[0, 1] = mask[1, 2] = 1
    assert counted_rows(mask).tolist() == [2, 5]  # position times the batch size, plus the sample
    assert counted_rows(torch.zeros(2, 3)).tolist() == [0]
