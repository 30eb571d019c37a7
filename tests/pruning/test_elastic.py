"""Budgets within budgets: planned from one set of statistics, re-expressed, written, read back, and refused."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_slim.architecture.published import MODELS
from megatron_slim.architecture.shape import FAMILIES
from megatron_slim.checkpoint.convert import open_checkpoint, same_bytes
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.errors import PlanError, RecipeError, SlimError
from megatron_slim.pruning.apply import PrunedCheckpoint
from megatron_slim.pruning.elastic import (
    Elastic,
    ElasticBudget,
    check_nested,
    contained,
    elastic_of,
    find_elastic,
    parse_elastic,
    read_elastic,
    relative,
)
from megatron_slim.pruning.elastic_plans import bf16_summary, check_budgets, plan_budgets
from megatron_slim.pruning.experts import ExpertGroup
from megatron_slim.pruning.pipeline import write_pruned
from megatron_slim.pruning.plan import Plan, make_plan
from megatron_slim.pruning.plan_reader import load_plan, parse_plan
from megatron_slim.pruning.statistics import Statistics, layer_key
from megatron_slim.pruning.target import target_shape
from megatron_slim.recipe import parse_recipe
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

RandomStats = Callable[..., Statistics]
# Every axis of a family, in a parent that is itself pruned, and twice below it; of the smallest, a whole group goes.
SIZES: dict[str, tuple[int, int, int]] = {
    "num_layers": (7, 5, 4),
    "hidden_size": (56, 48, 40),
    "num_moe_experts": (6, 5, 3),
    "moe_router_topk": (3, 2, 2),
    "moe_ffn_hidden_size": (24, 24, 16),
    "num_query_groups": (2, 2, 1),
    "num_attention_heads": (6, 4, 2),
}
MORE: dict[str, dict[str, tuple[int, int, int]]] = {
    "shared": {"moe_shared_expert_intermediate_size": (28, 24, 16)},
    "gdn": {"linear_num_key_heads": (2, 2, 1), "linear_num_value_heads": (6, 4, 2)},
    "dense": {"ffn_hidden_size": (48, 40, 32)},
}
OF_FAMILY = {
    "qwen3_next": ("shared", "gdn"),
    "qwen3_moe": (),
    "qwen3_5_moe_text": ("shared", "gdn"),
    "glm4_moe": ("shared", "dense"),
}
NAMES = ("large", "middle", "small")


def targets(family: str) -> list[dict[str, int]]:
    """Sizes of three budgets; a shared expert of GLM is as wide as an expert, in whole numbers of them."""
    sizes = SIZES | {key: value for part in OF_FAMILY[family] for key, value in MORE[part].items()}
    if family == "glm4_moe":
        sizes = sizes | {"moe_shared_expert_intermediate_size": (24, 24, 16), "moe_router_topk": (2, 2, 2)}
    return [{key: value[number] for key, value in sizes.items()} for number in range(3)]


def family_source(path: Path, family: str, seed: int = 0) -> HFCheckpoint:
    sizes: dict[str, int] = {"num_layers": 8, "num_attention_heads": 6, "num_query_groups": 2, "moe_router_topk": 3}
    if "gdn" in OF_FAMILY[family]:
        sizes |= {"linear_num_value_heads": 6, "linear_num_key_heads": 2}
    return HFCheckpoint.open(write_tiny_checkpoint(path, tiny_shape(family, **sizes), seed=seed))


def document(sizes: list[dict[str, int]], **sections: Any) -> dict[str, Any]:
    budgets = [{"name": name, "target": target} for name, target in zip(NAMES, sizes, strict=False)]
    return {"version": 1, "budgets": budgets, "depth": {"method": "block_influence"}, **sections}


def planned(source: HFCheckpoint, stats: Statistics, sizes: list[dict[str, int]], **more: Any) -> Any:
    recipe = parse_recipe(document(sizes, **more))
    check_budgets(recipe.budgets, source.shape, where="recipe")
    return plan_budgets(recipe.budgets, stats, source.shape)


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, random_stats: RandomStats
) -> tuple[HFCheckpoint, tuple[ElasticBudget, ...]]:
    """A model and three budgets of it that differ in every axis."""
    source = family_source(tmp_path_factory.mktemp("elastic") / "hf", request.param)
    depth = "last" if source.shape.num_dense_layers else "block_influence"  # which may drop the dense layer
    return source, planned(source, random_stats(source), targets(request.param), depth={"method": depth})


Family = tuple[HFCheckpoint, tuple[ElasticBudget, ...]]


def assert_same_tensors(one: Any, other: Any) -> None:
    assert one.names == other.names and one.shape == other.shape
    assert [name for name in one.names if not same_bytes(one.read(name), other.read(name))] == []


def test_a_plan_of_a_plans_result_gives_the_bytes_of_the_plan(family: Family) -> None:
    """Composition, for every pair and for the chain, on every axis at once."""
    source, budgets = family
    plans = [each.plan for each in budgets]
    direct = [PrunedCheckpoint(plan, source) for plan in plans]
    for large, small in itertools.combinations_with_replacement(range(3), 2):
        of_large = PrunedCheckpoint(relative(plans[small], plans[large]), direct[large], check_source=False)
        assert_same_tensors(of_large, direct[small])
    chain = relative(relative(plans[2], plans[0]), relative(plans[1], plans[0]))
    assert chain.to_dict() | {"recipe": None} == relative(plans[2], plans[1]).to_dict() | {"recipe": None}


def test_every_axis_is_pruned_in_every_block(family: Family) -> None:
    """Or the test above would compare what is whole."""
    source, budgets = family
    plan = relative(budgets[2].plan, budgets[0].plan)
    blocks = set(plan.source_blocks.values())
    assert set(plan.inner.heads) == blocks and set(plan.inner.neurons) == set(plan.experts)
    assert any(block.startswith("mtp") for block in blocks) == bool(source.shape.mtp_num_layers)
    assert len(plan.kept_hidden) == 40 and len(plan.kept_layers) == 4 and plan.target_shape.num_moe_experts == 3
    shared = source.shape.moe_shared_expert_intermediate_size
    assert set(plan.inner.shared_neurons) == (set(plan.experts) if shared else set())
    assert bool(plan.inner.dense_neurons) == bool(source.shape.num_dense_layers)


def test_relative_plans_are_plans(family: Family) -> None:
    """Each is read as any plan is, and its recipe alone gives its sizes."""
    _, budgets = family
    for large, small in itertools.combinations_with_replacement(budgets, 2):
        plan = relative(small.plan, large.plan)
        assert parse_plan(json.loads(plan.to_json())) == plan
        assert plan.target_shape == small.plan.target_shape and plan.source_shape == large.plan.target_shape


def test_the_document_is_read_as_it_was_written(family: Family, tmp_path: Path) -> None:
    _, budgets = family
    elastic = elastic_of(budgets)
    assert [each.name for each in elastic.budgets] == list(NAMES)
    first = elastic.budgets[0].plan
    assert first.target_shape == first.source_shape == elastic.shape == budgets[0].plan.target_shape
    assert first.kept_hidden == tuple(range(elastic.shape.hidden_size)) and not first.inner.heads
    elastic.save(tmp_path / "elastic.json")
    assert read_elastic(tmp_path / "elastic.json") == elastic
    text = (tmp_path / "elastic.json").read_text()
    assert text == elastic.to_json() and json.loads(text) == json.loads(json.dumps(elastic.to_dict()))
    kept = json.dumps(list(elastic.budgets[1].plan.kept_hidden))
    assert f'"kept_hidden": {kept},\n' in text and '"parent": {\n' in text


def test_the_document_is_found_where_checkpoints_keep_it(family: Family, tmp_path: Path) -> None:
    elastic = elastic_of(family[1])
    for place, given in ((".", "."), ("hf", "."), (".", "iter_0000005"), (".", "release")):
        root = tmp_path / f"{place}-{given}".replace(".", "here")
        (root / given).mkdir(parents=True)
        (root / place).mkdir(exist_ok=True)
        assert find_elastic(root / given) is None
        elastic.save(root / place / "elastic.json")
        assert find_elastic(root / given) == elastic
    elastic_above = tmp_path / "other"
    for name in ("model", "release-2", "iter_last"):
        (elastic_above / name).mkdir(parents=True)
    elastic.save(elastic_above / "elastic.json")
    assert [find_elastic(elastic_above / name) for name in ("model", "release-2", "iter_last")] == [None] * 3


def test_budgets_within_a_budget(family: Family) -> None:
    elastic = elastic_of(family[1])
    assert elastic.down_from("small") == elastic.budgets[2:]
    within = elastic_of(elastic.down_from("middle"))
    assert within.budgets[1].plan == relative(family[1][2].plan, family[1][1].plan)
    assert [each.name for each in within.budgets] == ["middle", "small"]
    assert within.shape == elastic.named("middle").plan.target_shape
    with pytest.raises(SlimError, match="no budget 'smal'; give one of large, middle, small"):
        elastic.named("smal")


@pytest.fixture(scope="module")
def two(source: HFCheckpoint, random_stats: RandomStats) -> tuple[ElasticBudget, ...]:
    sizes = [
        {"num_layers": 6, "hidden_size": 48, "num_moe_experts": 6},
        {"num_layers": 5, "hidden_size": 40, "num_moe_experts": 4, "moe_ffn_hidden_size": 24}
        | {"moe_shared_expert_intermediate_size": 24, "num_attention_heads": 2, "linear_num_value_heads": 2},
    ]
    return tuple(planned(source, random_stats(source), sizes))


def changed(budget: ElasticBudget, **parts: Any) -> ElasticBudget:
    return dataclasses.replace(budget, plan=dataclasses.replace(budget.plan, **parts))


def crossings(two: tuple[ElasticBudget, ...], large: ElasticBudget | None = None, **parts: Any) -> list[str]:
    return contained([large or two[0], changed(two[1], **parts)])


def test_contained_budgets_have_no_violations(two: tuple[ElasticBudget, ...]) -> None:
    assert contained(two) == []
    check_nested(two)


def test_a_crossing_names_budget_axis_block_and_index(two: tuple[ElasticBudget, ...], source: HFCheckpoint) -> None:
    large, small = (each.plan for each in two)
    ending = "of budget large"
    layer = min(set(range(8)) - set(large.kept_layers))
    layers = tuple(sorted({*small.kept_layers[1:], layer}))
    assert crossings(two, kept_layers=layers) == [
        f"budget middle: layer {layer} is not among the 6 layers {ending}",
    ]
    lost = sorted(set(range(64)) - set(large.kept_hidden))[:2]
    hidden = tuple(sorted({*small.kept_hidden[2:], *lost}))
    assert crossings(two, kept_hidden=hidden) == [
        f"budget middle: hidden dimension {lost[0]} and 1 more are not among the 48 hidden dimensions {ending}"
    ]
    block = f"model.layers.{small.kept_layers[0]}"
    bases = {group.base for group in large.experts[block]}
    expert = min(set(range(8)) - bases)
    groups = tuple(
        sorted((ExpertGroup(expert, (expert,), (1.0,)), *small.experts[block][1:]), key=lambda each: each.base)
    )
    assert crossings(two, experts={**small.experts, block: groups}) == [
        f"budget middle: {block}: expert {expert} is not among the 6 experts {ending}"
    ]
    shape = dataclasses.replace(small.target_shape, moe_router_topk=3)
    assert crossings(two, target_shape=shape) == [f"budget middle: top-k 3 is larger than the 2 {ending}"]


@pytest.mark.parametrize("number", [0, -1])
def test_a_crossing_inside_a_block(two: tuple[ElasticBudget, ...], number: int) -> None:
    """The small budget made the large one of itself, less one index of one list; the last block is MTP's."""
    small = two[1]
    block = list(small.plan.source_blocks.values())[number]
    inner = small.plan.inner
    for name, noun in (("heads", "head"), ("shared_neurons", "shared neuron")):
        part = getattr(inner, name)
        large = changed(small, inner=dataclasses.replace(inner, **{name: {**part, block: part[block][1:]}}))
        count = len(part[block]) - 1
        assert contained([dataclasses.replace(large, name="large"), small]) == [
            f"budget middle: {block}: {noun} {part[block][0]} is not among the {count} {noun}s of budget large"
        ]
    expert = small.plan.experts[block][1].base
    neurons = [list(each) for each in inner.neurons[block]]
    gone = neurons[1].pop()
    fewer = {**inner.neurons, block: tuple(map(tuple, neurons))}
    large = changed(small, inner=dataclasses.replace(inner, neurons=fewer))
    assert contained([dataclasses.replace(large, name="large"), small]) == [
        f"budget middle: {block}: expert {expert}: neuron {gone} is not among the 23 neurons of budget large"
    ]


