"""Which layers survive, and that what cannot survive is refused before anything is measured."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slim.architecture.shape import FAMILIES
from megatron_slim.architecture.shape import FULL_ATTENTION as FULL
from megatron_slim.architecture.shape import LINEAR_ATTENTION as LINEAR
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.errors import RecipeError
from megatron_slim.planning.sources import Asked, find_models
from megatron_slim.pruning.depth import depth_of, is_whole, kept_layers, possible_depths
from megatron_slim.pruning.plan import make_plan
from megatron_slim.pruning.plan_reader import parse_plan
from megatron_slim.pruning.plan_view import depth_reason
from megatron_slim.pruning.recipe_checks import check_later_phases, check_recipe
from megatron_slim.pruning.statistics import Statistics, layer_key
from megatron_slim.recipe import parse_recipe
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint


def _key(layer: int, name: str) -> str:
    return layer_key(f"model.layers.{layer}", name)


@pytest.mark.parametrize(
    ("method", "layers", "favoured", "kept"),
    [
        # The start that statistics favour leaves linear attention alone; the next best does not.
        ("adjacent_cosine", 3, (3, 2), (0, 1, 7)),
        ("adjacent_cosine", 2, (2, 1), (0, 7)),
        # The two layers of full attention, 3 and 7, matter least; 3 matters more than 7.
        ("block_influence", 3, (0, 1, 2, 4, 5, 6, 3, 7), (0, 1, 3)),
        ("block_influence", 1, (0, 1, 2, 4, 5, 6, 7, 3), (7,)),
        ("block_influence", 3, (0, 7, 2, 4, 5, 6, 1, 3), (0, 2, 7)),
    ],
)
def test_statistics_choose_among_what_leaves_a_full_attention_layer(
    source: HFCheckpoint,
    random_stats: Callable[..., Statistics],
    method: str,
    layers: int,
    favoured: tuple[int, ...],
    kept: tuple[int, ...],
) -> None:
    """What no check before calibration can know is never refused after it either."""
    stats = random_stats(source)
    if method == "adjacent_cosine":  # the layer of the highest cosine is the first that is dropped
        values = {_key(i, "cosine"): 1.0 - favoured.index(i) / 10 if i in favoured else 0.0 for i in range(8)}
    else:
        values = {_key(i, method): 1.0 - favoured.index(i) / 10 for i in range(8)}
    own = {key: np.asarray(value, np.float32) for key, value in values.items()}
    assert own.keys() <= stats.tensors.keys()
    recipe = parse_recipe({"version": 1, "target": {"num_layers": layers}, "depth": {"method": method}})
    stats = Statistics({**stats.tensors, **own}, stats.metadata)
    plan = make_plan(recipe, stats, source.shape)
    assert plan.kept_layers == kept and FULL in plan.target_shape.layer_types
    yielded = kept != (0, 2, 7)  # what statistics favour leaves none
    assert ("full" in depth_reason(plan, stats)) == yielded


@pytest.mark.parametrize("method", ["last", "adjacent_cosine", "block_influence"])
@pytest.mark.parametrize(
    "types", [(LINEAR, LINEAR, FULL, LINEAR, FULL), (*(LINEAR,) * 4, FULL), (FULL, *(LINEAR,) * 4)]
)
def test_what_is_accepted_before_calibration_is_never_refused_after_it(
    random_stats: Callable[..., Statistics], method: str, types: tuple[str, ...], tmp_path: Path
) -> None:
    checkpoint = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "hf", tiny_shape(layer_types=types)))
    accepted = []
    for layers in range(1, 6):
        recipe = parse_recipe({"version": 1, "target": {"num_layers": layers}, "depth": {"method": method}})
        try:
            check_recipe(recipe, checkpoint.shape)
        except RecipeError as error:
            assert f"target.num_layers {layers} leaves no full_attention layer" in str(error)
            continue
        accepted.append(layers)
        for seed in range(8):
            plan = make_plan(recipe, random_stats(checkpoint, seed), checkpoint.shape)
            assert len(plan.kept_layers) == layers and FULL in plan.target_shape.layer_types
    least = {"last": types.index(FULL) + 1, "block_influence": 1}
    # Layer 0 and the layers after the run are left: the last alone is one of them from two layers on.
    assert accepted == list(range(least.get(method, 1 if types[0] == FULL else 2), 6))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["adjacent_cosine", "block_influence"])
def test_the_sources_pattern_is_left_by_the_best_of_all_choices(family: str, method: str) -> None:
    shape = tiny_shape(family, num_layers=9)
    for layers, seed in itertools.product(range(1, 9), range(4)):
        depth, wanted = {"method": method, "pattern": "source"}, shape.sublayers[:layers]
        recipe = parse_recipe({"version": 1, "target": {"num_layers": layers}, "depth": depth})
        assert list(possible_depths(recipe, shape, layers)) == [wanted]
        if not is_whole(wanted):
            with pytest.raises(RecipeError, match=rf"target\.num_layers {layers} leaves no full_attention layer"):
                check_recipe(recipe, shape)
            continue
        values = np.random.default_rng(seed).integers(1, 5, 9).astype(np.float32)  # few, so that some are equal
        name = "cosine" if method == "adjacent_cosine" else method
        kept = kept_layers(recipe, Statistics({_key(i, name): values[i] for i in range(9)}, {}), shape)
        if method == "adjacent_cosine":
            starts = range(1, layers + 1)
            runs = [(start, (*range(start), *range(start + 9 - layers, 9))) for start in starts]
            possible = [(values[start], each) for start, each in runs if depth_of(shape, each) == wanted]
            assert kept == max(possible, key=lambda run: run[0])[1]
        else:
            possible = [
                (-sum(values[list(each)]), each[::-1])
                for each in itertools.combinations(range(9), layers)
                if depth_of(shape, each) == wanted
            ]
            assert kept == min(possible)[1][::-1]  # the largest sum; of equal ones, the earlier layers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["last", "adjacent_cosine", "block_influence"])
@pytest.mark.parametrize("pattern", ["any", "source"])
def test_layers_of_a_larger_choice_are_chosen_from_it(family: str, method: str, pattern: str) -> None:
    """The best of all choices within it, by trying all; three, one within the other. A.4 drops a run of them."""
    shape = tiny_shape(family, num_layers=9)
    for numbers, seed in itertools.product([(8, 7, 6), (7, 5, 4), (6, 5, 2), (9, 4, 4)], range(3)):
        within: tuple[int, ...] = tuple(range(9))
        values = np.random.default_rng(seed).integers(1, 5, 9).astype(np.float32)
        name = "cosine" if method == "adjacent_cosine" else "block_influence"
        stats = Statistics({_key(i, name): values[i] for i in range(9)}, {})
        for layers in numbers:
            recipe = parse_recipe(
                {"version": 1, "target": {"num_layers": layers}, "depth": {"method": method, "pattern": pattern}}
            )
            if not [each for each in possible_depths(recipe, shape, layers) if is_whole(each)]:
                break
            kept = kept_layers(recipe, stats, shape, within)
            choices = [each for each in itertools.combinations(within, layers) if is_whole(depth_of(shape, each))]
            if pattern == "source":
                choices = [each for each in choices if depth_of(shape, each) == shape.sublayers[:layers]]
            if method == "block_influence":
                assert kept in choices
                assert sum(values[list(kept)]) == max(sum(values[list(each)]) for each in choices)
            elif method == "last" or layers == len(within):
                assert kept == within[:layers]
            else:
                gone = len(within) - layers
                runs = [(within[first], (*within[:first], *within[first + gone :])) for first in range(1, layers + 1)]
                assert kept == max((run for run in runs if run[1] in choices), key=lambda run: values[run[0]])[1]
            within = kept


def test_the_pattern_is_kept_or_the_larger_choice_is_left() -> None:
    """Whatever the larger choice left; where that cannot be, `nesting.check_nested` names the layer."""
    shape = tiny_shape(num_layers=8)  # layers 3 and 7 are of full attention
    stats = Statistics({_key(i, "block_influence"): np.float32(i) for i in range(8)}, {})
    depth = {"method": "block_influence", "pattern": "source"}
    recipe = parse_recipe({"version": 1, "target": {"num_layers": 4}, "depth": depth})
    for method, expected in {"last": (2, 4, 5, 7), "adjacent_cosine": (2, 5, 6, 7)}.items():
        own = {**stats.tensors, **{_key(i, "cosine"): np.float32(0) for i in range(8)}}
        other = dataclasses.replace(recipe, depth=dataclasses.replace(recipe.depth, method=method))
        assert kept_layers(other, Statistics(own, {}), shape, (2, 3, 4, 5, 6, 7)) == expected
    assert kept_layers(recipe, stats, shape, (3, 4, 5, 6)) == kept_layers(recipe, stats, shape) == (4, 5, 6, 7)
    assert kept_layers(recipe, stats, shape, (0, 1, 2)) == (4, 5, 6, 7)


def test_a_period_stays_one(source: HFCheckpoint, random_stats: Callable[..., Statistics]) -> None:
    """Layers 3 and 7 of eight are of full attention; of six that are left, the fourth is."""
    stats = random_stats(source)
    favoured = {_key(i, "block_influence"): np.float32(i) for i in range(8)}  # the first layers would go
    stats = Statistics({**stats.tensors, **favoured}, stats.metadata)
    plans = {}
    for pattern in ("any", "source"):
        depth = {"method": "block_influence", "pattern": pattern}
        recipe = parse_recipe({"version": 1, "target": {"num_layers": 6}, "depth": depth})
        plans[pattern] = make_plan(recipe, stats, source.shape)
    assert plans["any"].kept_layers == (2, 3, 4, 5, 6, 7)
    assert plans["source"].kept_layers == (0, 1, 2, 3, 5, 6)
    assert plans["any"].target_shape.full_attention_interval is None
    assert plans["source"].target_shape.full_attention_interval == 4
    assert plans["any"].to_dict()["recipe"]["depth"] == {"method": "block_influence"}  # as earlier releases write it
    assert parse_plan(plans["source"].to_dict()) == plans["source"]
    reason = "2 of 8 layers are removed: those of the least block influence in sum that leave the source's pattern"
    assert depth_reason(plans["source"], stats) == f"{reason} (11 of 28)"
    assert depth_reason(plans["source"], None) == reason


STAGES: dict[str, tuple[list[dict[str, Any]], int, str | None]] = {
    "last, then last": ([{"num_layers": 6}, {"num_layers": 3}], 1, "phase 2: target.num_layers 3 leaves no full_att"),
    "seen from the second phase": ([{"num_layers": 9}, {"num_layers": 3}], 2, "phase 2: target.num_layers 3 leaves no"),
    "the third": (
        [{"num_layers": 7}, {"num_layers": 5}, {"num_layers": 2}],
        1,
        "phase 3: target.num_layers 2 leaves no",
    ),
    "as it should be": ([{"num_layers": 6}, {"num_layers": 4}], 1, None),
    "another size": ([{"num_moe_experts": 6}, {"num_moe_experts": 4}], 1, None),
    "top-k": ([{"num_moe_experts": 6}, {"num_moe_experts": 1}], 1, "phase 2: moe_router_topk 2 is larger than num_moe"),
    "a budget before": ([{"params": "300K"}, {"num_layers": 1}], 1, None),
    "a budget that is out of reach": ([{"num_layers": 6}, {"params": 10}], 1, "phase 2: target.params 10 is out of"),
}


@pytest.mark.parametrize("case", STAGES)
def test_stages_to_come_are_checked_before_the_first_is_measured(source: HFCheckpoint, case: str) -> None:
    targets, number, message = STAGES[case]
    schedule = parse_recipe({"version": 1, "phases": [{"target": target} for target in targets]})
    if message is None:
        check_later_phases(schedule, number, source.shape, where="r.yaml")
        return
    with pytest.raises(RecipeError, match=rf"^r\.yaml: {message}"):
        check_later_phases(schedule, number, source.shape, where="r.yaml")


@pytest.mark.parametrize(
    ("method", "then", "refused"),
    [("adjacent_cosine", 4, False), ("adjacent_cosine", 3, True), ("block_influence", 1, False)],
)
def test_after_a_choice_of_statistics_only_what_none_of_them_allows_is_refused(
    source: HFCheckpoint, method: str, then: int, refused: bool
) -> None:
    """Five layers around a run of three begin with three of linear attention; five of any choice may not."""
    phases = [{"target": {"num_layers": 5}, "depth": {"method": method}}, {"target": {"num_layers": then}}]
    schedule = parse_recipe({"version": 1, "phases": phases})
    if not refused:
        check_later_phases(schedule, 1, source.shape, where="r.yaml")
        return
    with pytest.raises(RecipeError, match=r"phase 2: target\.num_layers 3 leaves no full_attention layer"):
        check_later_phases(schedule, 1, source.shape, where="r.yaml")


def test_the_tool_looks_at_later_stages_before_it_measures(
    source: HFCheckpoint, tool: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("version: 1\nphases: [{target: {num_layers: 6}}, {target: {num_layers: 3}}]\n")
    np.save(tmp_path / "d.npy", np.zeros((2, 16), dtype=np.int64))
    arguments = ("--load", source.path, "--recipe", recipe, "--phase", 1, "--calibration-data", tmp_path / "d.npy")
    found = tool("tools/prune_checkpoint.py", *arguments, "--save", tmp_path / "out")
    assert "phase 2: target.num_layers 3 leaves no full_attention layer" in found.error
    assert "calibrating" not in found.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["adjacent_cosine", "block_influence"])
def test_what_only_the_first_layers_would_not_allow_is_pruned(
    source: HFCheckpoint, random_stats: Callable[..., Statistics], tool: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    """Neither the look at the disk before calibration nor the planner takes the first layers for those that stay."""
    recipe, stats = tmp_path / "r.yaml", tmp_path / "stats.safetensors"
    recipe.write_text(f"version: 1\nsource: {source.path}\ntarget: {{num_layers: 3}}\ndepth: {{method: {method}}}\n")
    random_stats(source).save(stats)
    arguments = ("--load", source.path, "--recipe", recipe, "--stats", stats, "--save", tmp_path / "out")
    pruned = tool("tools/prune_checkpoint.py", *arguments)
    assert pruned.code == 0, pruned.stderr
    assert FULL in HFCheckpoint.open(tmp_path / "out").shape.layer_types
    models = find_models(Asked(recipe=recipe))
    assert models.student.num_layers == 3 and FULL in models.student.layer_types
