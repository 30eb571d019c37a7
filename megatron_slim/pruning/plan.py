"""The plan: every decision of a pruning, complete, as JSON that a person can read before a byte moves.

`make_plan` is a pure function of recipe, statistics and source shape; the same three give the same bytes. No tensor is
needed to make a plan, and nothing but the plan and the tensors to apply it (`pruning.apply`). (Where the caller has the
candidates of a budget measured, the plan follows from what that gave too.)
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slim.architecture.kinds import KINDS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import count_parameters
from megatron_slim.errors import RecipeError
from megatron_slim.extras import require
from megatron_slim.files import sha256, write_atomic
from megatron_slim.pruning import statistics
from megatron_slim.pruning.allocation import allocate, least_experts
from megatron_slim.pruning.depth import Depth, depth_of, is_whole, kept_layers, layer_fields, possible_depths
from megatron_slim.pruning.experts import ExpertGroup, expert_groups
from megatron_slim.pruning.inner_axes import InnerAxes, best, choose
from megatron_slim.pruning.search import Ranking, Space, resolved, search
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe import Experts, Recipe, Target

VERSION = 2
# A row of an expert is a multiple of 16 bytes in bf16, or PyTorch's grouped matmul, which transformers uses, fails.
ROW_MULTIPLE = 8


@dataclass(frozen=True)
class Plan:
    """A complete decision.

    Attributes:
        recipe: what was asked for.
        source_shape: the model that it was made for.
        target_shape: the model that it gives.
        source_sha256: fingerprint of the checkpoint (`streaming.fingerprint.fingerprint`).
        stats_sha256: hash of the statistics that it follows from.
        kept_layers: source layers that survive, ascending.
        kept_hidden: source hidden dimensions that survive, ascending.
        experts: per surviving block with experts, under its name in the source, those that survive, ascending by base.
        inner: per surviving block, FFN neurons and attention heads that survive.
        search: how sizes were found for the recipe's budget; None where it has none.
        allocation: what pruning the experts of each layer alone adds to the loss, where the recipe allocates them by
            loss (`sensitivity`).
    """

    recipe: Recipe
    source_shape: ModelShape
    target_shape: ModelShape
    source_sha256: str
    stats_sha256: str
    kept_layers: tuple[int, ...]
    kept_hidden: tuple[int, ...]
    experts: Mapping[str, tuple[ExpertGroup, ...]]
    inner: InnerAxes
    search: Ranking | None = None
    allocation: Mapping[str, float] = field(default_factory=dict)

    @property
    def source_blocks(self) -> dict[str, str]:
        """Source block of every target block."""
        mtp = {f"mtp.layers.{depth}": f"mtp.layers.{depth}" for depth in range(self.source_shape.mtp_num_layers)}
        return {f"model.layers.{new}": f"model.layers.{old}" for new, old in enumerate(self.kept_layers)} | mtp

    def to_dict(self) -> dict[str, Any]:
        """As a plan document."""
        return {
            "version": VERSION,
            "recipe": self.recipe.to_dict(),
            "source": {"sha256": self.source_sha256, "shape": self.source_shape.to_dict()},
            "stats": {"sha256": self.stats_sha256},
            "search": None if self.search is None else self.search.to_dict(),
            "target": {"shape": self.target_shape.to_dict()},
            "kept_layers": list(self.kept_layers),
            "kept_hidden": list(self.kept_hidden),
            "experts": {block: _groups_dict(groups) for block, groups in self.experts.items()},
            **({"allocation": dict(self.allocation)} if self.allocation else {}),
            **self.inner.to_dict(),
        }

    def to_json(self) -> str:
        """Deterministic JSON with every list on one line."""
        return _render(self.to_dict()) + "\n"

    @property
    def sha256(self) -> str:
        """Hash of the plan's JSON."""
        return sha256(self.to_json())

    def save(self, path: Path | str) -> None:
        """Write the plan's JSON."""
        write_atomic(Path(path), self.to_json())

    def __str__(self) -> str:
        """The plan as tables."""
        from megatron_slim.pruning.plan_tables import text

        return text(self)