def test_a_merged_expert_is_in_no_other_budget(source: HFCheckpoint, plan_for: Callable[..., Plan]) -> None:
    merged = ElasticBudget("m", 1.0, plan_for({"num_moe_experts": 4}, method="merge"))
    found = contained([merged])
    assert len(found) >= 1 and found[0].startswith("budget m: model.layers.0: expert ") and "is merged" in found[0]
    with pytest.raises(RecipeError, match=r"r\.yaml: budget m: .*; and \d+ more; choose survivors of all budgets"):
        check_nested([merged], where="r.yaml")


def test_methods_that_do_not_nest_are_refused(source: HFCheckpoint, random_stats: RandomStats) -> None:
    """Ranked by different statistics, the small budget keeps experts that the large one drops."""
    recipe = document([{"num_moe_experts": 6}, {"num_moe_experts": 4}])
    recipe["budgets"][1]["experts"] = {"importance": "reap"}
    with pytest.raises(RecipeError, match=r"budget middle: model\.layers\.\d+: expert \d.* is not among the 6 experts"):
        plan_budgets(parse_recipe(recipe).budgets, random_stats(source), source.shape)


def test_experts_allocated_by_loss_nest_or_are_refused(source: HFCheckpoint, random_stats: RandomStats) -> None:
    """Of a whole parent; a document of one remembers what each layer lost."""
    recipe = document([{}, {"num_moe_experts": 4, "num_layers": 6}], depth={"method": "last"})
    recipe["budgets"][1]["experts"] = {"allocation": "loss"}
    losses = {block: 1.0 + 0.1 * number for number, block in enumerate(source.shape.blocks) if "model" in block}
    budgets = plan_budgets(
        parse_recipe(recipe).budgets,
        random_stats(source),
        source.shape,
        options={"middle": {"sensitivity": lambda plan: losses}},
    )
    shape = budgets[1].plan.target_shape
    assert len(set(shape.experts_per_layer)) > 1
    elastic = elastic_of(budgets)
    assert parse_elastic(json.loads(elastic.to_json())) == elastic and elastic.budgets[1].plan.target_shape == shape
    smaller = make_plan(parse_recipe({"version": 1, "target": {"num_layers": 5}}), random_stats(source), source.shape)
    with pytest.raises(RecipeError, match="expert"):
        check_nested([budgets[1], ElasticBudget("x", 1.0, smaller)])
    hidden = dataclasses.replace(parse_recipe(recipe).budgets[1].recipe)
    hidden = dataclasses.replace(hidden, target=dataclasses.replace(hidden.target, hidden_size=40))
    third = make_plan(hidden, random_stats(source), source.shape, sensitivity=lambda plan: losses)
    of_uneven = relative(third, budgets[1].plan)
    assert parse_plan(json.loads(of_uneven.to_json())) == of_uneven
    assert of_uneven.target_shape.experts_per_layer == shape.experts_per_layer
    source_of = PrunedCheckpoint(budgets[1].plan, source)
    assert_same_tensors(PrunedCheckpoint(of_uneven, source_of, check_source=False), PrunedCheckpoint(third, source))


