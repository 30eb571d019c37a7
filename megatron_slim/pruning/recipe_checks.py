"""What a recipe asks for that no statistics can give: found before anything is measured (imports no torch)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from megatron_slim.aliases import Keywords
from megatron_slim.architecture.feed_forward import EXPERTS
from megatron_slim.architecture.kinds import AXES, KINDS
from megatron_slim.architecture.prunable import LAYERS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import count_parameters
from megatron_slim.errors import RecipeError
from megatron_slim.extras import require
from megatron_slim.pruning.depth import Depth, is_whole, layer_fields, possible_depths
from megatron_slim.pruning.search import Candidate, Space, counted
from megatron_slim.pruning.search_grid import Limits
from megatron_slim.pruning.target import allocation_unit, uniform, wanted_sizes
from megatron_slim.recipe import Recipe
from megatron_slim.recipe_elastic import refuse_budgets
from megatron_slim.recipe_sections import Experts


def check_recipe(recipe: Recipe, shape: ModelShape, *, where: str = "recipe") -> None:
    """Refuse a target that this source cannot become, before anything is measured.

    Raises:
        RecipeError: lists every violation.
        SlimError: what it asks for needs a package that is not installed.
    """
    refuse_budgets(recipe, where=where)
    if recipe.experts.align != "none":
        require("align", "scipy", "experts.align")
    wanted = dataclasses.asdict(recipe.target)
    least = min(shape.expert_counts.values())
    found = [
        f"target.{key} {value} is larger than the source's {limit}"
        for key, value in wanted.items()
        if value is not None and value > (limit := least if key == EXPERTS.field else getattr(shape, key))
    ]
    experts = recipe.target.num_moe_experts or least
    groups = recipe.experts.num_groups
    if any(count % groups for count in (*shape.expert_counts.values(), experts)):
        of_source = ", ".join(map(str, sorted(set(shape.expert_counts.values()))))
        both, target = "", ""
        if recipe.target.num_moe_experts is not None:
            both, target = "both ", f" and {experts} of the target"
        what = f"{both}num_moe_experts {of_source} of the source{target}"
        found.append(f"experts.num_groups {groups} does not divide {what}")
    topk = recipe.target.moe_router_topk or shape.moe_router_topk
    found += _allocation_violations(recipe, shape, experts, topk)
    if topk > experts:
        found.append(
            f"moe_router_topk {topk} is larger than num_moe_experts {experts} of the target"
            + ("" if recipe.target.moe_router_topk else " (set target.moe_router_topk)")
        )
    for axis in AXES.values():
        size = wanted[axis.field] or 0
        if size < getattr(shape, axis.field) and size % axis.row_multiple:
            found.append(
                f"target.{axis.field} {size} is not a multiple of {axis.row_multiple} (grouped matmul needs that)"
            )
    if recipe.target.moe_router_topk == 1 and shape.norm_topk_prob:
        found.append("moe_router_topk 1 with norm_topk_prob leaves the router without a gradient")
    if experts < least and groups % shape.moe_router_num_groups:
        found.append(
            f"experts.num_groups {groups} is not a multiple of {shape.moe_router_num_groups}, the groups that the "
            f"router chooses from, which must stay equal (set experts.num_groups)"
        )
    layers = recipe.target.num_layers or shape.num_layers
    if layers <= shape.num_layers and not list(_whole_depths(recipe, shape, layers)):
        found.append(f"target.num_layers {layers} leaves no full_attention layer with experts")
    found += _head_violations(recipe, shape)
    sizes: Keywords = {k: size for k, size in wanted_sizes(recipe, shape).items() if k != LAYERS.field}
    found = found or dataclasses.replace(uniform(shape), **sizes).violations()
    if recipe.budget is not None:
        found = found or _grid_violations(recipe, shape) or space_before_statistics(recipe, shape).violations()
    if found:
        raise RecipeError("; ".join(found), where=where)


def _allocation_violations(recipe: Recipe, shape: ModelShape, experts: int, topk: int) -> Iterator[str]:
    """What rules out that experts are allocated by loss, and a budget where they have been."""
    if shape.experts_per_layer and recipe.budget is not None:
        yield "a budget for a source whose layers have different numbers of experts"
    if recipe.experts.allocation != "loss":
        if recipe.experts.multiple != Experts.multiple:
            yield f"experts.multiple {recipe.experts.multiple} without experts.allocation loss"
        return
    if shape.experts_per_layer:
        yield "experts.allocation loss for a source whose layers have different numbers of experts already"
    if shape.moe_router_num_groups > 1:
        yield "experts.allocation loss with a router that chooses groups of experts first"
    if recipe.budget is None and recipe.target.num_moe_experts is None:
        yield "experts.allocation loss without target.num_moe_experts, the number on average"
    unit = allocation_unit(recipe)
    if recipe.budget is not None and recipe.target.num_moe_experts is None and EXPERTS.field in recipe.search.axes:
        if experts // unit * unit < topk:
            yield f"no number of experts from {topk} to {experts} is a multiple of {unit}, as experts.multiple asks"
    elif experts % unit:
        whose = "of the source" if recipe.target.num_moe_experts is None else "of the target"
        yield f"num_moe_experts {experts} {whose} is not a multiple of {unit}, as experts.multiple or num_groups asks"


def _head_violations(recipe: Recipe, shape: ModelShape) -> list[str]:
    """Numbers of heads that the groups cannot have."""
    sizes, found = dataclasses.asdict(recipe.target), []
    for axis in (kind.heads for kind in KINDS.values()):
        groups, heads = sizes[axis.groups_field], sizes[axis.field]
        if groups is None:
            continue
        if heads is not None and heads > shape.sizes[axis.axis] * groups:
            found.append(f"target.{axis.field} {heads} is more than {groups} {axis.groups_noun} have in the source")
        if recipe.budget is not None and heads is None:
            found.append(f"target.{axis.groups_field} with a budget needs target.{axis.field}")
    return found


def check_later_phases(schedule: Recipe, number: int, shape: ModelShape, *, where: str) -> None:
    """Refuse now what a later phase of a schedule would refuse after the training of the one before.

    Args:
        schedule: a recipe with phases; of one without there is nothing to check.
        number: the phase that is about to begin, from 1.
        shape: the model that it is given.
        where: the recipe's file, for errors.

    Raises:
        RecipeError: a later phase cannot be met, whatever statistics choose until then. What follows a phase with a
            budget is not known yet.
    """
    _check_allocations(schedule, number, where=where)
    possible = {shape}
    for phase, recipe in enumerate(schedule.phases[number - 1 :], number):
        accepted: list[ModelShape] = []
        for source in possible:
            try:
                check_recipe(recipe, source, where=f"{where}: phase {phase}")
                accepted.append(source)
            except RecipeError as error:
                refused = error
        if not accepted:
            raise refused
        if recipe.budget is not None:
            return
        possible = {target for source in accepted for target in _possible_targets(recipe, source)}


def _check_allocations(schedule: Recipe, number: int, *, where: str) -> None:
    """Experts that a phase has allocated by loss are not pruned again: what layers have then is not known before."""
    shared, unit = 0, 1
    for phase, recipe in enumerate(schedule.phases[number - 1 :], number):
        asked, groups = recipe.target.num_moe_experts, recipe.experts.num_groups
        if shared and (recipe.experts.allocation == "loss" or asked is not None or recipe.budget is not None):
            raise RecipeError(
                f"phase {phase} prunes experts that phase {shared} allocates by loss",
                where=where,
                fix="allocate them in the last phase that prunes experts",
            )
        if shared and unit % groups:
            raise RecipeError(
                f"experts.num_groups {groups} of phase {phase} does not divide the numbers of experts that phase "
                f"{shared} allocates by loss",
                where=where,
                fix=f"leave it out, or give phase {shared} experts.multiple {math.lcm(unit, groups)}",
            )
        if recipe.experts.allocation == "loss":
            shared, unit = phase, allocation_unit(recipe)


def _possible_targets(recipe: Recipe, shape: ModelShape) -> Iterator[ModelShape]:
    """Every model that a recipe without a budget can give, as far as statistics decide."""
    sizes: Keywords = wanted_sizes(recipe, shape)
    layers = recipe.target.num_layers or shape.num_layers
    for depth in _whole_depths(recipe, shape, layers):
        yield dataclasses.replace(uniform(shape), **sizes | layer_fields(depth))


def _whole_depths(recipe: Recipe, shape: ModelShape, layers: int) -> Iterator[Depth]:
    return (depth for depth in possible_depths(recipe, shape, layers) if is_whole(depth))


def _grid_violations(recipe: Recipe, shape: ModelShape) -> list[str]:
    """Sizes to search, named by the recipe, that would be refused as a target."""
    found = [
        f"search.axes {whole} and {unit}: the one is a multiple of the other (leave one out)"
        for whole, (_, unit) in shape.family.multiples.items()
        if {whole, unit} <= {*recipe.search.axes}
    ]
    alike = dataclasses.replace(recipe.experts, allocation=Experts.allocation, multiple=Experts.multiple)
    for axis in recipe.search.axes:
        if getattr(shape, axis) == 0:
            found.append(f"search.axes {axis}: the source has none")
        for size in recipe.search.grid.get(axis, ()):
            target = dataclasses.replace(recipe.target, **{axis: size})
            # By loss experts are allocated under a number on average, which is searched, too.
            experts = recipe.experts if target.num_moe_experts is not None else alike
            try:
                check_recipe(dataclasses.replace(recipe, target=target, experts=experts, budget=None), shape)
            except RecipeError as error:
                found.append(f"search.grid.{axis} {size}: {error.what}")
    return found


def space_before_statistics(recipe: Recipe, shape: ModelShape, limits: Limits | None = None) -> Space:
    """What a budget leaves to choose from; where statistics choose the layers, as if they chose the smallest."""

    def smallest(count: int) -> Depth:
        return min(_whole_depths(recipe, shape, count), key=lambda depth: _of_depth(shape, depth), default=())

    return Space(recipe, shape, smallest, limits)


def least_model(recipe: Recipe, shape: ModelShape) -> Candidate:
    """The smallest model that a recipe can give, as far as that is known before statistics."""
    if recipe.budget is not None:
        space = space_before_statistics(recipe, shape)
        return space.candidate({axis: sizes[0] for axis, sizes in space.grid.items()})
    return min((counted(model, {}, 0.0) for model in _possible_targets(recipe, shape)), key=lambda row: row.params)


def _of_depth(shape: ModelShape, depth: Depth) -> int:
    return count_parameters(dataclasses.replace(uniform(shape), **layer_fields(depth))).total
