"""Experts allocated to layers by loss: measured, chosen, planned, applied, and read back."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import megatron_slim as slim
from megatron_slim.architecture.hf_config import OWN_COUNTS, shape_from_hf_config
from megatron_slim.architecture.parallelism import layout_violations
from megatron_slim.architecture.shape import FAMILIES, ModelShape
from megatron_slim.architecture.table import count_parameters, weights
from megatron_slim.checkpoint.convert import same_bytes
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.errors import PlanError, RecipeError, ShapeError
from megatron_slim.evaluation.perplexity import evaluate
from megatron_slim.pruning.allocation import allocate, violations
from megatron_slim.pruning.apply import PrunedCheckpoint
from megatron_slim.pruning.plan import Plan, make_plan
from megatron_slim.pruning.plan_reader import parse_plan
from megatron_slim.pruning.recipe_checks import check_later_phases, check_recipe
from megatron_slim.pruning.sensitivity import expert_sensitivity
from megatron_slim.pruning.target import shape_before_statistics, target_shape
from megatron_slim.recipe import parse_recipe
from megatron_slim.testing import tiny_hf_config, tiny_shape, write_tiny_checkpoint

Tool = Callable[..., Any]
UNEQUAL = {"model.layers.1": 0.4, "model.layers.2": 0.1, "model.layers.3": 0.02}  # layer 0 is dense in GLM


def recipe(count: int = 4, method: str = "merge", **experts: Any) -> dict[str, Any]:
    section = {"method": method, "allocation": "loss", **experts}
    return {"version": 1, "target": {"num_moe_experts": count}, "experts": section}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFCheckpoint:
    path = tmp_path_factory.mktemp("model") / "hf"
    return HFCheckpoint.open(write_tiny_checkpoint(path, tiny_shape(request.param), dtype=torch.float32))


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 128, (3, 20))


def planned(model: HFCheckpoint, stats: Any) -> Plan:
    """With what layers lose given; those that are not named lose nothing."""
    routed = [block for block in model.shape.routed_blocks if block.startswith("model.")]
    found = {block: UNEQUAL.get(block, 0.0) for block in routed}
    return make_plan(parse_recipe(recipe()), stats, model.shape, sensitivity=lambda plan: found)


# --- which numbers ---


def test_it_is_what_trying_all_finds() -> None:
    """The sum of the losses is the least there is, for every total, by trying all numbers."""
    rng = np.random.default_rng(0)
    for multiple, uniform in ((1, 3), (1, 4), (2, 4)):
        importance = {name: rng.random(8) for name in "abc"}
        losses = {"a": 0.5, "b": 0.2, "c": 0.05}
        grid = [range(2, 9, multiple)] * 3
        possible = [counts for counts in itertools.product(*grid) if sum(counts) == 3 * uniform]
        best = min(_loss(losses, importance, uniform, counts) for counts in possible)
        found = allocate(losses, importance, uniform, least=2, multiple=multiple)
        assert _loss(losses, importance, uniform, tuple(found.values())) == pytest.approx(best, rel=1e-12)
        assert not violations(list(found.values()), uniform, multiple)


def test_within_numbers_it_is_what_trying_all_finds() -> None:
    """No block keeps more than it may; where nothing is given, all it has."""
    rng = np.random.default_rng(0)
    importance = {name: rng.random(8) for name in "abc"}
    losses, most = {"a": 0.5, "b": 0.2, "c": 0.05}, {"a": 5, "b": 8, "c": 4}
    grid = [range(2, limit + 1) for limit in most.values()]
    best = min(_loss(losses, importance, 4, each) for each in itertools.product(*grid) if sum(each) == 12)
    found = allocate(losses, importance, 4, least=2, most=most)
    assert all(found[name] <= most[name] for name in "abc") and sum(found.values()) == 12
    assert _loss(losses, importance, 4, tuple(found.values())) == pytest.approx(best, rel=1e-12)
    assert allocate(losses, importance, 4, least=2, most={"c": 4})["a"] > 5  # so that the limit of "a" counts
    with pytest.raises(ValueError, match="no numbers from 2 on"):
        allocate(losses, importance, 6, least=2, most=most)


def _loss(losses: dict[str, float], importance: dict[str, Any], uniform: int, counts: tuple[int, ...]) -> float:
    """The sum that is to be least."""
    total = 0.0
    for (name, values), count in zip(importance.items(), counts, strict=True):
        ordered = np.sort(values)[::-1]
        total += losses[name] * float(ordered[count:].sum() / ordered[uniform:].sum())
    return total


def test_bounds_and_layers_that_lose_nothing() -> None:
    importance = dict.fromkeys("ab", np.ones(6))
    assert allocate({"a": 1.0, "b": -0.3}, importance, 4, least=2) == {"a": 6, "b": 2}
    assert allocate({"a": 0.0, "b": 0.0}, importance, 3, least=3) == {"a": 3, "b": 3}
    # An importance of which nothing goes at the uniform number.
    assert allocate({"a": 1.0, "b": 1.0}, {"a": np.eye(6)[0], "b": np.ones(6)}, 3, least=2) == {"a": 2, "b": 4}
    assert violations([4, 3], 4, 2) == ["3 experts are not a multiple of 2", "7 experts in 2 layers, not 4 on average"]


def test_what_cannot_be_allocated() -> None:
    importance = dict.fromkeys("ab", np.ones(6))
    for losses, uniform, least, multiple, message in (
        ({"a": math.nan, "b": 1.0}, 4, 2, 1, "losses are not all numbers"),
        ({"a": math.inf, "b": 1.0}, 4, 2, 1, "losses are not all numbers"),
        ({"a": 1.0, "b": 1.0}, 3, 4, 1, "no numbers from 4 on, multiples of 1, are 3 on average"),
        ({"a": 1.0, "b": 1.0}, 7, 2, 1, "no numbers from 2 on, multiples of 1, are 7 on average"),
        ({"a": 1.0, "b": 1.0}, 3, 2, 4, "no numbers from 2 on, multiples of 4, are 3 on average"),
    ):
        with pytest.raises(ValueError, match=message):
            allocate(losses, importance, uniform, least=least, multiple=multiple)


@pytest.mark.one_case
@pytest.mark.parametrize("method", ["prune", "merge"])
def test_losses_of_layers_are_those_of_their_models(
    method: str, model: HFCheckpoint, random_stats: Any, samples: np.ndarray
) -> None:
    """Of each layer, against an evaluation of the model whose experts go in that layer alone."""
    document = {"version": 1, "target": {"num_moe_experts": 3}, "experts": {"method": method}}
    whole = make_plan(parse_recipe(document), random_stats(model), model.shape)
    found = expert_sensitivity(model, whole, samples)
    assert list(found) == [block for block in model.shape.routed_blocks if block.startswith("model.")]
    own = evaluate(model, samples, dtype=torch.float32).loss
    everything = make_plan(parse_recipe({"version": 1, "target": {}}), random_stats(model), model.shape)
    for block, added in found.items():
        layers = tuple(
            0 if kinds[1] != "moe" else 3 if f"model.layers.{layer}" == block else 8
            for layer, kinds in enumerate(model.shape.sublayers)
        )
        only = dataclasses.replace(
            everything,
            target_shape=model.shape.replace(experts_per_layer=layers),
            experts={**everything.experts, block: whole.experts[block]},
        )
        alone = evaluate(PrunedCheckpoint(only, model, check_source=False), samples, dtype=torch.float32).loss
        assert added == pytest.approx(alone - own, abs=2e-6)


def test_layers_are_measured_with_the_top_k_of_the_target(
    random_stats: Any, samples: np.ndarray, tmp_path: Path
) -> None:
    """Tokens of the source visit more experts than are to be left."""
    shape = tiny_shape("qwen3_moe", moe_router_topk=4)
    model = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "hf", shape, dtype=torch.float32))
    document = {**recipe(), "target": {"num_moe_experts": 3, "moe_router_topk": 2}}
    plan = slim.make_plan(parse_recipe(document), model, random_stats(model), samples=samples)
    assert set(plan.allocation) == set(shape.blocks) and sum(plan.target_shape.expert_counts.values()) == 3 * 4
    assert plan.target_shape.moe_router_topk == 2


# --- the model ---


def test_plan_checkpoint_and_way_back(model: HFCheckpoint, random_stats: Any, tmp_path: Path) -> None:
    stats = random_stats(model)
    plan = planned(model, stats)
    counts = plan.target_shape.experts_per_layer
    assert sum(counts) == 4 * sum(map(bool, counts)) and len(set(counts) - {0}) > 1
    assert plan.target_shape.expert_counts == {
        new: len(plan.experts[old]) for new, old in plan.source_blocks.items() if old in plan.experts
    }
    assert parse_plan(json.loads(plan.to_json())) == plan
    slim.prune(model, plan, tmp_path / "out", statistics=stats)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["per_layer_num_experts"] == list(counts)
    assert OWN_COUNTS in (tmp_path / "out" / "pruning_report.md").read_text()
    slim.convert(tmp_path / "out", tmp_path / "dist", to="torch_dist")
    slim.convert(tmp_path / "dist", tmp_path / "back", to="hf", expert_storage="fused")
    out, back = slim.open_checkpoint(tmp_path / "out"), slim.open_checkpoint(tmp_path / "back")
    assert out.shape == back.shape == slim.open_checkpoint(tmp_path / "dist").shape == plan.target_shape
    assert all(same_bytes(out.read(name), back.read(name)) for name in out.names)
    parameters = sum(row.numel(out.shape) for row in weights(out.shape) if not row.buffer)
    assert count_parameters(out.shape).total == parameters


def test_transformers_computes_the_same_with_each_layers_own_experts(
    model: HFCheckpoint, random_stats: Any, samples: np.ndarray, tmp_path: Path
) -> None:
    """It cannot be asked for them by config.json: its layers are replaced by hand."""
    from transformers import AutoConfig, AutoModelForCausalLM

    plan = planned(model, random_stats(model))
    slim.prune(model, plan, tmp_path / "out")
    tensors = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    config = AutoConfig.from_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for layer, count in zip(theirs.model.layers, plan.target_shape.experts_per_layer, strict=True):
        if count:
            setattr(config, plan.target_shape.family.keys["num_moe_experts"], count)
            layer.mlp = type(layer.mlp)(config).eval()
    _load(theirs, tensors, plan.target_shape)
    ids = torch.from_numpy(samples)
    with torch.no_grad():
        expected = float(theirs(ids, labels=ids).loss)
    assert slim.evaluate(tmp_path / "out", samples).loss == pytest.approx(expected, rel=1e-6)


def _load(theirs: Any, tensors: dict[str, torch.Tensor], shape: ModelShape) -> None:
    """Tensors of files into transformers' model, whose experts are fused."""
    known = theirs.state_dict()
    state = {name: tensor for name, tensor in tensors.items() if ".experts." not in name and name in known}
    for layer, count in enumerate(shape.experts_per_layer):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = [{p: tensors[f"{prefix}.{n}.{p}_proj.weight"] for p in ("gate", "up", "down")} for n in range(count)]
        if parts:
            state[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat((each["gate"], each["up"])) for each in parts])
            state[f"{prefix}.down_proj"] = torch.stack([each["down"] for each in parts])
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not missing and not unexpected