def make_plan(
    recipe: Recipe,
    stats: Statistics,
    shape: ModelShape,
    *,
    measure: Callable[[Plan], float] | None = None,
    top: int = 3,
    sensitivity: Callable[[Plan], Mapping[str, float]] | None = None,
) -> Plan:
    """Decide what survives.

    Args:
        recipe: what is wanted.
        stats: complete statistics of the source (`Statistics.check` passed).
        shape: sizes of the source.
        measure: loss of a plan's result; of the first ``top`` candidates of a budget the one of the least loss is
            taken, without it the first (`pruning.search`).
        top: how many candidates are measured, at most as many as a plan records.
        sensitivity: what each block of a plan of experts alone adds to the loss, by block; needed where the recipe
            allocates experts by loss.

    Raises:
        RecipeError: the target is impossible for this source; lists every violation.
    """
    check_recipe(recipe, shape)
    if recipe.experts.allocation == "loss" and sensitivity is None:
        raise RecipeError(
            "experts.allocation loss needs data to measure layers on", where="recipe", fix="give --search-data"
        )
    if recipe.budget is None:
        return _plan(recipe, stats, shape, None, sensitivity)

    def layers_of(count: int) -> tuple[int, ...]:
        target = dataclasses.replace(recipe.target, num_layers=count)
        return kept_layers(dataclasses.replace(recipe, target=target), stats, shape)

    space = Space(recipe, shape, lambda count: depth_of(shape, layers_of(count)))
    found = search(space, stats, layers_of)
    if measure is not None:
        first = range(min(top, len(found.candidates)))
        found = found.measured(
            [measure(_plan(recipe, stats, shape, dataclasses.replace(found, chosen=k))) for k in first]
        )
    return _plan(recipe, stats, shape, found, sensitivity)


def _plan(
    asked: Recipe,
    stats: Statistics,
    shape: ModelShape,
    found: Ranking | None,
    sensitivity: Callable[[Plan], Mapping[str, float]] | None = None,
) -> Plan:
    recipe = resolved(asked, found)
    layers = kept_layers(recipe, stats, shape)
    losses: Mapping[str, float] = {}
    if recipe.experts.allocation == "loss" and sensitivity is not None:
        losses = sensitivity(_experts_alone(recipe, stats, shape))
    target = target_shape(recipe, shape, layers, _allocated(recipe, stats, shape, layers, losses) if losses else None)
    hidden = stats.tensors[statistics.hidden_key(recipe.width.importance)].astype(np.float64)
    blocks = [f"model.layers.{layer}" for layer in layers]
    blocks += [f"mtp.layers.{depth}" for depth in range(shape.mtp_num_layers)]
    routed = set(shape.routed_blocks)
    counts = [target.in_block(block).num_moe_experts for block in target.blocks]
    experts = {b: _block_groups(recipe, stats, b, n) for b, n in zip(blocks, counts, strict=True) if b in routed}
    return Plan(
        recipe=asked,
        source_shape=shape,
        target_shape=target,
        source_sha256=stats.metadata["source_sha256"],
        stats_sha256=stats.sha256,
        kept_layers=layers,
        kept_hidden=best(hidden, target.hidden_size),
        experts=experts,
        inner=choose(stats, blocks, experts, shape, target),
        search=found,
        allocation=losses,
    )


def _experts_alone(recipe: Recipe, stats: Statistics, shape: ModelShape) -> Plan:
    """The same of experts, equally many in all layers, and nothing else."""
    experts = dataclasses.replace(recipe.experts, allocation=Experts.allocation, multiple=Experts.multiple)
    topk = recipe.target.moe_router_topk
    target = Target(num_moe_experts=recipe.target.num_moe_experts, moe_router_topk=topk)
    return _plan(Recipe(target, experts=experts), stats, shape, None)