@pytest.mark.parametrize("method", ["block_influence", "adjacent_cosine"])
def test_layers_by_statistics_nest_in_the_sources_pattern(
    source: HFCheckpoint, random_stats: RandomStats, method: str
) -> None:
    """Of 8 layers 6, 5 and 4 are left, all with the fourth of full attention; each by itself they would not nest."""
    apart, depth = 0, {"method": method, "pattern": "source"}
    recipe = parse_recipe(document([{"num_layers": n} for n in (6, 5, 4)], depth=depth))
    for seed in range(8):
        stats = random_stats(source, seed)
        budgets = plan_budgets(recipe.budgets, stats, source.shape)
        assert [each.plan.target_shape.full_attention_interval for each in budgets] == [4, 4, 4]
        alone = [ElasticBudget(each.name, 1.0, make_plan(each.recipe, stats, source.shape)) for each in recipe.budgets]
        apart += bool(contained(alone))
    assert apart


def test_sizes_that_are_searched_are_within_those_of_the_larger_budget(
    source: HFCheckpoint, random_stats: RandomStats
) -> None:
    """The second bound leaves room for more layers than the first budget has, and for more experts."""
    axes = ["num_layers", "hidden_size", "num_moe_experts"]
    sizes: list[dict[str, Any]] = [
        {"num_layers": 4, "hidden_size": 64, "num_moe_experts": 8},
        {"params": "120K"},
        {"params": "90K"},
    ]
    recipe = parse_recipe(document(sizes, depth={"method": "last"}, search={"axes": axes}))
    check_budgets(recipe.budgets, source.shape, where="r")
    found = [each.plan for each in plan_budgets(recipe.budgets, random_stats(source), source.shape)]
    for large, small in itertools.pairwise(found):
        assert all(getattr(small.target_shape, axis) <= getattr(large.target_shape, axis) for axis in axes)
        assert small.search is not None
        rows = small.search.candidates
        assert all(row.sizes[axis] <= getattr(large.target_shape, axis) for row in rows for axis in axes)
    alone = make_plan(recipe.budgets[1].recipe, random_stats(source), source.shape)
    assert alone.target_shape.num_layers > 4
    sizes[0] = {"num_moe_experts": 3}
    grown = document(sizes, search={"axes": axes, "grid": {"num_moe_experts": [4, 6]}})
    with pytest.raises(RecipeError, match="num_moe_experts: the least size that is searched, 4, is larger than the 3"):
        check_budgets(parse_recipe(grown).budgets, source.shape, where="r")


