"""Plans: what is kept, deterministic bytes, and what a plan file must be to be applied."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.errors import SlimError
from megatron_slim.pruning.experts import expert_groups
from megatron_slim.pruning.plan import Plan, make_plan
from megatron_slim.pruning.plan_reader import load_plan, parse_plan
from megatron_slim.pruning.statistics import Statistics, hidden_key, layer_key
from megatron_slim.recipe import parse_recipe

TARGET = {"num_layers": 5, "hidden_size": 48, "num_moe_experts": 4}
PlanFor = Callable[..., Plan]


def _cosine(layer: int) -> str:
    return layer_key(f"model.layers.{layer}", "cosine")


def test_same_inputs_same_bytes(plan_for: PlanFor, tmp_path: Path) -> None:
    plan = plan_for(TARGET)
    assert plan.to_json() == plan_for(TARGET).to_json() != plan_for(TARGET, seed=1).to_json()
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == load_plan(tmp_path) == plan
    assert load_plan(tmp_path / "plan.json").to_json() == plan.to_json() == (tmp_path / "plan.json").read_text()


def test_hidden_dimensions_are_the_most_important_ones_in_order(
    source: HFCheckpoint, random_stats: Callable[..., Statistics]
) -> None:
    stats = random_stats(source)
    importance = np.zeros(64, dtype=np.float32)
    importance[[60, 3, 17]] = [1.0, 3.0, 2.0]
    stats = Statistics({**stats.tensors, hidden_key("norm_activation"): importance}, stats.metadata)
    plan = make_plan(parse_recipe({"version": 1, "target": {"hidden_size": 8}}), stats, source.shape)
    assert plan.kept_hidden == (0, 1, 2, 3, 4, 5, 17, 60)


def test_last_keeps_the_first_layers(plan_for: PlanFor) -> None:
    plan = plan_for({"num_layers": 5})
    assert plan.kept_layers == (0, 1, 2, 3, 4)
    assert plan.target_shape.layer_types == plan.source_shape.layer_types[:5]
    assert list(plan.experts) == [*(f"model.layers.{i}" for i in range(5)), "mtp.layers.0"]


@pytest.mark.parametrize(("peak", "kept"), [(1, (0, 4, 5, 6, 7)), (4, (0, 1, 2, 3, 7)), (5, (0, 1, 2, 3, 4))])
def test_adjacent_cosine_drops_the_run_that_changes_least(
    peak: int, kept: tuple[int, ...], source: HFCheckpoint, random_stats: Callable[..., Statistics]
) -> None:
    """SlimQwen A.4; layer 0 has no layer before it, and a run from 6 or 7 would be too short."""
    stats = random_stats(source)
    cosines = {_cosine(layer): np.float32(0.99) * np.ones((), np.float32) for layer in (0, 6, 7)}
    cosines |= {_cosine(layer): np.asarray(0.9 if layer == peak else 0.1, np.float32) for layer in range(1, 6)}
    stats = Statistics({**stats.tensors, **cosines}, stats.metadata)
    recipe = parse_recipe({"version": 1, "target": {"num_layers": 5}, "depth": {"method": "adjacent_cosine"}})
    plan = make_plan(recipe, stats, source.shape)
    assert plan.kept_layers == kept
    assert plan.target_shape.layer_types == tuple(source.shape.layer_types[layer] for layer in kept)
    assert plan.source_blocks["model.layers.4"] == f"model.layers.{kept[4]}"


def test_every_block_has_groups_of_its_own_importance(
    source: HFCheckpoint, random_stats: Callable[..., Statistics], plan_for: PlanFor
) -> None:
    stats = random_stats(source)
    for importance in ("frequency", "soft_logits", "reap"):
        for similarity in ("router_weights", "router_logits", "expert_vectors"):
            plan = plan_for(TARGET, importance=importance, similarity=similarity)
            for block in ("model.layers.3", "mtp.layers.0"):
                expected = expert_groups(
                    stats.tensors[f"{block}.mlp.experts.{importance}"].astype(np.float64),
                    stats.tensors[f"{block}.mlp.experts.similarity.{similarity}"].astype(np.float64),
                    4,
                    plan.recipe.experts,
                )
                assert plan.experts[block] == expected


def test_an_empty_target_keeps_everything(plan_for: PlanFor) -> None:
    plan = plan_for({})
    assert plan.target_shape == plan.source_shape
    assert plan.kept_layers == tuple(range(8)) and plan.kept_hidden == tuple(range(64))
    assert all(len(group.members) == 1 for groups in plan.experts.values() for group in groups)


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        *parents, last = path
        for key in parents:
            document = document[key]
        if to is None:
            del document[last]
        else:
            document[last] = to

    return change


BROKEN = {
    "no version": (_set("version", to=None), "not a plan of version 2"),
    "missing key": (_set("kept_hidden", to=None), "missing key kept_hidden"),
    "unknown key": (_set("more", to=1), "unknown key more"),
    "recipe": (_set("recipe", "experts", "method", to="merged"), "did you mean 'merge'"),
    "shape": (_set("source", "shape", "num_layers", to="8"), "shape.num_layers '8'"),
    "shape keys": (_set("target", "shape", "vocab_size", to=None), "not an object with all sizes"),
    "impossible shape": (_set("source", "shape", "num_query_groups", to=3), "is not a multiple of num_query_groups 3"),
    "hash": (_set("stats", "sha256", to="x"), "is not a hash"),
    "layer twice": (_set("kept_layers", to=[0, 1, 1, 2, 3]), "kept_layers is not strictly ascending"),
    "too few": (_set("kept_layers", to=[0, 1]), "kept_layers has 2 entries, not 5"),
    "no such index": (_set("kept_hidden", 47, to=64), r"kept_hidden has entries outside 0..63"),
    "no integer": (_set("kept_hidden", 0, to=0.0), "kept_hidden is not a list of integers"),
    "other target": (_set("target", "shape", "moe_router_topk", to=1), "target.shape is not what recipe"),
    "block": (_set("experts", "mtp.layers.0", to=None), "not given for exactly the blocks"),
    "groups": (_set("experts", "model.layers.0", "merged", to=None), "are not an object with 'kept' and 'merged'"),
    "kept": (_set("experts", "model.layers.0", "kept", to=[0, 1, 2]), "model.layers.0: kept has 3 entries, not 4"),
    "base": (_set("experts", "model.layers.0", "merged", to={"9": {"members": [1], "weights": [1]}}), "not kept"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_plan_is_refused(name: str, plan_for: PlanFor) -> None:
    change, message = BROKEN[name]
    document = json.loads(plan_for(TARGET).to_json())
    change(document)
    with pytest.raises(SlimError, match=message):
        parse_plan(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g["weights"].pop(), "no weight for every member"),
        (lambda g: g["weights"].__setitem__(0, 2.0), "do not sum to 1"),
        (lambda g: g["weights"].__setitem__(0, -1.0), "negative or not finite"),
        (lambda g: g["members"].reverse(), "not ascending expert indices"),
        (lambda g: g.clear(), "not an object with 'members' and 'weights'"),
    ],
)
def test_broken_group_is_refused(change: Callable[[Any], object], message: str, plan_for: PlanFor) -> None:
    document = json.loads(plan_for(TARGET).to_json())
    merged = document["experts"]["model.layers.0"]["merged"]
    change(merged[next(iter(merged))])
    with pytest.raises(SlimError, match=message):
        parse_plan(document)


def test_a_member_of_two_groups_is_refused(plan_for: PlanFor) -> None:
    document = json.loads(plan_for(TARGET, method="merge").to_json())
    block = document["experts"]["model.layers.0"]
    gone = next(i for i in range(8) if i not in block["kept"])
    for base in block["kept"][:2]:
        block["merged"][str(base)] = {"members": sorted([base, gone]), "weights": [0.5, 0.5]}
    block["merged"] = {k: v for k, v in block["merged"].items() if int(k) in block["kept"][:2]}
    with pytest.raises(SlimError, match="shares a member with another group"):
        parse_plan(document)


def test_files_that_are_not_plans(tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="no such file"):
        load_plan(tmp_path / "plan.json")
    for text in ("", "{", "[]", "null", '{"version": 1}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(SlimError, match=r"plan\.json"):
            load_plan(tmp_path / "plan.json")


def test_planning_needs_no_torch() -> None:
    code = "import sys, megatron_slim.pruning.plan_reader; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_report_says_when_attention_loses_its_period(
    source: HFCheckpoint, random_stats: Callable[..., Statistics]
) -> None:
    from megatron_slim.pruning.report import markdown, summarise

    """Of clients' own code: these read nothing but the period, and those that read the types of the layers load it."""
    for peak, lost in ((4, True), (5, False)):
        cosines = {_cosine(layer): np.asarray(float(layer == peak), np.float32) for layer in range(8)}
        stats = random_stats(source)
        recipe = parse_recipe({"version": 1, "target": {"num_layers": 5}, "depth": {"method": "adjacent_cosine"}})
        plan = make_plan(recipe, Statistics({**stats.tensors, **cosines}, stats.metadata), source.shape)
        text = markdown(plan, summarise(plan.source_shape, 2), summarise(plan.target_shape, 1))
        for client in ("SGLang", "mlx-lm", "mcore-bridge", "layer_types"):
            assert (client in text) == lost
