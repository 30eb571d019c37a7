"""Plans within plans: whether what one keeps is among what another keeps, and one as a plan of the other's result.

Both are of one source. Everything is compared as sets of the source's indices, axis by axis and block by block.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_slim.aliases import Keywords
from megatron_slim.architecture import prunable
from megatron_slim.architecture.family import LAYERS
from megatron_slim.architecture.feed_forward import EXPERT_NEURONS, EXPERTS, TOP_K
from megatron_slim.architecture.kinds import FEED_FORWARD, KINDS
from megatron_slim.errors import RecipeError
from megatron_slim.pruning.experts import ExpertGroup
from megatron_slim.pruning.inner_axes import InnerAxes, has_fewer_heads, pruned
from megatron_slim.pruning.plan import Plan
from megatron_slim.recipe import Recipe
from megatron_slim.recipe_sections import Experts, Target

Indices = tuple[int, ...]
NETWORKS = tuple(kind.neurons.key for kind in FEED_FORWARD.values())


@dataclass(frozen=True)
class ElasticBudget:
    """One size of an elastic checkpoint.

    Attributes:
        name: what commands call it.
        weight: of its loss in training.
        plan: what survives of the parent; where budgets are still being planned, of the source of the pruning.
    """

    name: str
    weight: float
    plan: Plan


def check_nested(budgets: Sequence[ElasticBudget], *, where: str = "recipe") -> None:
    """Refuse budgets of which one keeps what the one before does not.

    Raises:
        RecipeError: names budget, axis, block and index of all that crosses, up to a number.
    """
    if found := contained(budgets):
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        fix = "choose survivors of all budgets by the same methods and patterns, and give sizes that shrink"
        raise RecipeError("; ".join(found[:5]) + more, where=where, fix=fix)


def contained(budgets: Sequence[ElasticBudget]) -> list[str]:
    """A sentence for each axis of each block of a budget that is not contained in the budget before."""
    found = [f"budget {each.name}: {sentence}" for each in budgets for sentence in _merged(each.plan)]
    for large, small in itertools.pairwise(budgets):
        crossing = _crossing(small.plan, large.plan)
        found += [f"budget {small.name}: {sentence} of budget {large.name}" for sentence in crossing]
    return found


def _merged(plan: Plan) -> Iterator[str]:
    for block, groups in plan.experts.items():
        for group in groups:
            if len(group.members) > 1:
                yield f"{block}: expert {group.base} is merged, a new value that is in no other budget"


def _crossing(small: Plan, large: Plan) -> Iterator[str]:
    """What of one plan is not in another, as "AXIS INDEX is not among the N"."""
    yield from _outside(prunable.LAYERS.noun, small.kept_layers, large.kept_layers)
    yield from _outside(prunable.HIDDEN.noun, small.kept_hidden, large.kept_hidden)
    topk = small.target_shape.moe_router_topk, large.target_shape.moe_router_topk
    if topk[0] > topk[1]:
        yield f"{TOP_K.label} {topk[0]} is larger than the {topk[1]}"
    both = set(large.source_blocks.values())
    for block in small.source_blocks.values():
        if block in both:
            yield from _crossing_inside(block, small, large)


def _crossing_inside(block: str, small: Plan, large: Plan) -> Iterator[str]:
    survivors = survivors_of(small, block), survivors_of(large, block)
    for axis in survivors[0]:
        yield from _outside(axis, survivors[0][axis], survivors[1][axis], f"{block}: ")
    if block not in small.experts:
        return
    places = {group.base: place for place, group in enumerate(large.experts[block])}
    for place, group in enumerate(small.experts[block]):
        if group.base in places:
            inside, outside = neurons_of(small, block, place), neurons_of(large, block, places[group.base])
            yield from _outside("neurons", inside, outside, f"{block}: expert {group.base}: ")


def _outside(axis: str, small: Indices, large: Indices, place: str = "") -> Iterator[str]:
    if crossing := sorted(set(small) - set(large)):
        noun, more = axis.replace("_", " "), f" and {len(crossing) - 1} more are" if len(crossing) > 1 else " is"
        yield f"{place}{noun.removesuffix('s')} {crossing[0]}{more} not among the {len(large)} {noun}"


def survivors_of(plan: Plan, block: str) -> dict[str, Indices]:
    """What survives of a block of the source, by axis as a plan names it; of experts' neurons see `neurons_of`."""
    source, inner = plan.source_shape, plan.inner
    heads, network = KINDS[source.layer_type(block)].heads, FEED_FORWARD[source.ffn_kind(block)].neurons
    found = {"heads": inner.heads.get(block, tuple(range(getattr(source, heads.field))))}
    if size := getattr(source, network.field):
        found[network.key] = getattr(inner, network.key).get(block, tuple(range(size)))
    if block in plan.experts:
        found["experts"] = tuple(group.base for group in plan.experts[block])
    return found


def neurons_of(plan: Plan, block: str, expert: int) -> Indices:
    """FFN neurons that a surviving expert keeps; ``expert`` counts the survivors."""
    given = plan.inner.neurons.get(block)
    return tuple(range(getattr(plan.source_shape, EXPERT_NEURONS.field))) if given is None else given[expert]