def _allocated(
    recipe: Recipe, stats: Statistics, shape: ModelShape, layers: tuple[int, ...], losses: Mapping[str, float]
) -> tuple[int, ...]:
    """Experts of every layer that survives, 0 of dense ones."""
    kept = [f"model.layers.{layer}" for layer in layers]
    importance = {
        block: stats.tensors[statistics.importance_key(block, recipe.experts.importance)].astype(np.float64)
        for block in kept
        if block in losses
    }
    uniform = recipe.target.num_moe_experts or shape.num_moe_experts
    counts = allocate(
        {block: losses[block] for block in importance},
        importance,
        uniform,
        least=least_experts(uniform, recipe.target.moe_router_topk or shape.moe_router_topk),
        multiple=allocation_unit(recipe),
    )
    return tuple(counts.get(block, 0) for block in kept)


def allocation_unit(recipe: Recipe) -> int:
    """What the number of experts of each layer is a multiple of, where they are allocated by loss."""
    return math.lcm(recipe.experts.multiple, recipe.experts.num_groups)


def check_recipe(recipe: Recipe, shape: ModelShape, *, where: str = "recipe") -> None:
    """Refuse a target that this source cannot become, before anything is measured.

    Raises:
        RecipeError: lists every violation.
        SlimError: what it asks for needs a package that is not installed.
    """
    if recipe.experts.align != "none":
        require("align", "scipy", "experts.align")
    wanted = dataclasses.asdict(recipe.target)
    least = min(shape.expert_counts.values())
    found = [
        f"target.{key} {value} is larger than the source's {limit}"
        for key, value in wanted.items()
        if value is not None and value > (limit := least if key == "num_moe_experts" else getattr(shape, key))
    ]
    experts = recipe.target.num_moe_experts or least
    groups = recipe.experts.num_groups
    if any(count % groups for count in (*shape.expert_counts.values(), experts)):
        found.append(
            f"experts.num_groups {groups} does not divide both num_moe_experts {shape.num_moe_experts} of the source "
            f"and {experts} of the target"
        )
    found += _allocation_violations(recipe, shape, experts)
    topk = recipe.target.moe_router_topk or shape.moe_router_topk
    if topk > experts:
        found.append(
            f"moe_router_topk {topk} is larger than num_moe_experts {experts} of the target"
            + ("" if recipe.target.moe_router_topk else " (set target.moe_router_topk)")
        )
    for size in ("hidden_size", "moe_ffn_hidden_size"):
        row = wanted[size] or 0
        if row < getattr(shape, size) and row % ROW_MULTIPLE:
            found.append(f"target.{size} {row} is not a multiple of {ROW_MULTIPLE} (grouped matmul needs that)")
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
    sizes: dict[str, Any] = {k: size for k, size in wanted_sizes(recipe, shape).items() if k != "num_layers"}
    found = found or dataclasses.replace(_uniform(shape), **sizes).violations()
    if recipe.budget is not None:
        found = found or _grid_violations(recipe, shape) or space_before_statistics(recipe, shape).violations()
    if found:
        raise RecipeError("; ".join(found), where=where)


def _allocation_violations(recipe: Recipe, shape: ModelShape, experts: int) -> Iterator[str]:
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
    if (unit := allocation_unit(recipe)) > 1 and experts % unit:
        yield f"target.num_moe_experts {experts} is not a multiple of {unit}, as experts.multiple or num_groups asks"


def _uniform(shape: ModelShape) -> ModelShape:
    """The same with equally many experts in every layer: what is known before statistics choose layers."""
    return dataclasses.replace(shape, experts_per_layer=())


