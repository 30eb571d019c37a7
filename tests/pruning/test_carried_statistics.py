"""Statistics through a plan: the right entries, equal to a new calibration where that must be, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import megatron_slim.mcore

import numpy as np
import pytest
import torch

import megatron_slim as slim
from megatron_slim.architecture.shape import FAMILIES, FULL_ATTENTION
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.pruning.apply import PrunedCheckpoint
from megatron_slim.pruning.calibrate import calibrate
from megatron_slim.pruning.carried_statistics import carried_statistics
from megatron_slim.pruning.pipeline import write_pruned
from megatron_slim.pruning.plan import Plan, make_plan
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe import parse_recipe
from megatron_slim.streaming.fingerprint import fingerprint
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.pruning.conftest import rewritten

RandomStats = Callable[..., Statistics]
INNER = {"moe_ffn_hidden_size": 24, "num_attention_heads": 4}
NEXT_INNER = INNER | {"moe_shared_expert_intermediate_size": 24, "linear_num_value_heads": 4}
GLM_INNER = INNER | {"moe_shared_expert_intermediate_size": 24, "ffn_hidden_size": 40}
INNERS = {"qwen3_moe": INNER, "glm4_moe": GLM_INNER}  # of the others NEXT_INNER


def _teacher(path: Path, family: str) -> HFCheckpoint:
    sizes = {"num_layers": 8, "num_attention_heads": 6, "num_query_groups": 2}
    if family not in INNERS:
        sizes |= {"linear_num_value_heads": 6, "linear_num_key_heads": 2}
    return HFCheckpoint.open(write_tiny_checkpoint(path, tiny_shape(family, **sizes), dtype=torch.float32))


def _plan(source: HFCheckpoint, stats: Statistics, target: dict[str, int], method: str = "merge") -> Plan:
    recipe = parse_recipe({"version": 1, "target": target, "experts": {"method": method}})
    return make_plan(recipe, stats, source.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_is_that_of_what_survived(family: str, random_stats: RandomStats, tmp_path: Path) -> None:
    source = _teacher(tmp_path / "t", family)
    stats = random_stats(source)
    inner = INNERS.get(family, NEXT_INNER)
    plan = _plan(source, stats, {"num_layers": 4, "hidden_size": 32, "num_moe_experts": 4, **inner})
    carried = carried_statistics(stats, plan, "of the student")
    carried.check(plan.target_shape, "of the student")
    assert carried.metadata["carried_from"] == stats.metadata["source_sha256"]
    for new, old in plan.source_blocks.items():
        for place, neuron in enumerate(plan.inner.dense_neurons.get(old, ())):
            assert carried.tensors[f"{new}.mlp.ffn"][place] == stats.tensors[f"{old}.mlp.ffn"][neuron]
        for survivor, group in enumerate(plan.experts.get(old, ())):
            for kind in ("frequency", "reap"):
                key = f"mlp.experts.{kind}"
                assert carried.tensors[f"{new}.{key}"][survivor] == stats.tensors[f"{old}.{key}"][group.base]
            for other, second in enumerate(plan.experts[old]):
                key = "mlp.experts.similarity.router_logits"
                expected = stats.tensors[f"{old}.{key}"][group.base, second.base]
                assert carried.tensors[f"{new}.{key}"][survivor, other] == expected
            for place, neuron in enumerate(plan.inner.neurons[old][survivor]):
                expected = stats.tensors[f"{old}.mlp.experts.ffn"][group.base, neuron]
                assert carried.tensors[f"{new}.mlp.experts.ffn"][survivor, place] == expected
    for place, channel in enumerate(plan.kept_hidden):
        key = "hidden.norm_activation"
        assert carried.tensors[key][place] == stats.tensors[key][channel]


def test_a_plan_that_keeps_all_keeps_every_byte(random_stats: RandomStats, tmp_path: Path) -> None:
    source = _teacher(tmp_path / "t", "qwen3_next")
    stats = random_stats(source)
    carried = carried_statistics(stats, _plan(source, stats, {}), stats.metadata["source_sha256"])
    assert sorted(carried.tensors) == sorted(stats.tensors)
    assert all(np.array_equal(carried.tensors[name], stats.tensors[name]) for name in stats.tensors)


def _without_effect(source: HFCheckpoint, plan: Plan, path: Path) -> HFCheckpoint:
    """The source with weights of zero where the plan removes layers, neurons and heads."""
    shape, tensors = source.shape, {name: source.read(name) for name in source.names}
    survivors = set(plan.source_blocks.values())
    for block in shape.blocks:
        attention = "self_attn.o_proj" if shape.layer_type(block) == FULL_ATTENTION else "linear_attn.out_proj"
        hf = shape.hf_prefix(block)
        output = tensors[f"{hf}.{attention}.weight"]
        experts = range(shape.num_moe_experts) if block in shape.routed_blocks else ()
        downs = {expert: tensors[f"{hf}.mlp.experts.{expert}.down_proj.weight"] for expert in experts}
        of_all = ("mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj", "mlp.down_proj")
        shared = next((tensors[f"{hf}.{name}.weight"] for name in of_all if f"{hf}.{name}.weight" in tensors), None)
        if block not in survivors:
            for tensor in (output, *downs.values(), *([] if shared is None else [shared])):
                tensor.zero_()
            continue
        heads = torch.zeros(6, dtype=torch.bool)
        heads[list(plan.inner.heads[block])] = True
        output.view(output.shape[0], 6, -1)[:, ~heads] = 0
        for expert, kept in enumerate(plan.inner.neurons.get(block, ())):
            _only(downs[expert], kept)
        if shared is not None:
            _only(shared, (plan.inner.shared_neurons | plan.inner.dense_neurons)[block])
    return rewritten(source, tensors, path)


def _only(matrix: torch.Tensor, columns: tuple[int, ...]) -> None:
    others = torch.ones(matrix.shape[1], dtype=torch.bool)
    others[list(columns)] = False
    matrix[:, others] = 0


@pytest.mark.one_case
@pytest.mark.parametrize("layers", [8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_a_new_calibration_where_what_went_had_no_effect(
    family: str, layers: int, random_stats: RandomStats, tmp_path: Path
) -> None:
    source = _teacher(tmp_path / "t", family)
    inner = INNERS.get(family, NEXT_INNER)
    plan = _plan(source, random_stats(source), {"num_layers": layers, **inner}, method="prune")
    quiet = _without_effect(source, plan, tmp_path / "quiet")
    tokens = np.random.default_rng(0).integers(0, 128, (6, 24))
    measured = calibrate(quiet, tokens)
    write_pruned(PrunedCheckpoint(plan, quiet, check_source=False), tmp_path / "student", to="hf", stats=None)
    student = HFCheckpoint.open(tmp_path / "student")
    anew = calibrate(student, tokens)
    carried = carried_statistics(measured, plan, fingerprint(student))
    assert sorted(carried.tensors) == sorted(anew.tensors)
    for name, value in anew.tensors.items():
        if layers < 8 and name.startswith("hidden."):
            continue  # a sum over the norms of all layers, those that went too
        # Sums over fewer terms round otherwise.
        np.testing.assert_allclose(carried.tensors[name], value, rtol=2e-5, atol=2e-6, err_msg=name)


def test_the_command_prunes_with_them_and_refuses_those_of_others(tool: Callable[..., object], tmp_path: Path) -> None:
    _teacher(tmp_path / "t", "qwen3_next")
    for name, layers, experts in (("first", 6, 8), ("second", 4, 4)):
        text = f"version: 1\ntarget: {{num_layers: {layers}, num_moe_experts: {experts}}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 128, (4, 16)))

    def prune(recipe: str, load: str, save: str, *more: object) -> object:
        words = ("--recipe", tmp_path / f"{recipe}.yaml", "--load", tmp_path / load, "--save", tmp_path / save, *more)
        return tool("tools/prune_checkpoint.py", *words, "--json")

    assert prune("first", "t", "s1", "--calibration-data", tmp_path / "tokens.npy").code == 0
    # Stands for the trained student: other weights of the same sizes.
    trained = HFCheckpoint.open(tmp_path / "s1").shape
    write_tiny_checkpoint(tmp_path / "s1-trained", trained, seed=5, dtype=torch.float32)
    assert "measured on another checkpoint" in prune("second", "s1-trained", "s2", "--stats", tmp_path / "s1").stderr
    done = prune("second", "s1-trained", "s2", "--carry-statistics", tmp_path / "s1")
    assert done.code == 0, done.stderr
    before, plan = Statistics.load(tmp_path / "s1"), json.loads((tmp_path / "s1" / "plan.json").read_text())
    kept = Statistics.load(tmp_path / "s2")
    assert kept.metadata["carried_from"] == before.metadata["source_sha256"]
    assert kept.metadata["source_sha256"] == fingerprint(HFCheckpoint.open(tmp_path / "s1-trained"))
    layer = plan["kept_layers"][5]
    assert kept.tensors["model.layers.5.cosine"] == before.tensors[f"model.layers.{layer}.cosine"]
    # Once more: through both plans.
    third = HFCheckpoint.open(tmp_path / "s2").shape
    write_tiny_checkpoint(tmp_path / "s2-trained", third, seed=6, dtype=torch.float32)
    words = ("--recipe", tmp_path / "second.yaml", "--load", tmp_path / "s2-trained", "--save", tmp_path / "plan.json")
    planned = tool("tools/plan_pruning.py", *words, "--carry-statistics", tmp_path / "s2", "--json")
    assert planned.code == 0, planned.stderr
    # From Python, which gives the same plan.
    stats = slim.carry_statistics(tmp_path / "s2", tmp_path / "s2-trained")
    slim.make_plan(slim.read_recipe(tmp_path / "second.yaml"), tmp_path / "s2-trained", stats).save(tmp_path / "same")
    assert (tmp_path / "same").read_bytes() == (tmp_path / "plan.json").read_bytes()

    # Without its MTP block, which training may leave out.
    bare = prune("second", "s1-trained", "s2-bare", "--carry-statistics", tmp_path / "s1", "--without-mtp")
    assert bare.code == 0, bare.stderr
    assert not [name for name in Statistics.load(tmp_path / "s2-bare").tensors if name.startswith("mtp.")]
    # Another plan gives a model of the same sizes, of other layers or experts.
    (tmp_path / "reap.yaml").write_text("version: 1\ntarget: {num_layers: 6}\nexperts: {importance: reap}\n")
    assert prune("reap", "t", "other", "--calibration-data", tmp_path / "tokens.npy").code == 0
    wrong = prune("second", "other", "s3", "--carry-statistics", tmp_path / "s1")
    assert wrong.code == 2 and "another plan gave the model that is to be pruned" in wrong.stderr
    edited = json.loads((tmp_path / "other" / "plan.json").read_text())
    edited["experts"]["model.layers.0"]["kept"] = list(range(8))
    edited["recipe"]["experts"]["importance"] = "output_norm"
    (tmp_path / "other" / "plan.json").write_text(json.dumps(edited))
    changed = prune("second", "s1-trained", "s3", "--carry-statistics", tmp_path / "other")
    assert changed.code == 2 and not (tmp_path / "s3").exists()
    refused = prune("second", "t", "s3", "--carry-statistics", tmp_path / "s1")
    assert refused.code == 2 and "num_layers 8, not 6" in refused.stderr and not (tmp_path / "s3").exists()
    missing = prune("second", "s1-trained", "s3", "--carry-statistics", tmp_path / "t")
    assert missing.code == 2 and "plan.json" in missing.stderr
    both = prune("second", "t", "s3", "--carry-statistics", tmp_path / "s1", "--stats", tmp_path / "s1")
    assert both.code == 2 and "--stats and --carry-statistics exclude one another" in both.stderr