def test_numbers_of_experts_by_loss_are_within_those_of_the_larger_budget(
    source: HFCheckpoint, random_stats: RandomStats
) -> None:
    """Each budget measures its own losses: here the second would keep most where the first keeps least."""
    recipe = parse_recipe(document([{"num_moe_experts": 5}, {"num_moe_experts": 4}], experts={"allocation": "loss"}))
    blocks = [block for block in source.shape.routed_blocks if block.startswith("model.")]
    rising = {block: 1.0 + number for number, block in enumerate(blocks)}
    falling = dict(zip(rising, reversed(rising.values()), strict=True))
    options: dict[str, Any] = {
        "large": {"sensitivity": lambda plan: rising},
        "middle": {"sensitivity": lambda plan: falling},
    }
    stats = random_stats(source)
    large, small = (
        each.plan.target_shape.experts_per_layer
        for each in plan_budgets(recipe.budgets, stats, source.shape, options=options)
    )
    assert sum(small) == 32 and all(few <= many for few, many in zip(small, large, strict=True))
    alone = make_plan(recipe.budgets[1].recipe, stats, source.shape, sensitivity=lambda plan: falling)
    assert any(few > many for few, many in zip(alone.target_shape.experts_per_layer, large, strict=True))
    fewer = document([{"num_moe_experts": 5}, {"num_moe_experts": 5, "num_layers": 4}], experts={"allocation": "loss"})
    fewer["depth"] = {"method": "last"}
    message = r"r: budget middle: target\.num_moe_experts: 4 layers are to have 5 experts on average and at"
    with pytest.raises(RecipeError, match=message):
        plan_budgets(parse_recipe(fewer).budgets, stats, source.shape, options=options, where="r")