def test_it_is_pruned_again_but_for_its_experts(model: HFCheckpoint, random_stats: Any, tmp_path: Path) -> None:
    """Layers that stay keep their experts; equally many for all is possible up to what the poorest has."""
    slim.prune(model, planned(model, random_stats(model)), tmp_path / "out")
    source = HFCheckpoint.open(tmp_path / "out")
    stats = random_stats(source)
    again = make_plan(parse_recipe({"version": 1, "target": {"hidden_size": 48}}), stats, source.shape)
    assert again.target_shape.experts_per_layer == source.shape.experts_per_layer
    slim.prune(source, again, tmp_path / "narrow")
    assert HFCheckpoint.open(tmp_path / "narrow").shape == again.target_shape
    least = min(source.shape.expert_counts.values())
    uniform = make_plan(parse_recipe({"version": 1, "target": {"num_moe_experts": least}}), stats, source.shape)
    assert uniform.target_shape.experts_per_layer == () and uniform.target_shape.num_moe_experts == least
    with pytest.raises(RecipeError, match=rf"num_moe_experts {least + 1} is larger than the source's {least}"):
        check_recipe(parse_recipe({"version": 1, "target": {"num_moe_experts": least + 1}}), source.shape)
    with pytest.raises(RecipeError, match="different numbers of experts already"):
        check_recipe(parse_recipe(recipe(least)), source.shape)


