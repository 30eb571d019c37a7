"""Sizes between two neighbouring budgets, made of axes of both; no run has trained them (imports no torch)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_slim.pruning.depth import depth_of, layer_fields
from megatron_slim.pruning.elastic import Elastic, ElasticBudget, relative
from megatron_slim.pruning.nesting import restricted
from megatron_slim.pruning.plan import Plan

_PARTS = ("layers", "hidden size", "blocks")  # blocks: experts, top-k, neurons and heads


@dataclass(frozen=True)
class Between:
    """A size between two budgets.

    Attributes:
        name: which part is whose.
        plan: what survives of the parent.
    """

    name: str
    plan: Plan


def between(elastic: Elastic) -> Iterator[Between]:
    """Every mixture of two neighbours, from the largest; none for parts in which they do not differ.

    A budget has decided nothing for blocks that it drops: the inside of its blocks comes with its layers.
    """
    whole = elastic.budgets[0].plan
    for large, small in itertools.pairwise(elastic.budgets):
        parts = _differing(large.plan, small.plan)
        for owners in itertools.product((large, small), repeat=len(parts)):
            whose = dict(zip(parts, owners, strict=True))
            if len({owner.name for owner in owners}) < 2:
                continue
            layers, hidden, blocks = (whose.get(part, large).plan for part in _PARTS)
            if not set(layers.kept_layers) <= set(blocks.kept_layers) or _is_uneven(layers, blocks):
                continue
            yield Between(_name(whose), relative(_mixed(layers, hidden, blocks), whole))


def _differing(large: Plan, small: Plan) -> list[str]:
    """The parts in which two plans differ."""
    pairs: tuple[tuple[object, object], ...] = (
        (large.kept_layers, small.kept_layers),
        (large.kept_hidden, small.kept_hidden),
        (_inside(large, small), _inside(small, small)),
    )
    return [part for part, (one, other) in zip(_PARTS, pairs, strict=True) if one != other]


def _inside(plan: Plan, of: Plan) -> tuple[object, ...]:
    """What a plan keeps inside the blocks of another."""
    kept = set(of.source_blocks.values())
    experts, inner = restricted(plan, kept)
    return plan.target_shape.moe_router_topk, experts, inner


def _is_uneven(layers: Plan, blocks: Plan) -> bool:
    """Whether numbers of experts of single layers would lose their average, which a plan of them states."""
    return bool(blocks.allocation) and layers.kept_layers != blocks.kept_layers


def _mixed(layers: Plan, hidden: Plan, blocks: Plan) -> Plan:
    """A plan of parts of others; `relative` gives it the recipe of its sizes."""
    kept = {f"model.layers.{layer}" for layer in layers.kept_layers}
    kept |= {block for block in blocks.source_blocks.values() if block.startswith("mtp")}
    experts, inner = restricted(blocks, kept)
    source, shape = blocks.source_shape, blocks.target_shape
    counts = tuple(len(experts.get(f"model.layers.{layer}", ())) for layer in layers.kept_layers)
    target = dataclasses.replace(
        shape,
        hidden_size=len(hidden.kept_hidden),
        **layer_fields(depth_of(source, layers.kept_layers)),
        experts_per_layer=counts if shape.experts_per_layer else (),
    )
    return dataclasses.replace(
        blocks,
        target_shape=target.simplest(),
        kept_layers=layers.kept_layers,
        kept_hidden=hidden.kept_hidden,
        experts=experts,
        inner=inner,
    )


def _name(whose: dict[str, ElasticBudget]) -> str:
    """Such as "layers and blocks of large, hidden size of small"."""
    owners = dict.fromkeys(owner.name for owner in whose.values())
    parts = {name: [part for part, owner in whose.items() if owner.name == name] for name in owners}
    return ", ".join(f"{' and '.join(found)} of {name}" for name, found in parts.items())
