"""What a model keeps of what was measured: the score of a candidate (see `search`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from megatron_slim.architecture.feed_forward import EXPERT_NEURONS, EXPERTS
from megatron_slim.architecture.kinds import BLOCK_AXES, SUBLAYERS
from megatron_slim.architecture.prunable import HIDDEN, PrunableAxis
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.pruning import statistics
from megatron_slim.pruning.experts import Vector
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe import Recipe


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
        for field, axis in BLOCK_AXES.items():
            size: int = getattr(target, field)
            if axis.is_searched and size < getattr(self._shape, field):
                layers = [layer for layer in kept if self._has(axis, layer)]
                each = [float(self._curve(axis, layer)[self._place(axis, size)]) for layer in layers]
                product *= math.fsum(each) / len(each) if each else 1.0
        return product

    def _blocks(self, layers: Iterable[int]) -> list[str]:
        return [f"model.layers.{layer}" for layer in layers]

    def _has(self, axis: PrunableAxis, layer: int) -> bool:
        """Whether a layer has an axis: each belongs to one kind of sublayer."""
        return any(axis in SUBLAYERS[kind].axes for kind in self._shape.sublayers[layer])

    def _groups(self, axis: PrunableAxis) -> int:
        """Groups that an importance falls into, of which each keeps equally many."""
        if axis == EXPERTS:
            return self._recipe.experts.num_groups
        return self._shape.sizes[axis.group_axis] if axis.group_axis else 1

    def _place(self, axis: PrunableAxis, size: int) -> int:
        per_expert = axis == EXPERT_NEURONS  # the size is that of every expert, not of all together
        return (size if per_expert else size // self._groups(axis)) - 1

    def _curve(self, axis: PrunableAxis, layer: int) -> Vector:
        """Share kept by the best 1, 2, ... of every group."""
        if (axis.field, layer) not in self._kept:
            block = f"model.layers.{layer}"
            if axis == HIDDEN:
                name = statistics.hidden_key(self._recipe.width.importance)
            elif axis == EXPERTS:
                name = statistics.importance_key(block, self._recipe.experts.importance)
            else:
                name = statistics.axis_key(block, axis)
            importance = self._stats.tensors[name].astype(np.float64)
            self._kept[axis.field, layer] = retained(importance, self._groups(axis))
        return self._kept[axis.field, layer]


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