def test_the_command_measures_on_calibration_data(tool: Tool, samples: np.ndarray, tmp_path: Path) -> None:
    """Or on other data, without which statistics alone are not enough."""
    source = write_tiny_checkpoint(tmp_path / "hf", tiny_shape("qwen3_moe"), dtype=torch.float32)
    np.save(tmp_path / "tokens.npy", samples)
    (tmp_path / "r.yaml").write_text(json.dumps(recipe()))
    given = ("--load", source, "--recipe", tmp_path / "r.yaml", "--save")
    data = ("--calibration-data", tmp_path / "tokens.npy")
    done = tool("tools/prune_checkpoint.py", *given, tmp_path / "out", *data, "--json")
    assert done.code == 0, done.stderr
    assert "do not load layers with different numbers of experts" in done.stderr
    assert HFCheckpoint.open(tmp_path / "out").shape.experts_per_layer
    stats = ("--stats", tmp_path / "out")
    refused = tool("tools/plan_pruning.py", *given, tmp_path / "p.json", *stats)
    assert refused.code == 2 and "needs data to measure layers on; give --search-data" in refused.error
    search = ("--search-data", tmp_path / "tokens.npy")
    made = tool("tools/plan_pruning.py", *given, tmp_path / "p.json", *stats, *search)
    assert made.code == 0, made.stderr
    assert (tmp_path / "p.json").read_bytes() == (tmp_path / "out" / "plan.json").read_bytes()
    shown = tool("tools/show_plan.py", tmp_path / "p.json", *stats, "--save", tmp_path / "page")
    assert shown.code == 0, shown.stderr


