"""Equal scores, 512 of them, in every selection: the lower index wins, whatever is sorted with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_slim.pruning.align import matching_neurons
from megatron_slim.pruning.experts import expert_groups, ranking
from megatron_slim.pruning.inner_axes import best, best_of_groups
from megatron_slim.pruning.plan import Plan, make_plan
from megatron_slim.pruning.search import Candidate, Ranking
from megatron_slim.pruning.statistics import FORMAT, Statistics, expected_shapes
from megatron_slim.recipe import parse_recipe
from megatron_slim.recipe_sections import Experts
from megatron_slim.testing import tiny_shape

MANY = 512
SHAPE = tiny_shape(
    num_layers=8,
    hidden_size=MANY,
    num_moe_experts=MANY,
    moe_ffn_hidden_size=MANY,
    moe_shared_expert_intermediate_size=MANY,
    num_attention_heads=16,
    linear_num_value_heads=8,
    mtp_num_layers=0,
)
TARGET = {
    "num_layers": 5,
    "hidden_size": 192,
    "num_moe_experts": 200,
    "moe_ffn_hidden_size": 96,
    "moe_shared_expert_intermediate_size": 160,
    "num_attention_heads": 8,
    "linear_num_value_heads": 4,
}
# Two levels in no order: every third is above the others.
TWO_LEVELS = (np.arange(MANY) % 3 == 1).astype(np.float64)


@pytest.fixture(scope="module")
def equal() -> Statistics:
    """Statistics in which nothing is better than anything."""
    tensors = {key: np.full(size, 0.5, np.float32) for key, size in expected_shapes(SHAPE)}
    return Statistics(tensors, {"format": FORMAT, "source_sha256": "0" * 64})


def planned(stats: Statistics, depth: str, **experts: Any) -> Plan:
    document = {"version": 1, "target": TARGET, "depth": {"method": depth}, "experts": experts}
    return make_plan(parse_recipe(document), stats, SHAPE)


def first(count: int) -> tuple[int, ...]:
    return tuple(range(count))


@pytest.mark.parametrize(
    ("depth", "layers"),
    [("last", (0, 1, 2, 3, 4)), ("block_influence", (0, 1, 2, 3, 4)), ("adjacent_cosine", (0, 4, 5, 6, 7))],
)
def test_a_whole_plan(equal: Statistics, depth: str, layers: tuple[int, ...]) -> None:
    """Activation similarity drops the first run that it may drop: from the second layer on."""
    plan = planned(equal, depth, method="prune")
    assert plan.kept_layers == layers
    assert plan.kept_hidden == first(192)
    assert {group.base: group.members for group in plan.experts["model.layers.0"]} == {i: (i,) for i in range(200)}
    assert set(plan.inner.neurons["model.layers.0"]) == {first(96)} == {best(np.full(MANY, 2.0), 96)}
    assert plan.inner.shared_neurons["model.layers.0"] == first(160)
    full = SHAPE.layer_types.index("full_attention") if depth != "adjacent_cosine" else 7
    assert plan.inner.heads[f"model.layers.{full}"] == (0, 1, 2, 3, 8, 9, 10, 11)  # of two groups of eight
    assert plan.inner.heads["model.layers.0"] == (0, 1, 4, 5)


@pytest.mark.parametrize("runs", [1, 4])
@pytest.mark.parametrize("method", ["merge", "partial_preservation"])
def test_what_is_merged_goes_to_the_first(method: str, runs: int) -> None:
    """The first half is preserved where that is asked for; then the first that is not takes all of its run."""
    recipe = Experts(method=method, preserve=0.5, num_groups=runs)
    found = expert_groups(np.ones(MANY), np.ones((MANY, MANY)), 200, recipe)
    length, kept = MANY // runs, 200 // runs
    takes = 0 if method == "merge" else kept // 2
    expected = {}
    for start in range(0, MANY, length):
        expected |= {start + i: (start + i,) for i in range(kept)}
        expected[start + takes] = (start + takes, *range(start + kept, start + length))
    assert {group.base: group.members for group in found} == expected


def test_ties_on_the_edge_of_what_is_kept() -> None:
    """Of the lower level the first are kept that still fit, of each run as of all."""
    high, low = (np.flatnonzero(level == TWO_LEVELS) for level in (1.0, 0.0))
    assert ranking(TWO_LEVELS).tolist() == [*high, *low]
    assert best(TWO_LEVELS, 300) == tuple(sorted([*high, *low[: 300 - len(high)]]))
    assert best(TWO_LEVELS, 100) == tuple(high[:100])
    of_each = [best(TWO_LEVELS[start : start + 128], 75) for start in range(0, MANY, 128)]
    assert best_of_groups(TWO_LEVELS, 300, 4, 4) == tuple(
        128 * run + i for run, each in enumerate(of_each) for i in each
    )
    bases = [group.base for group in expert_groups(TWO_LEVELS, None, 300, Experts(method="prune"))]
    assert tuple(bases) == best(TWO_LEVELS, 300)


def test_the_sort_is_a_stable_one() -> None:
    """Against Python's own, on few levels and minus zero; numpy's default sort and torch's top-k are not stable."""
    scores = np.random.default_rng(0).integers(0, 3, MANY) * np.where(np.arange(MANY) % 2, -1.0, 1.0)
    assert ranking(scores).tolist() == sorted(range(MANY), key=lambda index: -scores[index])


def test_neurons_that_are_all_alike_stay_in_place() -> None:
    alike = torch.ones(MANY, 8)
    assert matching_neurons(alike, alike).tolist() == list(range(MANY))


def test_of_candidates_that_measure_the_same_the_first_is_taken() -> None:
    rows = tuple(Candidate({"hidden_size": size}, size, size, 1.0, 0.5, None) for size in (64, 48, 32))
    assert Ranking(3, 0, rows).measured([2.0, 2.0, 2.0]).chosen == 0
    assert Ranking(3, 0, rows).measured([2.5, 2.0, 2.0]).chosen == 1
