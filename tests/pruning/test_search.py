"""Budgets: what the search finds against a brute force over the same grid, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slim.architecture.shape import FAMILIES, FULL_ATTENTION, LINEAR_ATTENTION, ModelShape
from megatron_slim.architecture.table import count_parameters, weights
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.errors import PlanError, RecipeError
from megatron_slim.pruning import report
from megatron_slim.pruning.plan import Plan, make_plan
from megatron_slim.pruning.plan_reader import load_plan, parse_plan
from megatron_slim.pruning.plan_tables import sections
from megatron_slim.pruning.recipe_checks import check_recipe
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe import parse_recipe
from megatron_slim.testing import tiny_shape

Stats = Callable[..., Statistics]
GRID = {"num_layers": [4, 8], "hidden_size": list(range(8, 65, 8)), "num_moe_experts": list(range(2, 9))}
MIXED = (LINEAR_ATTENTION, FULL_ATTENTION, FULL_ATTENTION, LINEAR_ATTENTION, FULL_ATTENTION)


def planned(source: HFCheckpoint, stats: Statistics, target: dict[str, Any], **sections: Any) -> Plan:
    return make_plan(parse_recipe({"version": 1, "target": target, **sections}), stats, source.shape)


def with_sizes(shape: ModelShape, sizes: dict[str, int]) -> ModelShape:
    layers = sizes.get("num_layers", shape.num_layers)
    dense = min(shape.num_dense_layers, layers)
    return dataclasses.replace(shape, **{**sizes, "layer_types": shape.layer_types[:layers], "num_dense_layers": dense})


def counts(shape: ModelShape) -> dict[str, float]:
    trunk = count_parameters(shape, include_mtp=False)
    return {
        "params": trunk.total,
        "active_params": trunk.active,
        "memory_gb": 2 * count_parameters(shape).total / 1e9,
    }


def brute_force(shape: ModelShape, bounds: dict[str, float], grid: dict[str, list[int]]) -> list[dict[str, int]]:
    """Every point of the grid that fits, less those that fit with one step more somewhere."""

    def fits(sizes: dict[str, int]) -> bool:
        found = counts(with_sizes(shape, sizes))
        return all(found[key] <= bound for key, bound in bounds.items())

    def larger(sizes: dict[str, int]) -> list[dict[str, int]]:
        return [
            sizes | {axis: grid[axis][grid[axis].index(size) + 1]}
            for axis, size in sizes.items()
            if size != grid[axis][-1]
        ]

    points = [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]
    return [point for point in points if fits(point) and not any(map(fits, larger(point)))]


def share(values: Any, count: int) -> float:
    ordered = sorted((float(value) for value in values), reverse=True)
    return math.fsum(ordered[:count]) / math.fsum(ordered)


def score(stats: Statistics, sizes: dict[str, int]) -> float:
    layers, tensors = sizes["num_layers"], stats.tensors
    influence = [float(tensors[f"model.layers.{layer}.block_influence"]) for layer in range(8)]
    ranked = [tensors.get(f"model.layers.{layer}.mlp.experts.soft_logits") for layer in range(layers)]
    experts = [share(values, sizes["num_moe_experts"]) for values in ranked if values is not None]
    depth = math.fsum(influence[:layers]) / math.fsum(influence)
    width = share(tensors["hidden.norm_activation"], sizes["hidden_size"])
    return depth * width * math.fsum(experts) / len(experts)


@pytest.mark.parametrize("source", FAMILIES, indirect=True)
@pytest.mark.parametrize(
    "shares",
    [
        {"params": 0.5},
        {"active_params": 0.6},
        {"memory_gb": 0.4},
        {"params": 0.45, "active_params": 0.5, "memory_gb": 0.9},
    ],
    ids=str,
)
def test_search_finds_what_brute_force_finds(
    shares: dict[str, float], source: HFCheckpoint, random_stats: Stats
) -> None:
    whole, stats = counts(source.shape), random_stats(source)
    bounds = {key: whole[key] * part if key == "memory_gb" else int(whole[key] * part) for key, part in shares.items()}
    plan = planned(source, stats, dict(bounds))
    least = 1 + source.shape.num_dense_layers  # one layer with experts
    period = GRID if source.shape.full_attention_interval == 4 else GRID | {"num_layers": list(range(least, 9))}
    expected = brute_force(source.shape, bounds, period)
    assert plan.search is not None and plan.search.count == len(expected) > 1
    found = [dict(row.sizes) for row in plan.search.candidates]
    assert sorted(map(str, found)) == sorted(map(str, expected))
    for row in plan.search.candidates:
        assert row.score == pytest.approx(score(stats, dict(row.sizes)), rel=1e-12)
    assert [row.score for row in plan.search.candidates] == sorted(
        (score_of.score for score_of in plan.search.candidates), reverse=True
    )
    assert plan.target_shape == with_sizes(source.shape, found[0])
    reached = counts(plan.target_shape)
    assert all(reached[key] <= bound for key, bound in bounds.items())


def test_layers_of_which_fewer_keep_more(source: HFCheckpoint, random_stats: Stats) -> None:
    """Of five layers in the source's pattern, here the first matter least; of four, the last may stay."""
    stats = random_stats(source)
    influence = {f"model.layers.{i}.block_influence": np.float32(0.1 if i < 4 else 5) for i in range(8)}
    stats = Statistics({**stats.tensors, **influence}, stats.metadata)
    bound = {"params": int(counts(with_sizes(source.shape, {"num_layers": 5}))["params"])}
    search = {"axes": ["num_layers"], "grid": {"num_layers": [4, 5, 8]}}
    depth = {"method": "block_influence", "pattern": "source"}
    plan = planned(source, stats, dict(bound), search=search, depth=depth)
    assert plan.search is not None and [row.sizes["num_layers"] for row in plan.search.candidates] == [4, 5]
    assert plan.kept_layers == (4, 5, 6, 7)
    without = planned(source, stats, dict(bound), search=search, depth={"method": "last"})
    assert without.search is not None and [row.sizes["num_layers"] for row in without.search.candidates] == [5]