def test_a_search_takes_no_number_of_layers_that_crosses(source: HFCheckpoint, random_stats: RandomStats) -> None:
    """Three of the larger budget's layers are no choice: a run of them that goes leaves no full attention."""
    sizes: list[dict[str, Any]] = [{"num_layers": 4}, {"params": "1B", "num_moe_experts": 8}]
    search = {"axes": ["num_layers"], "grid": {"num_layers": [2, 3]}}
    recipe = parse_recipe(document(sizes, depth={"method": "adjacent_cosine"}, search=search))
    stats = random_stats(source)
    for layer in range(8):  # the run from layer 4 goes, and 3 is the only one of full attention that is left
        stats.tensors[layer_key(f"model.layers.{layer}", "cosine")] = np.float32(layer == 4)
    found = [each.plan.kept_layers for each in plan_budgets(recipe.budgets, stats, source.shape)]
    assert found[0] == (0, 1, 2, 3) and found[1] == (0, 2, 3)
    stats.tensors[layer_key("model.layers.7", "cosine")] = np.float32(9)
    sizes = [{"num_layers": 7}, {"num_layers": 5}, {"num_layers": 3}]
    recipe = parse_recipe(document(sizes, depth={"method": "adjacent_cosine"}))
    assert contained(plan_budgets(recipe.budgets, stats, source.shape)) == []


