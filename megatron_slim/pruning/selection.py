"""What a plan keeps of every parameter of its source, as Megatron holds it: from which tensor, at which positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_slim.architecture.axes import axes_of, kept_positions, size
from megatron_slim.architecture.feed_forward import EXPERTS
from megatron_slim.architecture.prunable import HIDDEN
from megatron_slim.architecture.table import weights
from megatron_slim.architecture.weight import Weight
from megatron_slim.checkpoint.layout import split_keys
from megatron_slim.pruning.plan import Plan

DECODER_LAYERS = "decoder.layers."
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the target comes from.

    Attributes:
        key: of the tensor of the source, as a torch_dist checkpoint names it.
        expert: of a stacked one, the source's expert; None of another.
        positions: in every dimension of that tensor (of that expert), those that survive, in the target's order.
    """

    key: str
    expert: int | None
    positions: tuple[Positions, ...]


def kept_axes(plan: Plan, block: str, expert: int | None) -> dict[str, Positions]:
    """What survives of each axis of which not all does, or in another order.

    Args:
        plan: the decision.
        block: a block of the source, "" outside blocks.
        expert: which of the surviving experts, None outside them.
    """
    source = plan.source_shape
    kept = plan.inner.kept(block, source, expert) if block else {}
    hidden = np.array(plan.kept_hidden, dtype=np.int64)
    if _is_some(hidden, source.hidden_size):
        kept[HIDDEN.axis] = hidden
    bases = np.array([group.base for group in plan.experts.get(block, ())], dtype=np.int64)
    if len(bases) and _is_some(bases, source.in_block(block).num_moe_experts):
        kept[EXPERTS.axis] = bases
    return kept


def _is_some(kept: Positions, size: int) -> bool:
    """Whether it is not all indices in their order."""
    return not np.array_equal(kept, np.arange(size))


def source_key(key: str, plan: Plan) -> str:
    """Megatron's key in the source of a parameter of the target."""
    if not key.startswith(DECODER_LAYERS):
        return key
    layer, rest = key.removeprefix(DECODER_LAYERS).split(".", 1)
    return f"{DECODER_LAYERS}{plan.kept_layers[int(layer)]}.{rest}"


class Origins:
    """Origins of all tensors of a plan's target, by their keys in a torch_dist checkpoint.

    Of merged experts it is the base's, so that a plan that merges is not described by them.
    """

    def __init__(self, plan: Plan) -> None:
        """Look up the rows of both tables; positions are computed when they are asked for."""
        self.plan = plan
        source = {weight.key: weight for weight in weights(plan.source_shape)}
        self._rows = {
            key: (weight, source[source_key(weight.key, plan)], label)
            for weight in weights(plan.target_shape)
            for label, (key, _) in enumerate(split_keys(weight, plan.target_shape))
        }

    def __iter__(self) -> Iterator[str]:
        """Keys of the target."""
        return iter(self._rows)

    def of(self, key: str, expert: int | None) -> Origin:
        """The origin of a tensor of the target; ``expert`` counts the target's, None of what is not stacked."""
        target, source, label = self._rows[key]
        stored, first = split_keys(source, self.plan.source_shape)[label]
        _, own = split_keys(target, self.plan.target_shape)[label]
        block = self.plan.source_blocks[target.block] if target.block else ""
        rows, *others = self._positions(source, block, expert)
        groups = self.plan.experts.get(block, ())
        base = None if expert is None else groups[expert].base if groups else expert
        return Origin(stored, base, (rows[own] - (first.start or 0), *others))

    def _positions(self, source: Weight, block: str, expert: int | None) -> list[Positions]:
        shape = self.plan.source_shape.in_block(source.block)
        kept = kept_axes(self.plan, block, expert)
        found = []
        for dim in source.dims:
            pruned = kept.keys() & set(axes_of(dim))
            everything = np.arange(size(dim, shape.sizes), dtype=np.int64)
            found.append(kept_positions(dim, shape.sizes, kept) if pruned else everything)
        return found