def test_same_bytes_and_back(source: HFCheckpoint, random_stats: Stats, tmp_path: Path) -> None:
    stats, target = random_stats(source), {"params": counts(source.shape)["params"] // 2}
    plan = planned(source, stats, target)
    assert plan.to_json() == planned(source, stats, target).to_json()
    (table,) = [part for part in sections(plan, None) if part.title == "Sizes under the budget"]
    assert table.rows[0][:2] == ("1 chosen", str(plan.target_shape.num_layers)) and len(table.rows) <= 10
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert planned(source, stats, {"num_layers": 4}).to_dict()["search"] is None


def test_explicit_sizes_stay(source: HFCheckpoint, random_stats: Stats) -> None:
    bounds = {"params": counts(source.shape)["params"] // 2}
    plan = planned(source, random_stats(source), {**bounds, "num_moe_experts": 5, "moe_router_topk": 1 + 1})
    fixed = dataclasses.replace(source.shape, num_moe_experts=5)
    grid = {axis: sizes for axis, sizes in GRID.items() if axis != "num_moe_experts"}
    assert plan.search is not None and plan.target_shape.num_moe_experts == 5
    found = [dict(row.sizes) for row in plan.search.candidates]
    assert sorted(map(str, found)) == sorted(map(str, brute_force(fixed, bounds, grid)))


def test_named_axes_and_sizes(source: HFCheckpoint, random_stats: Stats) -> None:
    bounds = {"params": counts(source.shape)["params"] * 2 // 3}
    search = {"axes": ["moe_ffn_hidden_size", "hidden_size"], "grid": {"hidden_size": [48, 32, 64]}}
    plan = planned(source, random_stats(source), dict(bounds), search=search)
    grid = {"hidden_size": [32, 48, 64], "moe_ffn_hidden_size": [8, 16, 24, 32]}
    assert plan.search is not None
    found = [dict(row.sizes) for row in plan.search.candidates]
    assert sorted(map(str, found)) == sorted(map(str, brute_force(source.shape, bounds, grid)))


@pytest.mark.parametrize("method", ["last", "adjacent_cosine", "block_influence"])
def test_a_source_within_the_bounds_keeps_everything(method: str, source: HFCheckpoint, random_stats: Stats) -> None:
    plan = planned(source, random_stats(source), {"params": "1B"}, depth={"method": method})
    assert plan.search is not None and plan.search.count == 1 and plan.search.candidates[0].score == 1
    assert plan.target_shape == source.shape
    sizes = report.summarise(source.shape, 1)
    assert "the source meets every bound already" in report.markdown(plan, sizes, sizes)


def test_out_of_reach_is_refused_with_the_least(source: HFCheckpoint) -> None:
    least = counts(with_sizes(source.shape, {"num_layers": 4, "hidden_size": 8, "num_moe_experts": 2}))["params"]
    check_recipe(parse_recipe({"version": 1, "target": {"params": least}}), source.shape)
    with pytest.raises(RecipeError) as caught:
        check_recipe(parse_recipe({"version": 1, "target": {"params": int(least) - 1}}), source.shape)
    message = f"target.params {int(least) - 1:,} is out of reach: the least, with num_layers 4"
    assert message in str(caught.value) and f"is {least:,}" in str(caught.value)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"target": {"param": "1B"}}, "unknown key target.param (did you mean 'params'?)"),
        ({"target": {"params": "many"}}, "target.params 'many' is not a number of parameters"),
        ({"target": {"memory_gb": "48"}}, "target.memory_gb '48' is not a number of gigabytes"),
        ({"target": {"params": "1B"}, "search": {"axis": []}}, "unknown key search.axis (did you mean 'axes'?)"),
        ({"target": {"params": "1B"}, "search": {"axes": ["hidden"]}}, "(did you mean 'hidden_size'?)"),
        ({"target": {"params": "1B"}, "search": {"grid": {"hidden_size": 3}}}, "is not a list of positive integers"),
        ({"target": {"params": "1B"}, "search": {"grid": {"moe_ffn_hidden_size": [8]}}}, "is not in search.axes"),
        ({"target": {"params": "1B", "num_layers": 4}, "search": {"axes": ["num_layers"]}}, "which target gives"),
        ({"target": {"num_layers": 4}, "search": {}}, "search without a bound"),
        ({"phases": [{"target": {"num_layers": 4}}], "search": {}}, "in the target of any phase"),
        ({"phases": [{"target": {"params": "1B"}, "search": {"axes": ["heads"]}}]}, "phase 1: search.axes 'heads'"),
        (
            {"phases": [{"target": {"params": "1B"}}, {"target": {"params": "2B"}}]},
            "phase 2: target.params 2000000000 is larger than the 1000000000 of phase 1",
        ),
    ],
    ids=str,
)
def test_each_error_has_its_line(document: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"version": 1, **document})
    assert message in str(caught.value)