def test_a_search_takes_no_more_experts_than_layers_have(source: HFCheckpoint, random_stats: RandomStats) -> None:
    """Of a larger budget by loss: as many as the poorest layer has, or by loss as many as all have on average."""
    blocks = [block for block in source.shape.routed_blocks if block.startswith("model.")]
    losses = {block: float(number > 3) for number, block in enumerate(blocks)}
    options: dict[str, Any] = {name: {"sensitivity": lambda plan: losses} for name in NAMES[:2]}
    for own, layers, expected in (({"allocation": "loss"}, 4, 3), ({}, 8, 3), ({}, 4, 3)):
        sizes: list[dict[str, Any]] = [
            {"num_moe_experts": 5},
            {"params": "1B", "num_layers": layers, "hidden_size": 64},
        ]
        recipe = document(sizes, depth={"method": "last"}, experts=own)
        recipe["budgets"][0]["experts"] = {"allocation": "loss"}
        recipe["search"] = {"axes": ["num_moe_experts"], "grid": {"num_moe_experts": [2, 3, 4, 5]}}
        budgets = plan_budgets(parse_recipe(recipe).budgets, random_stats(source), source.shape, options=options)
        assert budgets[0].plan.target_shape.experts_per_layer[:4] == (3,) * 4
        assert budgets[1].plan.target_shape.num_moe_experts == expected


def test_the_larger_budgets_own_size_is_searched(source: HFCheckpoint, random_stats: RandomStats) -> None:
    """The usual numbers are 4 and 8 layers."""
    for layers, method in ((6, "last"), (3, "block_influence")):
        sizes: list[dict[str, Any]] = [{"num_layers": layers, "num_moe_experts": 4}, {"params": "1B"}]
        recipe = parse_recipe(document(sizes, depth={"method": method}))
        check_budgets(recipe.budgets, source.shape, where="r")
        found = plan_budgets(recipe.budgets, random_stats(source), source.shape)
        assert [each.plan.target_shape.num_layers for each in found] == [layers, layers]


def test_a_search_leaves_room_for_the_smaller_budgets(source: HFCheckpoint, random_stats: RandomStats) -> None:
    sizes: list[dict[str, Any]] = [{"params": "150K"}, {"num_layers": 6, "hidden_size": 32, "num_moe_experts": 2}]
    recipe = parse_recipe(document(sizes, depth={"method": "last"}))
    check_budgets(recipe.budgets, source.shape, where="r")
    large = plan_budgets(recipe.budgets, random_stats(source), source.shape)[0].plan.target_shape
    assert large.num_layers >= 6 and large.hidden_size >= 32
    alone = make_plan(recipe.budgets[0].recipe, random_stats(source), source.shape).target_shape
    assert alone.hidden_size < 32 or alone.num_layers < 6


CROSSING: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "past a bound": (
        [{"params": "100K"}, {}],
        {},
        "budget middle: has at least .* params, more than budget large may",
    ),
    "past a grid": (
        [{"params": "400K"}, {"num_layers": 4}],
        {"search": {"axes": ["hidden_size"], "grid": {"hidden_size": [32, 48]}}},
        "budget middle: hidden_size 64, which the target leaves as the source's, is larger than the 48 of budget large",
    ),
    "no room": (
        [{"params": "60K"}, {"num_layers": 4, "hidden_size": 48, "num_moe_experts": 2}],
        {},
        r"large: target\.params 60,000 is out of reach: .* \(smaller budgets need num_layers 4, hidden_size 48, ",
    ),
}


@pytest.mark.parametrize("case", CROSSING)
def test_what_cannot_nest_is_refused_before_anything_is_measured(source: HFCheckpoint, case: str) -> None:
    sizes, sections, message = CROSSING[case]
    recipe = parse_recipe(document(sizes, depth={"method": "last"}, **sections))
    with pytest.raises(RecipeError, match=message):
        check_budgets(recipe.budgets, source.shape, where="r")


def test_a_document_says_the_average_where_no_layer_has_fewer_experts(
    tmp_path: Path, random_stats: RandomStats
) -> None:
    """Of a model without MTP, by loss twice; the layers that are left have all that the larger budget has there."""
    source = family_source(tmp_path / "hf", "qwen3_moe")
    recipe = document(
        [{"num_moe_experts": 5}, {"num_moe_experts": 4, "num_layers": 4}],
        depth={"method": "last"},
        experts={"allocation": "loss"},
    )
    stats, blocks = random_stats(source), list(source.shape.routed_blocks)
    first = parse_recipe(recipe).budgets[0].recipe
    for seed in range(100):
        losses = dict(zip(blocks, np.random.default_rng(seed).random(8).tolist(), strict=True))
        alone = make_plan(first, stats, source.shape, sensitivity=lambda plan, losses=losses: losses)  # type: ignore[misc]
        if sum(alone.target_shape.experts_per_layer[:4]) == 16:
            break
    options: dict[str, Any] = {name: {"sensitivity": lambda plan: losses} for name in NAMES[:2]}
    budgets = plan_budgets(parse_recipe(recipe).budgets, stats, source.shape, options=options)
    large, small = (each.plan.target_shape.experts_per_layer for each in budgets)
    assert large[:4] == small
    elastic = elastic_of(budgets)
    assert parse_elastic(json.loads(elastic.to_json())) == elastic


