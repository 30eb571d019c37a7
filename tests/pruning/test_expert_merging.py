"""Every way to merge experts, through the tool: against float64, and experts that are permutations of one another."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint, same_bytes
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.errors import SlimError
from megatron_slim.pruning.align import fixed_point, matching_neurons
from megatron_slim.pruning.apply import PrunedCheckpoint
from megatron_slim.pruning.plan import make_plan
from megatron_slim.pruning.plan_reader import load_plan, parse_plan
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe import parse_recipe

PRUNE = "tools/prune_checkpoint.py"
MATRICES = ("gate_proj", "up_proj", "down_proj")
Stats = Callable[..., Statistics]


def recipe_of(experts: dict[str, Any], **target: int) -> dict[str, Any]:
    return {"version": 1, "target": target, "experts": experts}


def reference(importance: Any, similarity: Any, survivors: int, experts: dict[str, Any]) -> dict[int, dict[int, float]]:
    """Weights of every survivor's members, from the definitions, expert by expert."""
    count, runs = len(importance), experts.get("num_groups", 1)
    found: dict[int, dict[int, float]] = {}
    for run in range(runs):
        order = sorted(range(run * count // runs, (run + 1) * count // runs), key=lambda i: (-importance[i], i))
        kept, gone = order[: survivors // runs], sorted(order[survivors // runs :])
        bases = kept[len(kept) // 2 :] if experts["method"] == "partial_preservation" else kept
        groups = {base: [base] for base in kept}
        for expert in gone if experts["method"] != "prune" else []:
            groups[max(bases, key=lambda base: (similarity[expert][base], -base))].append(expert)
        for base, members in groups.items():
            total = sum(float(importance[i]) for i in members)
            weights = {i: importance[i] / total if total else 1 / len(members) for i in members}
            if experts.get("weighting") == "pairwise" and total:
                weights = {base: 1.0}
                for i in members[1:]:
                    share = importance[i] / (importance[i] + importance[base])
                    weights = {k: w * (1 - share) for k, w in weights.items()} | {i: share}
            found[base] = weights
    return found


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("weighting", ["group", "pairwise"])
@pytest.mark.parametrize("method", ["merge", "partial_preservation"])
def test_merged_experts_are_the_means_of_the_definition(
    method: str, weighting: str, num_groups: int, tool: Any, source: HFCheckpoint, random_stats: Stats, tmp_path: Path
) -> None:
    """Both formats, every block, the MTP block among them."""
    experts = {"method": method, "weighting": weighting, "num_groups": num_groups}
    stats = random_stats(source)
    stats.save(tmp_path / "stats")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_of(experts, num_layers=4, num_moe_experts=4)))
    for to in ("hf", "torch_dist"):
        command = (PRUNE, "--load", source.path, "--stats", tmp_path / "stats", "--recipe", tmp_path / "recipe.yaml")
        assert tool(*command, "--to", to, "--save", tmp_path / to).code == 0
    hf, dist = open_checkpoint(tmp_path / "hf"), open_checkpoint(tmp_path / "torch_dist")
    for block in ("model.layers.0", "model.layers.3", "mtp.layers.0"):
        prefix = f"{block}.mlp.experts"
        importance = stats.tensors[f"{prefix}.soft_logits"].astype(np.float64)
        similarity = stats.tensors[f"{prefix}.similarity.router_weights"]
        groups = reference(importance, similarity, 4, experts)
        gate = f"{block}.mlp.gate.weight"
        assert same_bytes(hf.read(gate), source.read(gate)[sorted(groups)])
        for new, base in enumerate(sorted(groups)):
            for matrix in MATRICES:
                name = f"{prefix}.{new}.{matrix}.weight"
                assert same_bytes(hf.read(name), dist.read(name))
                parts = {i: source.read(f"{prefix}.{i}.{matrix}.weight").double() for i in groups[base]}
                exact = sum((groups[base][i] * part for i, part in parts.items()), torch.zeros(()).double())
                # Half a unit in the last place of bf16's 8 bits, and the rounding of the float32 sum.
                error = (hf.read(name).double() - exact).abs()
                largest = sum((part.abs() for part in parts.values()), torch.zeros(()).double())
                assert bool((error <= 2.0**-8 * exact.abs() + 2.0**-22 * largest).all())


def scores_of(base: Tensor, member: Tensor) -> Any:
    return (base.double() @ member.double().T).numpy()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("kept", "neurons"), [(5, 5), (3, 5)])
def test_neurons_match_as_brute_force_says(seed: int, kept: int, neurons: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, member = (torch.randn(n, 12, generator=generator).bfloat16() for n in (kept, neurons))
    scores = scores_of(base, member)
    best = max(itertools.permutations(range(neurons), kept), key=lambda p: float(scores[range(kept), p].sum()))
    assert matching_neurons(base, member).tolist() == list(best)


@pytest.mark.parametrize("columns", [1, 12, 6144])
def test_inner_products_are_whole_numbers_that_float64_holds(columns: int) -> None:
    a, b = (fixed_point(torch.randn(4, columns, dtype=torch.float64)) for _ in range(2))
    exact = [[sum(int(x) * int(y) for x, y in zip(p, q, strict=True)) for q in b.tolist()] for p in a.tolist()]
    assert (a @ b.T).tolist() == exact == (a.flip(1) @ b.flip(1).T).tolist()


def test_weights_that_are_zero_or_not_finite_do_not_stop_it() -> None:
    assert matching_neurons(torch.zeros(3, 6), torch.zeros(3, 6)).tolist() == [0, 1, 2]
    broken = torch.eye(3).masked_fill(torch.eye(3) == 0, float("nan"))
    assert matching_neurons(torch.eye(3)[[2, 0, 1]], broken).tolist() == [2, 0, 1]


@pytest.fixture
def copies(source: HFCheckpoint, tmp_path: Path) -> HFCheckpoint:
    """``source`` with experts that are all the first of their block, their hidden neurons permuted, router rows too."""
    rng = torch.Generator().manual_seed(5)
    tensors = {name: source.read(name) for name in source.names}
    for block in source.shape.blocks:
        for expert in range(1, source.shape.num_moe_experts):
            order = torch.randperm(source.shape.moe_ffn_hidden_size, generator=rng)
            for matrix in MATRICES:
                first = tensors[f"{block}.mlp.experts.0.{matrix}.weight"]
                permuted = first[:, order] if matrix == "down_proj" else first[order]
                tensors[f"{block}.mlp.experts.{expert}.{matrix}.weight"] = permuted.contiguous()
    (tmp_path / "copies").mkdir()
    save_file(tensors, tmp_path / "copies" / "model.safetensors")
    (tmp_path / "copies" / "config.json").write_text(json.dumps(source.config))
    return HFCheckpoint.open(tmp_path / "copies")


def logits_of(path: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model(torch.arange(12)[None]).logits
    return logits


def test_aligned_copies_of_an_expert_merge_into_it(
    tool: Any, copies: HFCheckpoint, random_stats: Stats, tmp_path: Path
) -> None:
    """Bit for bit; so the model computes what it did when its router is one that sends every token to equal experts."""
    for align in ("weights", "none"):
        recipe = parse_recipe(recipe_of({"method": "merge", "align": align}, num_moe_experts=4))
        plan = make_plan(recipe, random_stats(copies), copies.shape)
        plan.save(tmp_path / f"{align}.json")
        out = tmp_path / align
        assert tool(PRUNE, "--load", copies.path, "--plan", tmp_path / f"{align}.json", "--save", out).code == 0
        merged = HFCheckpoint.open(out)
        equal = []
        for block, groups in plan.experts.items():
            for new, group in enumerate(groups):
                for name in (f"{block}.mlp.experts.{{}}.{matrix}.weight" for matrix in MATRICES):
                    equal.append(same_bytes(merged.read(name.format(new)), copies.read(name.format(group.base))))
        assert all(equal) == (align == "weights")
    # Gates are renormalised over the top-k and all experts are the same function, so who is chosen does not matter.
    expected = logits_of(copies.path)
    torch.testing.assert_close(logits_of(tmp_path / "weights"), expected, rtol=1e-4, atol=1e-5)
    assert float((logits_of(tmp_path / "none") - expected).abs().max()) > 1e-3


def test_aligned_copies_merge_into_what_is_left_of_one(copies: HFCheckpoint, random_stats: Stats) -> None:
    """With fewer neurons and hidden dimensions too: merging copies of the base is dropping them, bit for bit."""
    made = []
    for experts in ({"method": "merge", "align": "weights"}, {"method": "prune"}):
        recipe = parse_recipe(recipe_of(experts, num_moe_experts=4, moe_ffn_hidden_size=16, hidden_size=40))
        made.append(PrunedCheckpoint(make_plan(recipe, random_stats(copies), copies.shape), copies))
    assert made[0].names == made[1].names
    assert all(same_bytes(made[0].read(name), made[1].read(name)) for name in made[0].names)


def test_aligned_merging_does_not_depend_on_how_it_is_done(
    tool: Any, source: HFCheckpoint, random_stats: Stats, tmp_path: Path
) -> None:
    """Either format, one process or three, in any order of reading; and it is the mean of permuted members."""
    target = {"num_layers": 4, "hidden_size": 40, "num_moe_experts": 3}
    plan = make_plan(
        parse_recipe(recipe_of({"method": "merge", "align": "weights"}, **target)), random_stats(source), source.shape
    )
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    hf_to_torch_dist(source.path, tmp_path / "dist")
    contents = set()
    for load in (source.path, tmp_path / "dist"):
        for processes in (1, 3):
            save = tmp_path / f"{load.name}-{processes}"
            command = (PRUNE, "--load", load, "--plan", tmp_path / "plan.json", "--save", save, "--json")
            contents.add(tool(*command, "--processes", processes).json["content"])
    assert len(contents) == 1
    written, backwards = HFCheckpoint.open(tmp_path / "dist-3"), PrunedCheckpoint(plan, source)
    assert all(same_bytes(backwards.read(name), written.read(name)) for name in reversed(written.names))
    hidden, block = torch.tensor(plan.kept_hidden), "mtp.layers.0"

    def neurons(expert: int) -> Tensor:
        gate, up, down = (source.read(f"{block}.mlp.experts.{expert}.{matrix}.weight") for matrix in MATRICES)
        return torch.cat((gate[:, hidden], up[:, hidden], down[hidden].T), dim=1)

    for new, group in enumerate(plan.experts[block]):
        base, total = neurons(group.base), torch.zeros(32, 120, dtype=torch.float64)
        for member, weight in zip(group.members, group.weights, strict=True):
            total += weight * neurons(member)[torch.tensor(matching_neurons(base, neurons(member)))].double()
        found = written.read(f"{block}.mlp.experts.{new}.down_proj.weight").double().T
        torch.testing.assert_close(found, total[:, 80:], rtol=2**-8, atol=1e-7)


def edited(document: dict[str, Any], **experts: Any) -> dict[str, Any]:
    document["recipe"]["experts"] |= experts
    return document


def test_a_plan_of_before_reads_as_what_it_was(source: HFCheckpoint, random_stats: Stats) -> None:
    plan = make_plan(parse_recipe(recipe_of({}, num_moe_experts=4)), random_stats(source), source.shape)
    document = json.loads(plan.to_json())
    for key in ("weighting", "num_groups", "align"):
        del document["recipe"]["experts"][key]
    assert parse_plan(document) == plan


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"weighting": "pair"}, "did you mean 'pairwise'"),
        ({"align": 1}, "experts.align 1 is unknown"),
        ({"num_groups": 0}, "experts.num_groups 0 is not a positive integer"),
        ({"num_groups": 3}, "not equally many of each of the recipe's 3 expert groups"),
        ({"num_groups": 4}, "expert groups"),
    ],
)
def test_an_edited_plan_is_refused(
    experts: dict[str, Any], message: str, source: HFCheckpoint, random_stats: Stats
) -> None:
    recipe = parse_recipe(recipe_of({"method": "merge"}, num_moe_experts=4))
    document = json.loads(make_plan(recipe, random_stats(source), source.shape).to_json())
    with pytest.raises(SlimError, match=message):
        parse_plan(edited(document, **experts))


HASHED = """
import sys, numpy as np
from megatron_slim.pruning.plan import make_plan
from megatron_slim.pruning.statistics import Statistics, expected_shapes
from megatron_slim.recipe import parse_recipe
from megatron_slim.testing import tiny_shape
shape, rng = tiny_shape(), np.random.default_rng(0)
tensors = {key: rng.integers(0, 3, size).astype(np.float32) for key, size in expected_shapes(shape)}
experts = {"weighting": "pairwise", "num_groups": 2, "align": "weights"}
recipe = parse_recipe({"version": 1, "target": {"num_moe_experts": 4}, "experts": experts})
sys.stdout.write(make_plan(recipe, Statistics(tensors, {"source_sha256": "0" * 64}), shape).to_json())
"""


def test_a_plan_has_the_same_bytes_in_every_process() -> None:
    """Importances with many ties, and strings that hash differently."""
    plans = {
        subprocess.run(
            [sys.executable, "-c", HASHED], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1")
    }
    assert len(plans) == 1 and b'"align": "weights"' in plans.pop()
