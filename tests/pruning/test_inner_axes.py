"""FFN neurons and heads: the right slices, what has no effect may go, and what a plan may not say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_slim.architecture.feed_forward import EXPERT_NEURONS
from megatron_slim.architecture.kinds import KINDS
from megatron_slim.architecture.shape import FAMILIES, FULL_ATTENTION
from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint, same_bytes
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.errors import RecipeError, SlimError
from megatron_slim.evaluation.perplexity import evaluate
from megatron_slim.pruning import statistics
from megatron_slim.pruning.apply import PrunedCheckpoint
from megatron_slim.pruning.pipeline import write_pruned
from megatron_slim.pruning.plan import Plan, make_plan
from megatron_slim.pruning.plan_reader import parse_plan
from megatron_slim.pruning.plan_view import ranked_axes
from megatron_slim.pruning.recipe_checks import check_recipe
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe import parse_recipe
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.pruning.conftest import rewritten

RandomStats = Callable[..., Statistics]
HEAD, GROUPS, PER_GROUP = 16, 2, 3  # of full attention; linear attention has as many
TARGET = {"moe_ffn_hidden_size": 24, "num_attention_heads": 4, "num_moe_experts": 5}
NEXT_TARGET = {**TARGET, "moe_shared_expert_intermediate_size": 20, "linear_num_value_heads": 4}
GLM_TARGET = {**TARGET, "moe_shared_expert_intermediate_size": 24, "ffn_hidden_size": 40}
TARGETS = {
    "qwen3_next": NEXT_TARGET,
    "qwen3_moe": TARGET,
    "qwen3_5_moe_text": NEXT_TARGET,
    "glm4_moe": GLM_TARGET,
}
WITHOUT_DELTA_NET = ("qwen3_moe", "glm4_moe")


# A whole group of heads goes with its key, and the others keep two of three heads, or all of them.
FEWER_GROUPS = {"num_query_groups": 1, "num_attention_heads": 2, "moe_ffn_hidden_size": 24}
NEXT_FEWER_GROUPS = {**FEWER_GROUPS, "linear_num_key_heads": 1, "moe_shared_expert_intermediate_size": 20}
GROUPED = {
    "qwen3_next": NEXT_FEWER_GROUPS,
    "qwen3_moe": FEWER_GROUPS,
    "qwen3_5_moe_text": NEXT_FEWER_GROUPS,
    "glm4_moe": {**FEWER_GROUPS, "moe_shared_expert_intermediate_size": 24, "ffn_hidden_size": 40},
}


def _checkpoint(path: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> HFCheckpoint:
    sizes = {"num_attention_heads": GROUPS * PER_GROUP, "num_query_groups": GROUPS}
    if family not in WITHOUT_DELTA_NET:
        sizes |= {"linear_num_value_heads": GROUPS * PER_GROUP, "linear_num_key_heads": GROUPS}
    return HFCheckpoint.open(write_tiny_checkpoint(path, tiny_shape(family, **sizes), dtype=dtype))


@pytest.fixture(scope="module", params=FAMILIES)
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFCheckpoint:
    return _checkpoint(tmp_path_factory.mktemp("wide") / "hf", request.param)


def plan_of(target: dict[str, int], stats: Statistics, source: HFCheckpoint, method: str = "merge") -> Plan:
    recipe = parse_recipe({"version": 1, "target": target, "experts": {"method": method}})
    return make_plan(recipe, stats, source.shape)


def test_the_most_important_survive_everywhere_apart(wide: HFCheckpoint, random_stats: RandomStats) -> None:
    stats, shape = random_stats(wide), wide.shape
    plan = plan_of(TARGETS[shape.model_type], stats, wide)
    for block in plan.source_blocks.values():
        heads = plan.inner.heads.get(block)
        key = statistics.axis_key(block, KINDS[shape.layer_type(block)].heads)
        of_heads = stats.tensors[key].reshape(GROUPS, PER_GROUP)
        assert heads is not None
        assert list(heads) == [
            g * PER_GROUP + h for g in range(GROUPS) for h in range(PER_GROUP) if h != of_heads[g].argmin()
        ]
    for block, groups in plan.experts.items():
        importance = stats.tensors[statistics.axis_key(block, EXPERT_NEURONS)]
        for group, neurons in zip(groups, plan.inner.neurons[block], strict=True):
            dropped = sorted(set(range(32)) - set(neurons))
            assert len(neurons) == 24 and list(neurons) == sorted(neurons)
            assert importance[group.base, list(neurons)].min() > importance[group.base, dropped].max()
    wanted = TARGETS[shape.model_type].get("moe_shared_expert_intermediate_size", 32)
    if shape.model_type != "qwen3_moe":
        assert plan.inner.shared_neurons.keys() == plan.experts.keys()
        assert {len(neurons) for neurons in plan.inner.shared_neurons.values()} == {wanted}
    dense = [block for block in plan.source_blocks.values() if block not in plan.experts]
    assert list(plan.inner.dense_neurons) == dense and len(dense) == shape.num_dense_layers
    for block, neurons in plan.inner.dense_neurons.items():
        importance, dropped = stats.tensors[f"{block}.mlp.ffn"], sorted(set(range(48)) - set(neurons))
        assert len(neurons) == 40 and importance[list(neurons)].min() > importance[dropped].max()
    assert parse_plan(json.loads(plan.to_json())) == plan
    shown = [axis for axis in ranked_axes(plan, stats) if axis.name not in ("hidden dimensions", "experts")]
    assert {len(axis.kept) / axis.size for axis in shown} <= {24 / 32, wanted / 32, 4 / 6, 40 / 48}
    parts = (plan.inner.neurons, plan.inner.shared_neurons, plan.inner.dense_neurons, plan.inner.heads)
    assert len(shown) == sum(map(len, parts))
    neurons = next(axis for axis in shown if axis.name == "expert neurons")
    group = plan.experts[neurons.place][1]
    of_experts = stats.tensors[statistics.axis_key(neurons.place, EXPERT_NEURONS)]
    first = of_experts[group.base, plan.inner.neurons[neurons.place][1][0]]
    assert neurons.importance is not None and neurons.importance[neurons.kept[24]] == first


def _rows(heads: tuple[int, ...], width: int) -> Tensor:
    return torch.cat([torch.arange(head * width, (head + 1) * width) for head in heads])


def by_hand(name: str, plan: Plan, read: Callable[[str], Tensor]) -> Tensor:
    """A tensor of the target from what a person knows about Hugging Face's names; the table is not asked."""
    block, part = ".".join(name.split(".")[:3]), name.split(".")[-2]
    if block == f"model.layers.{plan.source_shape.num_layers}":  # GLM's
        block = "mtp.layers.0"
    if block not in plan.source_blocks.values():
        return read(name)
    if ".experts." in name:
        number = int(name.split(".")[5])
        group, neurons = plan.experts[block][number], list(plan.inner.neurons[block][number])
        members = [read(name.replace(f"experts.{number}.", f"experts.{member}.")) for member in group.members]
        members = [m[:, neurons] if part == "down_proj" else m[neurons] for m in members]
        if len(members) == 1:
            return members[0]
        return sum(w * m.double() for w, m in zip(group.weights, members, strict=True)).to(members[0].dtype)  # type: ignore
    tensor, dense = read(name), plan.inner.dense_neurons
    if ".mlp.gate." in name:
        return tensor[[group.base for group in plan.experts[block]]]
    if "shared_expert." in name or "shared_experts." in name or (".mlp." in name and block in dense):
        neurons = list((plan.inner.shared_neurons | dense)[block])
        return tensor[:, neurons] if part == "down_proj" else tensor[neurons]
    heads, per = plan.inner.heads[block], PER_GROUP
    per_group = [[head % per for head in heads if head // per == group] for group in range(GROUPS)]
    groups = tuple(group for group, kept in enumerate(per_group) if kept)
    match part:
        case "q_proj":
            gated = plan.source_shape.model_type not in WITHOUT_DELTA_NET  # per head a query and a gate
            return tensor[_rows(heads, HEAD * (2 if gated else 1))]
        case "k_proj" | "v_proj":
            return tensor[_rows(groups, HEAD)]
        case "o_proj" | "out_proj":
            return tensor[:, _rows(heads, HEAD)]
        case "in_proj_qkvz":  # per key head: query, key, its value heads, their z
            rows: list[Tensor] = []
            for group, kept in ((group, per_group[group]) for group in groups):
                start = group * (2 * HEAD + 2 * per * HEAD)
                rows += [start + torch.arange(2 * HEAD)]
                rows += [start + 2 * HEAD + half * per * HEAD + _rows(tuple(kept), HEAD) for half in (0, 1)]
            return tensor[torch.cat(rows)]
        case "in_proj_z":
            return tensor[_rows(heads, HEAD)]
        case "in_proj_b" | "in_proj_a":
            return tensor[list(heads)]
        case "in_proj_ba":  # per key head: beta and alpha of its value heads
            return tensor[
                [g * 2 * per + half * per + h for g in range(GROUPS) for half in (0, 1) for h in per_group[g]]
            ]
        case "in_proj_qkv" | "conv1d":  # queries, keys, then values
            queries, keys, values = _rows(groups, HEAD), GROUPS * HEAD + _rows(groups, HEAD), _rows(heads, HEAD)
            return tensor[torch.cat((queries, keys, 2 * GROUPS * HEAD + values))]
    return tensor[list(heads)] if name.endswith(("A_log", "dt_bias")) else tensor


@pytest.mark.one_case
@pytest.mark.parametrize(("method", "targets"), [("prune", TARGETS), ("merge", TARGETS), ("prune", GROUPED)])
def test_every_tensor_is_the_slice_that_its_name_says(
    method: str, targets: dict[str, dict[str, int]], wide: HFCheckpoint, random_stats: RandomStats, tmp_path: Path
) -> None:
    plan = plan_of(targets[wide.shape.model_type], random_stats(wide), wide, method)
    assert parse_plan(json.loads(plan.to_json())) == plan
    pruned, differing, total = PrunedCheckpoint(plan, wide), 0, 0
    for name in pruned.names:
        tensor, expected = pruned.read(name), by_hand(name, plan, wide.read)
        total += tensor.numel()
        if not same_bytes(tensor, expected):  # a float32 mean that falls on the other side of a tie in bf16
            assert ".experts." in name and method == "merge"
            torch.testing.assert_close(tensor, expected, rtol=2**-7, atol=0)
            differing += int((tensor != expected).sum())
    assert differing <= 1e-4 * total
    hf_to_torch_dist(wide.path, tmp_path / "converted")
    for to, source in (("hf", wide), ("torch_dist", open_checkpoint(tmp_path / "converted"))):
        write_pruned(PrunedCheckpoint(plan, source), tmp_path / to, to=to, stats=None)
        written = open_checkpoint(tmp_path / to)
        assert written.shape == plan.target_shape
        assert all(same_bytes(written.read(name), pruned.read(name)) for name in pruned.names)


def _silence(checkpoint: HFCheckpoint, stats: Statistics, rng: np.random.Generator) -> dict[str, Tensor]:
    """Weights in which some neurons and heads have no effect, and statistics that say so."""
    shape, tensors = checkpoint.shape, {name: checkpoint.read(name) for name in checkpoint.names}

    def mute(name: str, key: str, index: Any, count: int, width: int, block_of: int) -> None:
        """No effect of one in four (of each block of) columns of a matrix."""
        importance = stats.tensors[key][index]
        quiet = [g * block_of + i for g in range(count // block_of) for i in rng.permutation(block_of)[: block_of // 3]]
        importance[quiet] = 0
        tensors[name][:, _rows(tuple(quiet), width)] = 0

    for block in shape.blocks:
        hf = shape.hf_prefix(block)
        for expert in range(shape.num_moe_experts) if block in shape.routed_blocks else ():
            name = f"{hf}.mlp.experts.{expert}.down_proj.weight"
            mute(name, statistics.axis_key(block, EXPERT_NEURONS), expert, 32, 1, 32)
        for name, key, count in (
            ("shared_expert.down_proj", "shared_expert.ffn", 32),
            ("shared_experts.down_proj", "shared_expert.ffn", 32),
            ("down_proj", "ffn", 48),
        ):
            if f"{hf}.mlp.{name}.weight" in tensors:
                mute(f"{hf}.mlp.{name}.weight", f"{block}.mlp.{key}", slice(None), count, 1, count)
        kind = shape.layer_type(block)
        output = f"{hf}.self_attn.o_proj.weight" if kind == FULL_ATTENTION else f"{hf}.linear_attn.out_proj.weight"
        mute(output, statistics.axis_key(block, KINDS[kind].heads), slice(None), GROUPS * PER_GROUP, HEAD, PER_GROUP)
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_what_has_no_effect_may_go(family: str, random_stats: RandomStats, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = _checkpoint(tmp_path / "loud", family, torch.float32)
    stats = random_stats(source)
    tensors = _silence(source, stats, np.random.default_rng(0))
    quiet = rewritten(source, tensors, tmp_path / "quiet")
    target = {key: value for key, value in TARGETS[family].items() if key != "num_moe_experts"}
    if family != "qwen3_moe":
        target["moe_shared_expert_intermediate_size"] = 24  # a quarter goes, a third has no effect
    stats = Statistics(
        stats.tensors, {**stats.metadata, "source_sha256": random_stats(quiet).metadata["source_sha256"]}
    )
    write_pruned(PrunedCheckpoint(plan_of(target, stats, quiet), quiet), tmp_path / "out", to="hf", stats=None)
    tokens = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = []
    for path in (tmp_path / "loud", tmp_path / "quiet", tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-2, "what was silenced had an effect"
    # Sums over fewer terms round otherwise; the logits are of the order of 1.
    torch.testing.assert_close(logits[2], logits[1], rtol=0, atol=1e-5)
    losses = [
        evaluate(HFCheckpoint.open(path), tokens.numpy(), dtype=torch.float32)
        for path in (quiet.path, tmp_path / "out")
    ]
    np.testing.assert_allclose([losses[1].loss, *losses[1].mtp_loss], [losses[0].loss, *losses[0].mtp_loss], rtol=1e-6)


def test_groups_without_effect_may_go_with_their_keys(random_stats: RandomStats, tmp_path: Path) -> None:
    """Heads that are not named follow their groups; transformers gives the same logits."""
    from transformers import AutoModelForCausalLM

    source = _checkpoint(tmp_path / "loud", "qwen3_5_moe_text", torch.float32)
    stats, shape = random_stats(source), source.shape
    tensors = {name: source.read(name) for name in source.names}
    for number, block in enumerate(shape.blocks):
        kind = shape.layer_type(block)
        name = "self_attn.o_proj" if kind == FULL_ATTENTION else "linear_attn.out_proj"
        quiet = slice(number % GROUPS * PER_GROUP, (number % GROUPS + 1) * PER_GROUP)
        tensors[f"{block}.{name}.weight"].unflatten(1, (-1, HEAD))[:, quiet] = 0
        stats.tensors[statistics.axis_key(block, KINDS[kind].heads)][quiet] = 0
    quiet_source = rewritten(source, tensors, tmp_path / "quiet")
    known = Statistics(stats.tensors, random_stats(quiet_source).metadata)
    plan = plan_of({"num_query_groups": 1, "linear_num_key_heads": 1}, known, quiet_source)
    assert (plan.target_shape.num_attention_heads, plan.target_shape.linear_num_value_heads) == (3, 3)
    write_pruned(PrunedCheckpoint(plan, quiet_source), tmp_path / "out", to="hf", stats=None)
    tokens = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")(tokens).logits
            for path in (tmp_path / "quiet", tmp_path / "out")
        ]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)
    losses = [
        evaluate(HFCheckpoint.open(path), tokens.numpy(), dtype=torch.float32)
        for path in (quiet_source.path, tmp_path / "out")
    ]
    np.testing.assert_allclose([losses[1].loss, *losses[1].mtp_loss], [losses[0].loss, *losses[0].mtp_loss], rtol=1e-6)


def test_a_smaller_top_k_alone(wide: HFCheckpoint, random_stats: RandomStats, tmp_path: Path) -> None:
    """Every weight stays."""
    plan = plan_of({"moe_router_topk": 1 if not wide.shape.norm_topk_prob else 2}, random_stats(wide), wide)
    pruned = PrunedCheckpoint(plan, wide)
    assert pruned.names == wide.names
    assert all(same_bytes(pruned.read(name), wide.read(name)) for name in wide.names)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"num_query_groups": 1, "num_attention_heads": 4}, "num_attention_heads 4 is more than 1 KV groups have"),
        ({"num_query_groups": 3}, "target.num_query_groups 3 is larger than the source's 2"),
        ({"moe_ffn_hidden_size": 20}, "target.moe_ffn_hidden_size 20 is not a multiple of 8"),
        ({"num_attention_heads": 8}, "target.num_attention_heads 8 is larger than the source's 6"),
        ({"num_attention_heads": 3}, "num_attention_heads 3 is not a multiple of num_query_groups 2"),
        ({"linear_num_value_heads": 5}, "linear_num_value_heads 5 is not a multiple of linear_num_key_heads 2"),
    ],
)
def test_targets_that_cannot_be(target: dict[str, int], message: str, tmp_path: Path) -> None:
    source = _checkpoint(tmp_path / "hf", "qwen3_next")
    with pytest.raises(RecipeError, match=message):
        check_recipe(parse_recipe({"version": 1, "target": target}), source.shape)


