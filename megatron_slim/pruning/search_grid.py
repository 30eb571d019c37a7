"""The sizes of every axis that a search looks at (imports no torch)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field

from megatron_slim.architecture.feed_forward import EXPERTS
from megatron_slim.architecture.kinds import AXES
from megatron_slim.architecture.prunable import LAYERS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.pruning.depth import Depth, is_whole
from megatron_slim.pruning.target import allocation_unit
from megatron_slim.recipe import Recipe

STEPS = 16  # of an axis, about
FEWEST = 8  # sizes that the first of an axis's multiples must leave
# What so many layers are left with; empty where the method cannot leave so many.
DepthOf = Callable[[int], Depth]


@dataclass(frozen=True)
class Limits:
    """What the budgets before and after one leave to its search.

    Attributes:
        most: by axis, what the one before keeps.
        least: by axis, what those after keep. The usual sizes include both.
        experts: for layers of such a number, the most experts that there are for all of them alike, or on average where
            they are allocated by loss; None: as many as the source has.
    """

    most: Mapping[str, int] = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)
    experts: Callable[[int], int] | None = None

    def within(self, axis: str, sizes: Iterable[int]) -> list[int]:
        """Those of some sizes that are allowed."""
        least, most = self.least.get(axis, 0), self.most.get(axis, math.inf)
        return [size for size in sizes if least <= size <= most]


def usual_sizes(axis: str, shape: ModelShape, runs: int = 1) -> list[int]:
    """The sizes of an axis that are searched unless the recipe names some: ascending, the source's own the last
    (but of experts only if it is divided).

    Layers: whole attention periods, single layers where the source has none. Others: multiples of a step, about
    `STEPS` of them.

    Args:
        axis: one of `recipe_budget.SEARCHABLE`.
        shape: sizes of the source.
        runs: what divides every number of experts (`target.allocation_unit`).
    """
    size: int = getattr(shape, axis)
    if axis == LAYERS.field:
        step = shape.full_attention_interval or 1
    else:
        coarse, fine = AXES[axis].multiples or (shape.sizes[AXES[axis].group_axis],) * 2
        multiple = coarse if size >= FEWEST * coarse else fine
        if axis == EXPERTS.field:
            multiple = both if (both := math.lcm(multiple, runs)) <= size else runs
        step = max(multiple, size // STEPS // multiple * multiple)
    sizes = [*range(step, size, step), size]
    return [size for size in sizes if size % runs == 0] if axis == EXPERTS.field else sizes


def grid(recipe: Recipe, shape: ModelShape, depth_of: DepthOf, limits: Limits) -> dict[str, list[int]]:
    """The sizes of every axis that is searched, ascending."""
    found = {}
    for axis in recipe.search.axes:
        if getattr(recipe.target, axis) is not None:
            continue
        named = recipe.search.grid.get(axis)
        unit = allocation_unit(recipe)
        sizes = usual_sizes(axis, shape, unit) if named is None else list(named)
        if named is None:
            others = [known[axis] for known in (limits.most, limits.least) if axis in known]
            sizes = sorted({*sizes, *(size for size in others if axis != EXPERTS.field or size % unit == 0)})
        if axis == EXPERTS.field:
            sizes = [size for size in sizes if size >= (recipe.target.moe_router_topk or shape.moe_router_topk)]
        sizes = limits.within(axis, _divisible(axis, sizes, recipe, shape))
        if axis == LAYERS.field:
            sizes = [size for size in sizes if is_whole(depth_of(size))]
        found[axis] = sizes
    return found


def _divisible(axis: str, sizes: Iterable[int], recipe: Recipe, shape: ModelShape) -> list[int]:
    """Those of some sizes that go with another one of which this one must be a multiple, or a divisor."""
    fixed = {**shape.to_dict(), **{key: size for key, size in asdict(recipe.target).items() if size is not None}}
    found = list(sizes)
    for whole, (_, unit) in shape.family.multiples.items():
        if axis == unit:
            found = [size for size in found if fixed[whole] % size == 0]
        elif axis == whole:
            found = [size for size in found if size % fixed[unit] == 0]
    return found