def wanted_sizes(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """The sizes that a target names; heads follow their groups where only the number of groups is given."""
    sizes = {key: value for key, value in dataclasses.asdict(recipe.target).items() if value is not None}
    for axis in (kind.heads for kind in KINDS.values()):
        if axis.groups_field in sizes and axis.field not in sizes:
            sizes[axis.field] = shape.sizes[axis.axis] * sizes[axis.groups_field]
    return sizes


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
    shared = 0
    for phase, recipe in enumerate(schedule.phases[number - 1 :], number):
        asked = recipe.target.num_moe_experts
        if shared and (recipe.experts.allocation == "loss" or asked is not None or recipe.budget is not None):
            raise RecipeError(
                f"phase {phase} prunes experts that phase {shared} allocates by loss",
                where=where,
                fix="allocate them in the last phase that prunes experts",
            )
        shared = phase if recipe.experts.allocation == "loss" else shared


def _possible_targets(recipe: Recipe, shape: ModelShape) -> Iterator[ModelShape]:
    """Every model that a recipe without a budget can give, as far as statistics decide."""
    sizes: dict[str, Any] = wanted_sizes(recipe, shape)
    layers = recipe.target.num_layers or shape.num_layers
    for depth in _whole_depths(recipe, shape, layers):
        yield dataclasses.replace(_uniform(shape), **sizes | layer_fields(depth))


def _whole_depths(recipe: Recipe, shape: ModelShape, layers: int) -> Iterator[Depth]:
    return (depth for depth in possible_depths(recipe, shape, layers) if is_whole(depth))


def _grid_violations(recipe: Recipe, shape: ModelShape) -> list[str]:
    """Sizes to search, named by the recipe, that would be refused as a target."""
    found = []
    for axis in recipe.search.axes:
        if getattr(shape, axis) == 0:
            found.append(f"search.axes {axis}: the source has none")
        for size in recipe.search.grid.get(axis, ()):
            target = dataclasses.replace(recipe.target, **{axis: size})
            try:
                check_recipe(dataclasses.replace(recipe, target=target, budget=None), shape)
            except RecipeError as error:
                found.append(f"search.grid.{axis} {size}: {error.what}")
    return found


def space_before_statistics(recipe: Recipe, shape: ModelShape) -> Space:
    """What a budget leaves to choose from; where statistics choose the layers, as if they chose the smallest."""

    def smallest(count: int) -> Depth:
        return min(_whole_depths(recipe, shape, count), key=lambda depth: _of_depth(shape, depth), default=())

    return Space(recipe, shape, smallest)


def _of_depth(shape: ModelShape, depth: Depth) -> int:
    return count_parameters(dataclasses.replace(_uniform(shape), **layer_fields(depth))).total


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
    wanted: dict[str, Any] = wanted_sizes(recipe, shape)
    wanted |= layer_fields(depth_of(shape, kept_layers))
    if experts is None:
        kept = recipe.target.num_moe_experts is None and shape.experts_per_layer
        experts = tuple(shape.experts_per_layer[layer] for layer in kept_layers) if kept else ()
    target = dataclasses.replace(shape, **wanted, experts_per_layer=experts).simplest()
    if violations := target.violations():
        raise RecipeError("; ".join(violations), where="target")
    return target


def _block_groups(recipe: Recipe, stats: Statistics, block: str, survivors: int) -> tuple[ExpertGroup, ...]:
    importance = stats.tensors[statistics.importance_key(block, recipe.experts.importance)].astype(np.float64)
    similarity = None
    if recipe.experts.method != "prune":  # which merges nothing
        similarity = stats.tensors[statistics.similarity_key(block, recipe.experts.similarity)].astype(np.float64)
    return expert_groups(importance, similarity, survivors, recipe.experts)


def _groups_dict(groups: tuple[ExpertGroup, ...]) -> dict[str, Any]:
    """Bases in order; of the groups that are more than a copy of their base, members and weights."""
    merged = {
        str(group.base): {"members": list(group.members), "weights": list(group.weights)}
        for group in groups
        if len(group.members) > 1
    }
    return {"kept": [group.base for group in groups], "merged": merged}


def _render(value: Any, indent: str = "") -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False)
    inner = indent + "  "
    items = [f"{inner}{json.dumps(key)}: {_render(item, inner)}" for key, item in value.items()]
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"