def test_a_family_without_it_has_nothing_to_prune(tmp_path: Path) -> None:
    source = _checkpoint(tmp_path / "hf", "qwen3_moe")
    recipe = parse_recipe({"version": 1, "target": {"linear_num_value_heads": 2}})
    with pytest.raises(RecipeError, match="linear_num_value_heads 2 is larger than the source's 0"):
        check_recipe(recipe, source.shape)


BLOCK = "model.layers.3"
BROKEN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no neurons": (lambda d: d["neurons"].pop(BLOCK), "neurons are not given for exactly the blocks"),
    "too few experts": (lambda d: d["neurons"][BLOCK].pop(), "neurons of model.layers.3 are not a list for each of 5"),
    "no list": (lambda d: d["neurons"].update({BLOCK: 5}), "neurons of model.layers.3 are not a list for each of 5"),
    "twice": (
        lambda d: d["neurons"][BLOCK][2].__setitem__(1, d["neurons"][BLOCK][2][0]),
        "neurons of model.layers.3, expert 2 is not strictly ascending",
    ),
    "beyond": (
        lambda d: d["shared_neurons"][BLOCK].__setitem__(-1, 32),
        r"shared_neurons of model.layers.3 has entries outside 0\.\.31",
    ),
    "one group": (
        lambda d: d["heads"].update({BLOCK: [0, 1, 2, 3]}),
        "heads of model.layers.3 are not equally many in each of 2 groups",
    ),
    "too few heads": (lambda d: d["heads"][BLOCK].pop(), "heads of model.layers.3 has 3 entries, not 4"),
    "no object": (lambda d: d.update(heads=[1]), "heads are not given for exactly the blocks"),
    "missing": (lambda d: d.pop("heads"), "missing key heads"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_plans_are_refused(name: str, random_stats: RandomStats, tmp_path: Path) -> None:
    source = _checkpoint(tmp_path / "hf", "qwen3_next")
    document = json.loads(plan_of(NEXT_TARGET, random_stats(source), source).to_json())
    change, message = BROKEN[name]
    change(document)
    with pytest.raises(SlimError, match=message):
        parse_plan(document)
