"""What a larger budget leaves to the plan of a smaller one (imports no torch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_slim.pruning.search_grid import Limits
from megatron_slim.pruning.target import allocation_unit
from megatron_slim.recipe import Recipe
from megatron_slim.recipe_budget import SEARCHABLE

if TYPE_CHECKING:
    from megatron_slim.pruning.plan import Plan


def limits_within(
    recipe: Recipe, layers_of: Callable[[int], tuple[int, ...]], within: Plan | None, needed: Mapping[str, int]
) -> Limits:
    """What a larger budget, and the smaller ones, leave to a search."""
    if within is None:
        return Limits(least=needed)
    most = {axis: getattr(within.target_shape, axis) for axis in SEARCHABLE}
    if not within.target_shape.experts_per_layer:
        return Limits(most, needed)

    def experts(count: int) -> int:
        there = experts_there(layers_of(count), within)
        if recipe.experts.allocation != "loss" or not there:
            return min(there.values(), default=0)
        unit = allocation_unit(recipe)
        return sum(number // unit * unit for number in there.values()) // len(there)

    # On average a budget may have more than some layers have; what is too much for the layers is for `experts` to say.
    return Limits(most, needed, experts)


def experts_there(layers: Sequence[int], plan: Plan) -> dict[str, int]:
    """Experts that a plan keeps in some layers of the source, by block; of those that have some and that it keeps."""
    blocks = (f"model.layers.{layer}" for layer in layers)
    return {block: len(plan.experts[block]) for block in blocks if block in plan.experts}
