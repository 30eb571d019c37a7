"""The sizes that a recipe asks for, as those of a model (imports no torch)."""

from __future__ import annotations

import dataclasses
import math

from megatron_slim.aliases import Keywords
from megatron_slim.architecture.family import LAYERS
from megatron_slim.architecture.kinds import KINDS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.errors import RecipeError
from megatron_slim.pruning.allocation import least_experts
from megatron_slim.pruning.depth import depth_of, layer_fields
from megatron_slim.recipe import Recipe


def wanted_sizes(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """The sizes that a target names; heads follow their groups where only the number of groups is given."""
    sizes = {key: value for key, value in dataclasses.asdict(recipe.target).items() if value is not None}
    for axis in (kind.heads for kind in KINDS.values()):
        if axis.groups_field in sizes and axis.field not in sizes:
            sizes[axis.field] = shape.sizes[axis.axis] * sizes[axis.groups_field]
    return sizes


def uniform(shape: ModelShape) -> ModelShape:
    """The same with equally many experts in every layer: what is known before statistics choose layers."""
    return dataclasses.replace(shape, experts_per_layer=())


def target_shape(
    recipe: Recipe, shape: ModelShape, kept_layers: tuple[int, ...], experts: tuple[int, ...] | None = None
) -> ModelShape:
    """Sizes of the target; every remaining layer keeps its own type.

    Args:
        recipe: what is wanted.
        shape: of the source.
        kept_layers: source layers that survive.
        experts: of each of them, where they are allocated; None: as the recipe says of all, or as each has.

    Raises:
        RecipeError: the result cannot be built.
    """
    wanted: Keywords = wanted_sizes(recipe, shape)
    wanted |= layer_fields(depth_of(shape, kept_layers))
    if experts is None:
        kept = recipe.target.num_moe_experts is None and shape.experts_per_layer
        experts = tuple(shape.experts_per_layer[layer] for layer in kept_layers) if kept else ()
    target = dataclasses.replace(shape, **wanted, experts_per_layer=experts).simplest()
    if violations := target.violations():
        raise RecipeError("; ".join(violations), where="target")
    return target


def shape_before_statistics(recipe: Recipe, shape: ModelShape, kept_layers: tuple[int, ...]) -> ModelShape:
    """`target_shape` before it is known how experts are allocated: of the right size, and no two layers alike.

    What different numbers of experts rule out is ruled out for this one, such as expert parallelism.
    """
    average, unit = recipe.target.num_moe_experts, allocation_unit(recipe)
    blocks = set(shape.routed_blocks)
    routed = [place for place, layer in enumerate(kept_layers) if f"{LAYERS}{layer}" in blocks]
    if recipe.experts.allocation != "loss" or average is None or len(routed) < 2:
        return target_shape(recipe, shape, kept_layers)
    topk = recipe.target.moe_router_topk or shape.moe_router_topk
    if average - unit < least_experts(average, topk) or average + unit > shape.num_moe_experts:
        return target_shape(recipe, shape, kept_layers)
    counts = [average if place in routed else 0 for place in range(len(kept_layers))]
    counts[routed[0]] += unit
    counts[routed[1]] -= unit
    return target_shape(recipe, shape, kept_layers, tuple(counts))


def allocation_unit(recipe: Recipe) -> int:
    """What the number of experts of each layer is a multiple of, where they are allocated by loss."""
    return math.lcm(recipe.experts.multiple, recipe.experts.num_groups)
