"""Losses of the rows that count alone: of conversations half the tokens or more are not the assistant's.

Output layers are a large part of a small model's step, and what is masked needs no logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from torch import Tensor

from megatron_slim.distillation.fused import DistillationInputs, Target, Upstream, fused_losses
from megatron_slim.distillation.output_layer import OutputLayer


def counted_rows(loss_mask: Tensor) -> Tensor:
    """Rows [n], sequence first, at which some head's prediction may count; at least one.

    Predictions of MTP heads count only where that of the main head does (`mtp_masks.mtp_mask`).

    Args:
        loss_mask: [b, s], of this rank under context parallelism.
    """
    rows = loss_mask.t().flatten().nonzero()[:, 0]
    return rows if len(rows) else rows.new_zeros(1)


def losses_of_rows(
    student: OutputLayer,
    hidden: Sequence[Tensor],
    inputs: DistillationInputs,
    expected: Upstream | None,
    rows: Tensor,
) -> tuple[Tensor, ...]:
    """`fused_losses` of some rows; of the others all terms are zero, with no gradient."""
    total = len(hidden[0])
    upstream = None if expected is None else tuple(each.index_select(1, rows) for each in expected)
    of_rows = dataclasses.replace(
        inputs, labels=inputs.labels.index_select(1, rows), targets=tuple(_targets_of_rows(inputs.targets, rows))
    )
    found = fused_losses(student, [each.index_select(0, rows) for each in hidden], of_rows, upstream)
    return tuple(each.new_zeros(*each.shape[:-1], total).index_copy(-1, rows, each) for each in found)


def _targets_of_rows(targets: Sequence[Target], rows: Tensor) -> Iterator[Target]:
    """The same rows of every head's target. One that is shared by heads at different rows is taken for each of them."""
    for target in targets:
        if target.hidden is None:
            yield target
            continue
        last = len(target.hidden) - 1
        for head, ahead in target.student_heads:
            # What is behind the end supervises rows that do not count.
            yield Target(target.hidden.index_select(0, (rows + ahead).clamp(max=last)), ((head, 0),))