# --- what is refused ---


def test_recipes_that_cannot_be_met() -> None:
    shape = tiny_shape()
    for section, message in (
        ({"multiple": 3}, "num_moe_experts 4 of the target is not a multiple of 3"),
        ({"allocation": "uniform", "multiple": 2}, "experts.multiple 2 without experts.allocation loss"),
    ):
        with pytest.raises(RecipeError, match=message):
            check_recipe(parse_recipe(recipe(**section)), shape)
    with pytest.raises(RecipeError, match=r"without target\.num_moe_experts"):
        check_recipe(parse_recipe({**recipe(), "target": {}}), shape)
    with pytest.raises(RecipeError, match="needs data to measure layers on"):
        make_plan(parse_recipe(recipe()), None, shape)  # type: ignore[arg-type]
    phases: list[dict[str, Any]] = [{"target": {"num_moe_experts": 6}}, {"target": {"num_moe_experts": 4}}]
    schedule = {"version": 1, "experts": {"allocation": "loss"}, "phases": phases}
    with pytest.raises(RecipeError, match="phase 2 prunes experts that phase 1 allocates by loss"):
        check_later_phases(parse_recipe(schedule), 1, shape, where="r")
    phases[0]["experts"] = {"allocation": "uniform"}
    check_later_phases(parse_recipe(schedule), 1, shape, where="r")
    phases[:] = [{"target": {"num_moe_experts": 4}}, {"target": {"hidden_size": 48}}]
    phases[1]["experts"] = {"allocation": "uniform", "num_groups": 2}
    with pytest.raises(
        RecipeError, match="num_groups 2 of phase 2 does not divide the numbers of experts that phase 1"
    ):
        check_later_phases(parse_recipe(schedule), 1, shape, where="r")
    phases[0]["experts"] = {"multiple": 2}
    phases[1]["experts"]["multiple"] = 1
    check_later_phases(parse_recipe(schedule), 1, shape, where="r")


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_a_budget_is_kept_with_a_multiple(multiple: int, random_stats: Any, tmp_path: Path) -> None:
    source = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "hf", tiny_shape(num_moe_experts=10)))
    stats = random_stats(source)
    bound = count_parameters(tiny_shape(num_moe_experts=9), include_mtp=False).total
    document = {
        "version": 1,
        "target": {"params": bound},
        "search": {"axes": ["num_moe_experts"]},
        "experts": {"allocation": "loss", "multiple": multiple},
    }
    losses = dict(zip(source.shape.blocks, (0.5, 0.01, 0.02, 0.03), strict=False))
    plan = make_plan(parse_recipe(document), stats, source.shape, sensitivity=lambda plan: losses)
    uniform = {1: 9, 2: 8, 4: 8}[multiple]
    counts = plan.target_shape.expert_counts
    assert counts["mtp.layers.0"] == uniform and sum(counts.values()) == 5 * uniform
    assert not [count for count in counts.values() if count % multiple]
    assert count_parameters(plan.target_shape, include_mtp=False).total <= bound
    assert parse_plan(json.loads(plan.to_json())) == plan
    none = {**document, "experts": {"allocation": "loss", "multiple": 11}}
    with pytest.raises(RecipeError, match="no number of experts from 2 to 10 is a multiple of 11"):
        check_recipe(parse_recipe(none), source.shape)


