"""An elastic checkpoint in another order, in which the first of every axis are those of its smaller budgets.

A permutation is a plan that keeps everything, with lists that are not ascending. It never touches the dimensions within
a head, the vocabulary or the order of layers. The function of the model is the same but for the order of sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from megatron_slim.architecture.feed_forward import EXPERT_NEURONS
from megatron_slim.architecture.kinds import FEED_FORWARD, KINDS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.errors import SlimError
from megatron_slim.pruning.experts import ExpertGroup
from megatron_slim.pruning.inner_axes import InnerAxes
from megatron_slim.pruning.nesting import NETWORKS, ElasticBudget, Indices, neurons_of, survivors_of
from megatron_slim.pruning.plan import Plan
from megatron_slim.recipe import Recipe


def sorting_plan(budgets: Sequence[ElasticBudget], expert_parallel: int = 1) -> Plan:
    """The permutation that sorts a checkpoint: at each place, the index that comes there.

    Args:
        budgets: of the checkpoint.
        expert_parallel: ranks, of which each is to hold equally many experts of every budget, in any number of ranks
            that divides this one: then the survivors are a regular grid and not the first ones.

    Raises:
        SlimError: numbers of experts are not multiples of that.
    """
    whole, plans = budgets[0].plan, [budget.plan for budget in budgets]
    shape = whole.source_shape
    _check_ranks(plans, shape, expert_parallel)
    experts: dict[str, tuple[ExpertGroup, ...]] = {}
    neurons: dict[str, tuple[Indices, ...]] = {}
    parts: dict[str, dict[str, Indices]] = {key: {} for key in ("heads", *NETWORKS)}
    for block in shape.blocks:
        here = [plan for plan in plans if block in set(plan.source_blocks.values())]
        survivors = [survivors_of(plan, block) for plan in here]
        heads = KINDS[shape.layer_type(block)].heads
        groups = shape.sizes[heads.group_axis]
        parts["heads"][block] = _ranked_heads([each["heads"] for each in survivors], groups, shape.sizes[heads.axis])
        network = FEED_FORWARD[shape.ffn_kind(block)].neurons
        if size := getattr(shape, network.field):
            parts[network.key][block] = ranked(size, [each[network.key] for each in survivors])
        if block in whole.experts:
            bases = _ranked_experts(shape.in_block(block), [each["experts"] for each in survivors], expert_parallel)
            experts[block] = tuple(single(base) for base in bases)
            neurons[block] = tuple(_ranked_neurons(here, block, base) for base in bases)
    if not any(plan.inner.neurons for plan in plans):
        neurons = {}
    hidden = ranked(shape.hidden_size, [plan.kept_hidden for plan in plans])
    return dataclasses.replace(whole, kept_hidden=hidden, experts=experts, inner=InnerAxes(neurons, **parts))


def ranked(size: int, sets: Sequence[Iterable[int]]) -> Indices:
    """All indices, those in the most sets first; ties by index.

    >>> ranked(5, [[1, 2, 4], [4]])
    (4, 1, 2, 0, 3)
    """
    counts = [0] * size
    for each in sets:
        for index in each:
            counts[index] += 1
    return tuple(sorted(range(size), key=lambda index: -counts[index]))


def _ranked_heads(survivors: Sequence[Indices], groups: int, width: int) -> Indices:
    """Heads in order within their groups, and groups in order."""
    order = ranked(groups, [{head // width for head in heads} for heads in survivors])
    within = ranked(groups * width, survivors)
    return tuple(head for group in order for head in within if head // width == group)


def _ranked_experts(shape: ModelShape, survivors: Sequence[Indices], expert_parallel: int) -> Indices:
    """Experts in order within the groups that the router chooses from, of which nothing moves to another."""
    count, runs = shape.num_moe_experts, shape.moe_router_num_groups
    order = ranked(count, survivors)
    order = tuple(expert for run in range(runs) for expert in order if expert * runs // count == run)
    place = [(p % expert_parallel) * (count // expert_parallel) + p // expert_parallel for p in range(count)]
    return tuple(expert for _, expert in sorted(zip(place, order, strict=True)))


def _ranked_neurons(plans: Sequence[Plan], block: str, expert: int) -> Indices:
    """Neurons of an expert in order, by the budgets that have the expert."""
    found = []
    for plan in plans:
        bases = [group.base for group in plan.experts[block]]
        if expert in bases:
            found.append(neurons_of(plan, block, bases.index(expert)))
    return ranked(getattr(plans[0].source_shape, EXPERT_NEURONS.field), found)


def _check_ranks(plans: Sequence[Plan], shape: ModelShape, ranks: int) -> None:
    if ranks > 1 and shape.moe_router_num_groups > 1:
        fix = "leave --expert-parallel out: its experts keep their groups"
        raise SlimError("the router chooses groups of experts first", fix=fix)
    counts = {count for plan in plans for count in plan.target_shape.expert_counts.values()}
    if odd := sorted(count for count in counts if count % ranks):
        raise SlimError(
            f"{ranks} ranks do not divide {', '.join(map(str, odd))} experts of a budget",
            where="--expert-parallel",
            fix="give a number that divides all",
        )


def inverse(plan: Plan) -> Plan:
    """The permutation that undoes another."""
    experts, neurons = {}, {}
    for block, groups in plan.experts.items():
        places = _inverted([group.base for group in groups])
        experts[block] = tuple(single(place) for place in places)
        if block in plan.inner.neurons:
            neurons[block] = tuple(_inverted(plan.inner.neurons[block][place]) for place in places)
    parts = {
        key: {block: _inverted(order) for block, order in getattr(plan.inner, key).items()}
        for key in ("heads", *NETWORKS)
    }
    hidden = _inverted(plan.kept_hidden)
    return dataclasses.replace(plan, kept_hidden=hidden, experts=experts, inner=InnerAxes(neurons, **parts))


def reordered(plan: Plan, order: Plan) -> Plan:
    """A plan of a checkpoint as one of the checkpoint in another order: the same survivors at their new places."""
    place = _Places(order)
    experts: dict[str, tuple[ExpertGroup, ...]] = {}
    neurons: dict[str, tuple[Indices, ...]] = {}
    for block, groups in plan.experts.items():
        moved = sorted((place.experts[block][group.base], number) for number, group in enumerate(groups))
        experts[block] = tuple(single(base) for base, _ in moved)
        if block in plan.inner.neurons:
            kept = plan.inner.neurons[block]
            neurons[block] = tuple(place.neurons(block, base, kept[number]) for base, number in moved)
    parts = {
        key: {block: _moved(kept, getattr(order.inner, key)[block]) for block, kept in getattr(plan.inner, key).items()}
        for key in ("heads", *NETWORKS)
    }
    return dataclasses.replace(
        plan,
        recipe=_without_runs(plan, order),
        kept_hidden=_moved(plan.kept_hidden, order.kept_hidden),
        experts=experts,
        inner=InnerAxes(neurons, **parts),
    )


class _Places:
    """Where an order puts experts and their neurons."""

    def __init__(self, order: Plan) -> None:
        self._order = order
        self.experts = {block: _inverted([group.base for group in groups]) for block, groups in order.experts.items()}

    def neurons(self, block: str, expert: int, kept: Indices) -> Indices:
        """New places of neurons of the expert that has this new number."""
        given = self._order.inner.neurons.get(block)
        return kept if given is None else _moved(kept, given[expert])


def _without_runs(plan: Plan, order: Plan) -> Recipe:
    """The recipe, of experts that are no longer equally many of each of its own runs; those of the router stay."""
    runs = order.source_shape.moe_router_num_groups
    if plan.recipe.experts.num_groups == 1:
        return plan.recipe
    return dataclasses.replace(plan.recipe, experts=dataclasses.replace(plan.recipe.experts, num_groups=runs))


def single(base: int) -> ExpertGroup:
    """An expert that is made of itself."""
    return ExpertGroup(base, (base,), (1.0,))


def _inverted(order: Sequence[int]) -> Indices:
    found = [0] * len(order)
    for place, index in enumerate(order):
        found[index] = place
    return tuple(found)


def _moved(kept: Sequence[int], order: Sequence[int]) -> Indices:
    places = _inverted(order)
    return tuple(sorted(places[index] for index in kept))
