"""Operations of a training step of which some parts of a model are trained (no torch).

Of a weight that is frozen no gradient is computed, and of an input none that no trained weight needs: the backward pass
ends at the first layer with something trained. What is counted is what is needed; pipeline stages behind the first, and
recomputed layers, pass gradients on in any case (``everywhere``).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from megatron_slim.architecture.family import MTP_SUBLAYERS
from megatron_slim.architecture.flops import (
    FUSED,
    Flops,
    Kernels,
    Recompute,
    block_flops,
    head_flops,
    mtp_flops,
    products,
    student_flops,
)
from megatron_slim.architecture.kinds import SUBLAYERS
from megatron_slim.architecture.parts import (
    EMBEDDING,
    EXPERTS,
    MTP_PART,
    NORMS,
    OUTPUT,
    ROUTER,
    Place,
    TrainOnly,
    part_name,
    rows_by_place,
)
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import rows_of
from megatron_slim.architecture.weight import Weight

NO_RECOMPUTATION = Recompute()


def reads_input(row: Weight) -> bool:
    """Whether a matrix multiplies the input of its sublayer, and not something that was made of it."""
    return row.dims[-1] == "hidden"


@cache
def backward_flops(
    shape: ModelShape, kind: str, seq_length: int, kernels: Kernels, trained: frozenset[str], *, passes_on: bool
) -> dict[str, float]:
    """Backward operations per token of a sublayer, by what does them, as `block_flops` has the forward ones.

    Args:
        shape: sizes of the model.
        kind: of the sublayer.
        seq_length: positions of a sequence.
        kernels: how attention and delta rule are computed.
        trained: parts that are (`parts.IN_BLOCKS`).
        passes_on: something before the sublayer needs a gradient.
    """
    through = passes_on or NORMS in trained
    found: dict[str, float] = {}
    for name, rows in SUBLAYERS[kind].parts(rows_of(shape, kind)).items():
        own = part_name(kind, name) in trained
        inner = own or (name == EXPERTS and ROUTER in trained)  # its scores weigh what experts give
        needed = [row for row in rows if through or (inner and not reads_input(row))]
        found[name] = products(needed, shape) + (products(rows, shape) if own else 0.0)
    own = any(part_name(kind, name) in trained for name in found)
    for name, flops in SUBLAYERS[kind].operations(shape, seq_length, kernels).items():
        found[name] = 2.0 * flops if through or own else 0.0
    return found


def _any_trained(shape: ModelShape, only: TrainOnly, parts: Iterable[str]) -> bool:
    places = {place for row, place in rows_by_place(shape) if not row.buffer}
    return any(only.trains(place) for place in places if place.part in parts or place.layer is not None)


@cache
def step_flops(
    shape: ModelShape,
    seq_length: int,
    kernels: Kernels = FUSED,
    recompute: Recompute = NO_RECOMPUTATION,
    only: TrainOnly | None = None,
    *,
    everywhere: bool = False,
) -> Flops:
    """As `student_flops`, of a step that trains some parts.

    Args:
        shape: sizes of the student.
        seq_length: positions of a sequence.
        kernels: how attention and delta rule are computed.
        recompute: what the backward pass computes again.
        only: what is trained; None: all.
        everywhere: every layer passes a gradient on, as behind the first pipeline stage.
    """
    if only is None:
        return student_flops(shape, seq_length, kernels, recompute)
    trunk = _any_trained(shape, only, (EMBEDDING, NORMS))  # and any layer
    mtp = shape.mtp_num_layers > 0 and only.trains(Place(MTP_PART))
    all_of_trunk = everywhere or (recompute.granularity is not None and trunk)
    passes_on = all_of_trunk or only.trains(Place(EMBEDDING))
    layers, again = [], []
    for layer, block in enumerate(list(shape.blocks)[: shape.num_layers]):
        sizes, forward, back = shape.in_block(block), 0.0, 0.0
        kinds, trained = shape.sublayers_of(block), only.parts_of_layer(layer)
        parts = block_flops(sizes, kinds, seq_length, kernels)
        for kind in kinds:
            back += sum(backward_flops(sizes, kind, seq_length, kernels, trained, passes_on=passes_on).values())
            passes_on = passes_on or bool(trained.intersection(_parts_in(sizes, kind)))
        forward = sum(parts.values())
        layers.append(forward + back)
        again.append(recompute.again(parts) if passes_on else 0.0)
    depths, through = shape.mtp_num_layers, float(trunk or mtp or everywhere)
    heads = head_flops(shape) * (1 + depths) * (1.0 + through + only.trains(Place(OUTPUT)))
    last = heads + depths * _of_mtp(shape, seq_length, kernels, recompute, times=1.0 + through + mtp)
    if recompute.granularity == "full" and recompute.method == "block":
        return Flops(tuple(layers), last, first_layers=tuple(again), first=recompute.num_layers)
    return Flops(tuple(once + more for once, more in zip(layers, again, strict=True)), last)


def _parts_in(shape: ModelShape, kind: str) -> set[str]:
    """Parts that a sublayer has something of."""
    return {part_name(kind, name) for name in SUBLAYERS[kind].parts(rows_of(shape, kind))} | {NORMS}


def _of_mtp(shape: ModelShape, seq_length: int, kernels: Kernels, recompute: Recompute, times: float) -> float:
    """Of one MTP block, which is trained as a whole, and recomputed where it has a backward pass."""
    block, projection = block_flops(shape, MTP_SUBLAYERS, seq_length, kernels), mtp_flops(shape)
    core = sum(flops for name, flops in block.items() if name in _without_weights(shape, seq_length, kernels))
    found = times * (projection + sum(block.values()) - core) + (3.0 if times > 1 else 1.0) * core
    by_block = recompute.granularity == "full" and recompute.method == "block"
    if times > 1 and not by_block:
        found += recompute.again(block) + (projection if recompute.granularity == "full" else 0.0)
    return found


def _without_weights(shape: ModelShape, seq_length: int, kernels: Kernels) -> set[str]:
    return {name for kind in MTP_SUBLAYERS for name in SUBLAYERS[kind].operations(shape, seq_length, kernels)}