def test_sizes_before_layers_are_measured_are_unequal_too() -> None:
    """So that what cannot work with any allocation is refused before hours of work."""
    layers = tuple(range(4))
    for multiple, wrong in ((1, True), (2, False)):
        asked = parse_recipe(recipe(4, multiple=multiple))
        found = shape_before_statistics(asked, tiny_shape(), layers)
        assert sum(found.experts_per_layer) == 16 and bool(layout_violations(found, ep=2)) is wrong
    same = shape_before_statistics(parse_recipe(recipe(4, multiple=4)), tiny_shape(), layers)
    assert same == target_shape(parse_recipe({"version": 1, "target": {"num_moe_experts": 4}}), tiny_shape(), layers)
    glm = shape_before_statistics(parse_recipe(recipe(4)), tiny_shape("glm4_moe"), layers)
    assert glm.experts_per_layer == (0, 5, 3, 4)


def test_equal_numbers_are_no_numbers_of_single_layers() -> None:
    """Wherever they come from, such as depth that leaves layers alike."""
    counts = (4, 4, 4, 4)
    shape = tiny_shape(mtp_num_layers=0, num_moe_experts=5, experts_per_layer=counts)
    assert shape.simplest() == tiny_shape(mtp_num_layers=0, num_moe_experts=4)
    with_mtp = tiny_shape(num_moe_experts=5, experts_per_layer=counts)
    assert with_mtp.simplest() == with_mtp


def test_plans_that_were_edited(random_stats: Any, tmp_path: Path) -> None:
    source = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "hf", tiny_shape()))
    document = planned(source, random_stats(source)).to_dict()
    shape = document["target"]["shape"]
    for change, message in (
        ({"allocation": {}}, "allocation and experts.allocation of the recipe contradict each other"),
        ({"allocation": [1]}, "allocation is not an object with a loss for every layer"),
        ({"allocation": {"foo": 1.0}}, "allocation is not an object with a loss for every layer"),
        ({"allocation": {**document["allocation"], "mtp.layers.0": 1.0}}, "allocation is not an object with a loss"),
        ({"target": {"shape": {**shape, "experts_per_layer": [4, 4, 4, 5]}}}, "17 experts in 4 layers, not 4"),
    ):
        with pytest.raises(PlanError, match=message):
            parse_plan({**document, **change})


def test_counts_in_a_config_json() -> None:
    """Models of RCO are read by the same key; one that says the same for all says nothing."""
    config = tiny_hf_config(tiny_shape())
    assert shape_from_hf_config({**config, "per_layer_num_experts": [8] * 4}, mtp_num_layers=1) == tiny_shape()
    found = shape_from_hf_config({**config, "per_layer_num_experts": [8, 6, 4, 8]}, mtp_num_layers=1)
    assert list(found.expert_counts.values()) == [8, 6, 4, 8, 8]
    refused = "experts_per_layer 6 do not divide by expert parallel size 4 (plan with experts.multiple)"
    assert layout_violations(found, ep=4) == [refused]
    for value, message in (
        ([8, 6], "experts_per_layer has 2 entries for num_layers 4"),
        ([8, 1, 8, 8], "layer 1 has 1 experts, fewer than moe_router_topk 2"),
        ([8, 0, 8, 8], "layer 1 has 0, and is routed"),
        ([8, -1, 8, 8], "are not all integers of zero or more"),
        (8, "per_layer_num_experts 8 is not a list"),
    ):
        with pytest.raises(ShapeError) as caught:
            shape_from_hf_config({**config, "per_layer_num_experts": value}, mtp_num_layers=1)
        assert message in str(caught.value)