def test_expert_groups_of_budgets_nest(source: HFCheckpoint, random_stats: RandomStats) -> None:
    """Equally many of each run of four, two and two: the relative plans say so of runs that both have."""
    recipe = document([{"num_moe_experts": 6}, {"num_moe_experts": 4}], experts={"num_groups": 2})
    budgets = plan_budgets(parse_recipe(recipe).budgets, random_stats(source), source.shape)
    plan = relative(budgets[1].plan, budgets[0].plan)
    assert plan.recipe.experts.num_groups == 2 and parse_plan(json.loads(plan.to_json())) == plan
    recipe["budgets"][0]["target"] = {}
    whole = plan_budgets(parse_recipe(recipe).budgets, random_stats(source), source.shape)
    assert relative(whole[1].plan, whole[0].plan).recipe.experts.num_groups == 2


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda d: d.update(version=2), "not a document of budgets of version 1"),
    "key": (lambda d: d.update(sizes=[]), "unknown key sizes"),
    "no budgets": (lambda d: d.update(budgets=[]), "budgets are not a list of at least one"),
    "no parent": (lambda d: d.pop("parent"), "missing key parent"),
    "parent": (lambda d: d["parent"]["shape"].update(hidden_size="48"), "parent: shape.hidden_size '48'"),
    "budget": (lambda d: d["budgets"][0].pop("weight"), "budget 0 is not an object with name, plan, weight"),
    "weight": (lambda d: d["budgets"][1].update(weight=0), "budget 1: weight 0 is not a finite number above zero"),
    "name": (lambda d: d["budgets"][1].update(name="../x"), "budget 1: name '../x' is not made of letters"),
    "names": (lambda d: d["budgets"][1].update(name="large"), "name 'large' is there 2 times"),
    "torn plan": (lambda d: d["budgets"][1]["plan"].pop("experts"), "budget middle: plan: missing key experts"),
    "list": (lambda d: d["budgets"][1]["plan"]["kept_hidden"].reverse(), "kept_hidden is not strictly ascending"),
    "order": (lambda d: d["budgets"].reverse(), "budget middle: the first is the parent itself"),
    "other parent": (lambda d: d["parent"]["shape"].update(vocab_size=96), "budget large: its plan is for a model of"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_document_is_one_line(two: tuple[ElasticBudget, ...], damage: str) -> None:
    found = copy.deepcopy(json.loads(elastic_of(two).to_json()))
    assert isinstance(parse_elastic(found), Elastic)
    change, message = DAMAGE[damage]
    change(found)
    with pytest.raises(PlanError) as raised:
        parse_elastic(found, where="e.json")
    assert message in str(raised.value) and str(raised.value).startswith("e.json: ")


def test_all_violations_of_a_document_are_in_one_line(two: tuple[ElasticBudget, ...]) -> None:
    found = json.loads(elastic_of(two).to_json())
    found["budgets"][0]["plan"]["kept_layers"] = [0]
    found["budgets"][1]["weight"] = float("inf")
    found["more"] = 1
    with pytest.raises(PlanError) as raised:
        parse_elastic(found)
    for part in ("unknown key more", "budget large: plan: kept_layers has 1 entries", "weight inf"):
        assert part in str(raised.value)


def test_crossing_budgets_in_a_document(two: tuple[ElasticBudget, ...], source: HFCheckpoint) -> None:
    """Of three, the last swapped for one that keeps another hidden dimension than the middle."""
    elastic = elastic_of(two)
    found = json.loads(elastic.to_json())
    third = copy.deepcopy(found["budgets"][1]) | {"name": "third"}
    other = min(set(range(48)) - set(third["plan"]["kept_hidden"]))
    third["plan"]["kept_hidden"] = sorted([other, *third["plan"]["kept_hidden"][1:]])
    found["budgets"].append(third)
    with pytest.raises(PlanError, match=f"budget third: hidden dimension {other} is not among the 40 hidden"):
        parse_elastic(found)


def test_plans_bind_sizes_and_not_weights(family: Family, tmp_path: Path) -> None:
    """The parent written, opened, other weights in its place: its budgets slice them."""
    source, budgets = family
    write_pruned(PrunedCheckpoint(budgets[0].plan, source), tmp_path / "parent", stats=None, to="hf")
    parent = open_checkpoint(tmp_path / "parent")
    plan = elastic_of(budgets).named("small").plan
    assert_same_tensors(PrunedCheckpoint(plan, parent, check_source=False), PrunedCheckpoint(budgets[2].plan, source))
    trained = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "trained", parent.shape, seed=7))
    sliced = PrunedCheckpoint(plan, trained, check_source=False)
    name = "model.norm.weight"
    assert same_bytes(sliced.read(name), trained.read(name)[list(plan.kept_hidden)])
    with pytest.raises(PlanError, match="the plan was made for another checkpoint"):
        PrunedCheckpoint(plan, source, check_source=False)