def test_numbers_as_people_write_them() -> None:
    for text in ("23.5B", "23.5e9", 23_500_000_000, 23.5e9):
        recipe = parse_recipe({"version": 1, "target": {"params": text, "memory_gb": 48}})
        assert recipe.budget is not None and recipe.budget.params == 23_500_000_000
        assert parse_recipe(recipe.to_dict()) == recipe


def test_a_phase_has_a_budget_of_its_own() -> None:
    phases = [{"target": {"num_layers": 6}}, {"target": {"params": "1M"}, "search": {"grid": {"hidden_size": [8]}}}]
    first, second = parse_recipe({"version": 1, "phases": phases, "search": {"axes": ["hidden_size"]}}).phases
    assert first.budget is None and second.budget is not None and second.budget.params == 10**6
    assert second.search.axes == ("hidden_size",) and second.search.grid == {"hidden_size": (8,)}
    assert parse_recipe(second.to_dict()) == second


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"grid": {"hidden_size": [12]}}, "search.grid.hidden_size 12: target.hidden_size 12 is not a multiple of 8"),
        ({"grid": {"num_moe_experts": [1]}}, "moe_router_topk 2 is larger than num_moe_experts 1"),
        ({"grid": {"num_layers": [16]}}, "target.num_layers 16 is larger than the source's 8"),
    ],
    ids=str,
)
def test_sizes_that_no_target_may_have_are_not_searched(search: Any, message: str, source: HFCheckpoint) -> None:
    recipe = parse_recipe({"version": 1, "target": {"params": "1B"}, "search": search})
    with pytest.raises(RecipeError) as caught:
        check_recipe(recipe, source.shape)
    assert message in str(caught.value)