def relative(small: Plan, large: Plan, *, source_sha256: str | None = None) -> Plan:
    """A plan as one of the result of another, in which it is contained: where its survivors are among the other's.

    Args:
        small: what is to survive.
        large: what survives so far, of the same source.
        source_sha256: fingerprint of the large plan's result; None: that of the source, where nobody compares it.
    """
    source, target = large.target_shape, small.target_shape
    names = {old: new for new, old in large.source_blocks.items()}
    experts = {
        names[old]: _relative_groups(small, large, old) for old in small.source_blocks.values() if old in small.experts
    }
    recipe = _recipe(small, large, experts)
    losses = small.allocation if recipe.experts.allocation == "loss" else {}
    return Plan(
        recipe=recipe,
        source_shape=source,
        target_shape=target,
        source_sha256=source_sha256 or small.source_sha256,
        stats_sha256=small.stats_sha256,
        kept_layers=_places(small.kept_layers, large.kept_layers),
        kept_hidden=_places(small.kept_hidden, large.kept_hidden),
        experts=experts,
        inner=_relative_inner(small, large, names),
        allocation={names[old]: losses[old] for old in large.source_blocks.values() if old in losses},
    )


def _places(small: Sequence[int], large: Sequence[int]) -> Indices:
    """Where indices are among others."""
    place = {index: number for number, index in enumerate(large)}
    return tuple(place[index] for index in small)


def _relative_groups(small: Plan, large: Plan, block: str) -> tuple[ExpertGroup, ...]:
    bases = _places(*([group.base for group in plan.experts[block]] for plan in (small, large)))
    return tuple(ExpertGroup(base, (base,), (1.0,)) for base in bases)


def _relative_inner(small: Plan, large: Plan, names: Mapping[str, str]) -> InnerAxes:
    """Neurons and heads within those of the large plan, of the axes on which it is larger."""
    source, target = large.target_shape, small.target_shape
    neurons: dict[str, tuple[Indices, ...]] = {}
    parts: dict[str, dict[str, Indices]] = {key: {} for key in ("heads", *NETWORKS)}
    for old in small.source_blocks.values():
        new = names[old]
        inside, outside = survivors_of(small, old), survivors_of(large, old)
        if has_fewer_heads(KINDS[source.layer_type(new)].heads, source, target):
            parts["heads"][new] = _places(inside["heads"], outside["heads"])
        network = FEED_FORWARD[source.ffn_kind(new)].neurons
        if pruned(network.field, source, target):
            parts[network.key][new] = _places(inside[network.key], outside[network.key])
        if old in small.experts and pruned(EXPERT_NEURONS.field, source, target):
            places = _places(*([group.base for group in plan.experts[old]] for plan in (small, large)))
            both = ((neurons_of(small, old, own), neurons_of(large, old, of)) for own, of in enumerate(places))
            neurons[new] = tuple(_places(own, of) for own, of in both)
    return InnerAxes(neurons, **parts)


def _recipe(small: Plan, large: Plan, experts: Mapping[str, tuple[ExpertGroup, ...]]) -> Recipe:
    """What the relative plan follows: every size that differs, named; methods as they were."""
    source, target = large.target_shape, small.target_shape
    sizes: Keywords = {
        field.name: getattr(target, field.name)
        for field in dataclasses.fields(Target)
        if getattr(target, field.name) != getattr(source, field.name)
    }
    counts = source.expert_counts
    fewer = any(len(groups) < counts[block] for block, groups in experts.items())
    # Layers may have as many as in the source, and another average, as others of the source have more or fewer.
    named = fewer or EXPERTS.field in sizes
    if named:
        sizes[EXPERTS.field] = target.num_moe_experts
    asked = small.recipe.experts
    allocated = named and bool(small.allocation)
    method = dataclasses.replace(
        asked,
        method="prune",
        align=Experts.align,
        weighting=Experts.weighting,
        num_groups=_groups(small, large) if fewer else 1,
        allocation="loss" if allocated else Experts.allocation,
        multiple=asked.multiple if allocated else Experts.multiple,
    )
    return Recipe(Target(**sizes), small.recipe.depth, small.recipe.width, method)


def _groups(small: Plan, large: Plan) -> int:
    """Runs of experts of which equally many survive in both plans."""
    counts = large.source_shape.expert_counts
    whole = all(len(groups) == counts[block] for block, groups in large.experts.items())
    own = small.recipe.experts.num_groups
    return own if whole else math.gcd(own, large.recipe.experts.num_groups)


def restricted(plan: Plan, blocks: Collection[str]) -> tuple[dict[str, tuple[ExpertGroup, ...]], InnerAxes]:
    """Experts, neurons and heads that a plan keeps inside some blocks of the source."""
    inner = {
        field.name: {block: part for block, part in getattr(plan.inner, field.name).items() if block in blocks}
        for field in dataclasses.fields(InnerAxes)
    }
    return {block: groups for block, groups in plan.experts.items() if block in blocks}, InnerAxes(**inner)


def without_mtp(plan: Plan) -> Plan:
    """The plan of a model that is the same but for its MTP block."""
    experts, inner = restricted(plan, {f"{LAYERS}{layer}" for layer in plan.kept_layers})
    source, target = (
        dataclasses.replace(shape, mtp_num_layers=0).simplest() for shape in (plan.source_shape, plan.target_shape)
    )
    return dataclasses.replace(plan, source_shape=source, target_shape=target, experts=experts, inner=inner)