GROWING = {
    "a size that is left out": ([{"hidden_size": 48}, {"num_layers": 4}], "hidden_size 64, which the target leaves"),
    "top-k": ([{"moe_router_topk": 1}, {"num_layers": 4}], "moe_router_topk 2, which the target leaves"),
    "heads by their groups": ([{"num_attention_heads": 2}, {"num_query_groups": 2}], "num_attention_heads 4 is larger"),
    "left out under a bound": (
        [{"moe_ffn_hidden_size": 24}, {"params": "1B"}],
        "moe_ffn_hidden_size 32, which the target leaves",
    ),
    "more than the source": ([{}, {"hidden_size": 128}], "target.hidden_size 128 is larger than the source's 64"),
}


@pytest.mark.parametrize("case", GROWING)
def test_sizes_that_grow_are_refused_before_anything_is_measured(case: str) -> None:
    sizes, message = GROWING[case]
    shape = tiny_shape(norm_topk_prob=False)
    with pytest.raises(RecipeError) as raised:
        check_budgets(parse_recipe(document(sizes)).budgets, shape, where="r.yaml")
    assert message in str(raised.value) and str(raised.value).startswith("r.yaml: ")


def test_sizes_that_are_searched_or_named_again_may_be_checked() -> None:
    sizes = [{"hidden_size": 48}, {"params": "1B"}, {"hidden_size": 40}]
    assert check_budgets(parse_recipe(document(sizes[:2])).budgets, tiny_shape(), where="") is None
    assert check_budgets(parse_recipe(document(sizes[::2])).budgets, tiny_shape(), where="") is None


def test_the_example_of_the_page_is_a_recipe_with_the_sizes_of_its_table() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/elastic.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    recipe = parse_recipe(yaml.safe_load(text))
    shape = MODELS[recipe.budgets[0].recipe.source].shape
    check_budgets(recipe.budgets, shape, where="docs/elastic.md")
    assert [each.weight for each in recipe.budgets] == [1.0, 0.5, 1.0]
    table = re.findall(r"^\| (\d+b) \| (.*) \|$", page, flags=re.MULTILINE)
    for (name, cells), budget in zip(table, recipe.budgets, strict=True):
        target = target_shape(budget.recipe, shape, tuple(range(36)))
        sizes = bf16_summary(target)
        counts = (sizes[key] / 1e9 for key in ("parameters", "parameters_without_mtp", "active_parameters"))
        expected = [*(f"{count:.1f}B" for count in counts), f"{sizes['bytes'] / 1e9:.1f} GB"]
        assert (name, cells.split(" | ")) == (budget.name, expected)


@pytest.mark.slow
def test_plans_with_millions_of_neurons_are_read(tmp_path: Path) -> None:
    """Of 48 layers with 512 experts a plan names more numbers than other documents may have."""
    numbers = "0," * 5_000_000
    (tmp_path / "p.json").write_text(f'{{"version": 2, "neurons": [{numbers}0]}}')
    (tmp_path / "e.json").write_text(f'{{"version": 1, "budgets": [{numbers}0]}}')
    with pytest.raises(PlanError, match="missing key recipe"):
        load_plan(tmp_path / "p.json")
    with pytest.raises(PlanError, match="missing key parent"):
        read_elastic(tmp_path / "e.json")
