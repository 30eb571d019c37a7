"""Sizes between two budgets: every mixture that is a plan, and no other."""

from __future__ import annotations

import json
from collections.abc import Callable

from megatron_slim.architecture.table import hf_tensors
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.pruning.apply import PrunedCheckpoint
from megatron_slim.pruning.between import between
from megatron_slim.pruning.elastic import contained, elastic_of
from megatron_slim.pruning.nesting import ElasticBudget
from megatron_slim.pruning.plan_reader import parse_plan
from megatron_slim.pruning.statistics import Statistics
from tests.pruning.test_elastic import Family, family, planned

__all__ = ["family"]
RandomStats = Callable[..., Statistics]
# Whose layers, hidden size and blocks.
MIXTURES = {
    "layers and blocks of large, hidden size of middle": ("large", "middle", "large"),
    "layers of middle, hidden size and blocks of large": ("middle", "large", "large"),
    "layers and blocks of middle, hidden size of large": ("middle", "large", "middle"),
    "layers and hidden size of middle, blocks of large": ("middle", "middle", "large"),
}


def test_mixtures_are_plans_between_their_neighbours(family: Family) -> None:
    """All axes differ: four mixtures of each pair, each of sizes and survivors of both."""
    source, budgets = family
    elastic = elastic_of(budgets)
    found = list(between(elastic))
    assert [size.name for size in found[:4]] == list(MIXTURES) and len(found) == 8
    plans = {each.name: each.plan for each in elastic.budgets}
    parent = PrunedCheckpoint(budgets[0].plan, source)
    for size, owners in zip(found, MIXTURES.values(), strict=False):
        plan, (layers, hidden, blocks) = size.plan, (plans[owner] for owner in owners)
        assert parse_plan(json.loads(plan.to_json())) == plan
        assert plan.kept_layers == layers.kept_layers and plan.kept_hidden == hidden.kept_hidden
        assert plan.experts == {block: blocks.experts[block] for block in plan.experts}
        assert plan.inner.heads == {block: blocks.inner.heads[block] for block in plan.inner.heads}
        assert plan.target_shape.moe_router_topk == blocks.target_shape.moe_router_topk
        inside = (("large", plans["large"]), ("x", plan), ("middle", plans["middle"]))
        assert contained([ElasticBudget(name, 1.0, each) for name, each in inside]) == []
        made = PrunedCheckpoint(plan, parent, check_source=False)
        tensors = hf_tensors(plan.target_shape)
        assert {name: tuple(made.read(name).shape) for name in made.names} == {
            name: tensor.shape(plan.target_shape) for name, tensor in tensors.items()
        }


def test_only_parts_that_differ_are_mixed(source: HFCheckpoint, random_stats: RandomStats) -> None:
    def names(*targets: dict[str, int]) -> list[str]:
        return [size.name for size in between(elastic_of(planned(source, random_stats(source), list(targets))))]

    assert names({}, {"hidden_size": 48}) == names({}, {"num_layers": 4}) == names({}, {"num_moe_experts": 4}) == []
    assert names({}, {"hidden_size": 48, "num_moe_experts": 4}) == [
        "hidden size of large, blocks of middle",
        "hidden size of middle, blocks of large",
    ]
    assert names({}, {"hidden_size": 48, "num_layers": 4}) == [
        "layers of large, hidden size of middle",
        "layers of middle, hidden size of large",
    ]
    assert names({}, {"num_moe_experts": 4, "num_layers": 4}) == ["layers of middle, blocks of large"]
