"""The plan: every decision of a pruning, complete, as JSON that a person can read before a byte moves.

`make_plan` is a pure function of recipe, statistics and source shape; the same three give the same bytes. No tensor is
needed to make a plan, and nothing but the plan and the tensors to apply it (`pruning.apply`). (Where the caller has the
candidates of a budget measured, the plan follows from what that gave too.)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_slim.aliases import JsonObject
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.errors import RecipeError
from megatron_slim.files import sha256, write_atomic
from megatron_slim.pruning import statistics
from megatron_slim.pruning.allocation import allocate, least_experts
from megatron_slim.pruning.depth import Depth, depth_of, kept_layers
from megatron_slim.pruning.experts import ExpertGroup, expert_groups
from megatron_slim.pruning.inner_axes import InnerAxes, best, choose
from megatron_slim.pruning.recipe_checks import check_recipe
from megatron_slim.pruning.search import Ranking, Space, resolved, search
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.pruning.target import allocation_unit, target_shape
from megatron_slim.pruning.within import experts_there, limits_within
from megatron_slim.recipe import Recipe
from megatron_slim.recipe_sections import Experts, Target

VERSION = 2


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

    def to_dict(self) -> JsonObject:
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
        return rendered(self.to_dict()) + "\n"

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
    within: Plan | None = None,
    needed: Mapping[str, int] | None = None,
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
        within: of the same source; layers, sizes of a search and numbers of experts by loss are chosen from what it
            keeps. What the recipe gives itself may still be outside it, which `nesting.check_nested` finds.
        needed: by axis, the least size that a search may choose.

    Raises:
        RecipeError: the target is impossible for this source, or within that plan; lists every violation.
    """
    check_recipe(recipe, shape)
    if recipe.experts.allocation == "loss" and sensitivity is None:
        raise RecipeError(
            "experts.allocation loss needs data to measure layers on",
            where="recipe",
            fix="give --search-data (in Python samples)",
        )
    if recipe.budget is None:
        return _plan(recipe, stats, shape, None, sensitivity, within)

    def layers_of(count: int) -> tuple[int, ...]:
        target = dataclasses.replace(recipe.target, num_layers=count)
        return _layers(dataclasses.replace(recipe, target=target), stats, shape, within)

    def depth(count: int) -> Depth:
        layers = layers_of(count)
        return depth_of(shape, layers) if within is None or {*layers} <= {*within.kept_layers} else ()

    space = Space(recipe, shape, depth, limits_within(recipe, layers_of, within, needed or {}))
    found = search(space, stats, layers_of)
    if measure is not None:
        first = range(min(top, len(found.candidates)))
        found = found.measured(
            [measure(_plan(recipe, stats, shape, dataclasses.replace(found, chosen=k), within=within)) for k in first]
        )
    return _plan(recipe, stats, shape, found, sensitivity, within)


def _plan(
    asked: Recipe,
    stats: Statistics,
    shape: ModelShape,
    found: Ranking | None,
    sensitivity: Callable[[Plan], Mapping[str, float]] | None = None,
    within: Plan | None = None,
) -> Plan:
    recipe = resolved(asked, found)
    layers = _layers(recipe, stats, shape, within)
    losses: Mapping[str, float] = {}
    if recipe.experts.allocation == "loss" and sensitivity is not None:
        losses = sensitivity(_experts_alone(recipe, stats, shape))
    counts_by_loss = _allocated(recipe, stats, shape, layers, losses, within) if losses else None
    target = target_shape(recipe, shape, layers, counts_by_loss)
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


def _layers(recipe: Recipe, stats: Statistics, shape: ModelShape, within: Plan | None) -> tuple[int, ...]:
    return kept_layers(recipe, stats, shape, None if within is None else within.kept_layers)


def _experts_alone(recipe: Recipe, stats: Statistics, shape: ModelShape) -> Plan:
    """The same of experts, equally many in all layers, and nothing else."""
    experts = dataclasses.replace(recipe.experts, allocation=Experts.allocation, multiple=Experts.multiple)
    topk = recipe.target.moe_router_topk
    target = Target(num_moe_experts=recipe.target.num_moe_experts, moe_router_topk=topk)
    return _plan(Recipe(target, experts=experts), stats, shape, None)


def _allocated(
    recipe: Recipe,
    stats: Statistics,
    shape: ModelShape,
    layers: tuple[int, ...],
    losses: Mapping[str, float],
    within: Plan | None,
) -> tuple[int, ...]:
    """Experts of every layer that survives, 0 of dense ones."""
    kept = [f"model.layers.{layer}" for layer in layers]
    importance = {
        block: stats.tensors[statistics.importance_key(block, recipe.experts.importance)].astype(np.float64)
        for block in kept
        if block in losses
    }
    uniform, unit = recipe.target.num_moe_experts or shape.num_moe_experts, allocation_unit(recipe)
    least = least_experts(uniform, recipe.target.moe_router_topk or shape.moe_router_topk)
    most = {} if within is None or not {*layers} <= {*within.kept_layers} else experts_there(layers, within)
    fits, there = [count // unit * unit for count in most.values()], sum(most.values())
    if most and (sum(fits) < uniform * len(most) or min(fits) < least):
        raise RecipeError(
            f"{len(most)} layers are to have {uniform} experts on average and at least {least}, in multiples of "
            f"{unit}, but have {min(most.values())} at least and {there / len(most):g} on average in the larger budget",
            where="target.num_moe_experts",
            fix="give a smaller number, or the larger budget no experts.allocation",
        )
    counts = allocate(
        {block: losses[block] for block in importance},
        importance,
        uniform,
        least=least,
        multiple=unit,
        most=most,
    )
    return tuple(counts.get(block, 0) for block in kept)


def _block_groups(recipe: Recipe, stats: Statistics, block: str, survivors: int) -> tuple[ExpertGroup, ...]:
    importance = stats.tensors[statistics.importance_key(block, recipe.experts.importance)].astype(np.float64)
    similarity = None
    if recipe.experts.method != "prune":  # which merges nothing
        similarity = stats.tensors[statistics.similarity_key(block, recipe.experts.similarity)].astype(np.float64)
    return expert_groups(importance, similarity, survivors, recipe.experts)


def _groups_dict(groups: tuple[ExpertGroup, ...]) -> JsonObject:
    """Bases in order; of the groups that are more than a copy of their base, members and weights."""
    merged = {
        str(group.base): {"members": list(group.members), "weights": list(group.weights)}
        for group in groups
        if len(group.members) > 1
    }
    return {"kept": [group.base for group in groups], "merged": merged}


def rendered(value: object, indent: str = "") -> str:
    """JSON with every object over several lines and every list on one."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False)
    inner = indent + "  "
    items = [f"{inner}{json.dumps(key)}: {rendered(item, inner)}" for key, item in value.items()]
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"