def test_heads_are_searched_where_they_are_named(source: HFCheckpoint, random_stats: Stats) -> None:
    bounds = {"params": counts(source.shape)["params"] * 9 // 10}
    axes = ["moe_shared_expert_intermediate_size", "num_attention_heads", "linear_num_value_heads"]
    plan = planned(source, random_stats(source), dict(bounds), search={"axes": axes})
    grid = {
        "moe_shared_expert_intermediate_size": [8, 16, 24, 32],
        "num_attention_heads": [2, 4],
        "linear_num_value_heads": [2, 4],
    }
    assert plan.search is not None
    found = [dict(row.sizes) for row in plan.search.candidates]
    assert sorted(map(str, found)) == sorted(map(str, brute_force(source.shape, bounds, grid)))
    assert parse_plan(plan.to_dict()) == plan


def test_the_least_loss_wins_where_losses_are_measured(source: HFCheckpoint, random_stats: Stats) -> None:
    recipe = parse_recipe({"version": 1, "target": {"params": counts(source.shape)["params"] // 2}})
    losses, seen = iter([3.0, 1.5, 2.0]), []

    def measure(plan: Plan) -> float:
        seen.append(plan.target_shape)
        return next(losses)

    plan = make_plan(recipe, random_stats(source), source.shape, measure=measure, top=3)
    assert plan.search is not None and plan.search.chosen == 1
    assert [row.loss for row in plan.search.candidates[:4]] == [3.0, 1.5, 2.0, None]
    assert plan.target_shape == seen[1] and len(set(seen)) == 3
    assert parse_plan(plan.to_dict()) == plan


def test_a_plan_with_another_search_is_refused(source: HFCheckpoint, random_stats: Stats) -> None:
    document = planned(source, random_stats(source), {"params": counts(source.shape)["params"] // 2}).to_dict()
    for change in ({"chosen": 1}, {"chosen": 99}, {"count": 0}, {"candidates": [{}]}):
        with pytest.raises(PlanError):
            parse_plan(document | {"search": document["search"] | change})
    with pytest.raises(PlanError, match="budget"):
        parse_plan(document | {"search": None})


@pytest.mark.parametrize(
    "shape",
    [
        tiny_shape(),
        tiny_shape("qwen3_moe"),
        tiny_shape(layer_types=MIXED, num_layers=5),
        tiny_shape(mtp_num_layers=0, num_layers=6, moe_router_topk=3),
    ],
    ids=["qwen3_next", "qwen3_moe", "aperiodic", "no mtp"],
)
@pytest.mark.parametrize("include_mtp", [True, False])
def test_counting_rows_is_counting_parameters(shape: ModelShape, include_mtp: bool) -> None:
    total: Counter[bool] = Counter()
    for weight in weights(shape):
        if include_mtp or not weight.key.startswith("mtp."):
            total[weight.stacked] += int(np.prod(weight.shape(shape)))
    counted = count_parameters(shape, include_mtp=include_mtp)
    assert counted.total == total.total()
    assert counted.active == total[False] + total[True] * shape.moe_router_topk // shape.num_moe_experts


@pytest.mark.parametrize("method", ["adjacent_cosine", "block_influence"])
def test_bounds_hold_where_statistics_choose_the_layers(method: str, source: HFCheckpoint, random_stats: Stats) -> None:
    """With the layers that a recipe of the chosen sizes alone would keep."""
    bound = counts(source.shape)["params"] // 2
    for seed in range(3):
        stats = random_stats(source, seed)
        plan = planned(source, stats, {"params": bound}, depth={"method": method})
        assert plan.search is not None and counts(plan.target_shape)["params"] <= bound
        alone = planned(source, stats, dict(plan.search.candidates[0].sizes), depth={"method": method})
        assert (alone.kept_layers, alone.kept_hidden, alone.experts) == (
            plan.kept_layers,
            plan.kept_hidden,
            plan.experts,
        )
