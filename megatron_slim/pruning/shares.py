"""What a model keeps of what was measured: the score of a candidate (see `search`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from megatron_slim.architecture.family import MOE
from megatron_slim.architecture.feed_forward import EXPERT_FFN
from megatron_slim.architecture.kinds import FEED_FORWARD, KINDS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.pruning import statistics
from megatron_slim.pruning.experts import Vector
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe import Recipe

LAYERS, HIDDEN, EXPERTS = "num_layers", "hidden_size", "num_moe_experts"
NEURONS = {kind.neurons.field: kind for kind in FEED_FORWARD.values()}  # by the size that says their number


class Shares:
    """What share of the importance of an axis is kept, by size.

    Args:
        recipe: says which importances count.
        stats: complete statistics of the source.
        shape: sizes of the source.
    """

    def __init__(self, recipe: Recipe, stats: Statistics, shape: ModelShape) -> None:
        self._recipe, self._stats, self._shape = recipe, stats, shape
        self._kept: dict[tuple[str, int], Vector] = {}

    def score(self, target: ModelShape, layers_of: Callable[[int], tuple[int, ...]]) -> float:
        """Product of the shares that a target keeps."""
        kept = layers_of(target.num_layers)
        keys = [statistics.layer_key(block, "block_influence") for block in self._blocks(range(self._shape.num_layers))]
        influence = [max(0.0, float(self._stats.tensors[key])) for key in keys]  # rounding may take it below zero
        total = math.fsum(influence)
        product = math.fsum(influence[layer] for layer in kept) / total if total else len(kept) / len(influence)
        if target.hidden_size < self._shape.hidden_size:
            product *= float(self._curve(HIDDEN, 0)[target.hidden_size - 1])
        for axis in (EXPERTS, EXPERT_FFN, *NEURONS, *(kind.heads.field for kind in KINDS.values())):
            size: int = getattr(target, axis)
            if size < getattr(self._shape, axis):
                layers = [layer for layer in kept if self._has(axis, layer)]
                each = [float(self._curve(axis, layer)[self._place(axis, size)]) for layer in layers]
                product *= math.fsum(each) / len(each) if each else 1.0
        return product

    def _blocks(self, layers: Iterable[int]) -> list[str]:
        return [f"model.layers.{layer}" for layer in layers]

    def _has(self, axis: str, layer: int) -> bool:
        """Whether a layer has an axis: heads and neurons belong to one kind of sublayer."""
        kinds = {kind.heads.field: name for name, kind in KINDS.items()} | dict.fromkeys((EXPERTS, EXPERT_FFN), MOE)
        kinds |= {axis: kind.name for axis, kind in NEURONS.items()}
        return kinds[axis] in self._shape.sublayers[layer]

    def _groups(self, axis: str) -> int:
        """Groups that an importance falls into, of which each keeps equally many."""
        groups = {kind.heads.field: self._shape.sizes[kind.heads.group_axis] for kind in KINDS.values()}
        groups |= {EXPERTS: self._recipe.experts.num_groups, EXPERT_FFN: self._shape.num_moe_experts}
        return groups.get(axis, 1)

    def _place(self, axis: str, size: int) -> int:
        per_expert = axis == EXPERT_FFN  # the size is that of every expert, not of all together
        return (size if per_expert else size // self._groups(axis)) - 1

    def _curve(self, axis: str, layer: int) -> Vector:
        """Share kept by the best 1, 2, ... of every group."""
        if (axis, layer) not in self._kept:
            block = f"model.layers.{layer}"
            names = {
                HIDDEN: statistics.hidden_key(self._recipe.width.importance),
                EXPERTS: statistics.importance_key(block, self._recipe.experts.importance),
                EXPERT_FFN: statistics.expert_ffn_key(block),
                **{axis: statistics.neurons_key(block, kind.name) for axis, kind in NEURONS.items()},
            }
            name = names.get(axis) or statistics.heads_key(block, self._shape.layer_types[layer])
            self._kept[axis, layer] = retained(self._stats.tensors[name].astype(np.float64), self._groups(axis))
        return self._kept[axis, layer]


def retained(importance: Vector, groups: int = 1) -> Vector:
    """Share of all importance that the best 1, 2, ... of every group have together; all zero counts as all equal.

    Args:
        importance: of equal groups, one after the other.
        groups: how many there are.

    >>> retained(np.array([1.0, 3.0, 0.0, 4.0]), 2).tolist()
    [0.875, 1.0]
    """
    each = importance.reshape(groups, -1)
    if not each.any():
        each = np.ones_like(each)
    # Running sums add one after the other, whatever the processor; np.sum adds in an order of its own.
    best = np.cumsum(-np.sort(-each, axis=1), axis=1)
    kept: Vector = np.cumsum(best, axis=0)[-1]
    return kept / kept[-1]
