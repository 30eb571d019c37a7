"""Applying plans: against slices written out by tensor name, in either order with conversion, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_slim.architecture.shape import FAMILIES
from megatron_slim.architecture.table import hf_tensors
from megatron_slim.checkpoint.convert import (
    hf_to_torch_dist,
    open_checkpoint,
    same_bytes,
    torch_dist_to_hf,
    write_checkpoint,
)
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.huggingface_writer import total_bytes
from megatron_slim.errors import SlimError
from megatron_slim.evaluation.perplexity import evaluate
from megatron_slim.pruning.apply import PrunedCheckpoint, merge
from megatron_slim.pruning.pipeline import write_pruned
from megatron_slim.pruning.plan import Plan
from megatron_slim.streaming.fingerprint import fingerprint
from megatron_slim.testing import write_tiny_checkpoint
from tests.mtp_oracle import load_mtp, mtp_hidden

PlanFor = Callable[..., Plan]
NOT_TRAINED = "e_score_correction_bias"  # no optimizer has state of it
TARGET = {"num_layers": 5, "hidden_size": 40, "num_moe_experts": 5, "moe_router_topk": 2}


def expected_tensor(name: str, plan: Plan, read: Callable[[str], Tensor]) -> Tensor:
    """A tensor of the target from what a person knows about Hugging Face's names; the table is not asked."""
    hidden = torch.tensor(plan.kept_hidden)
    parts, layers = name.split("."), plan.kept_layers
    if name.startswith("model.layers."):
        behind = int(parts[2]) == len(layers)  # GLM's MTP block
        parts[2] = str(plan.source_shape.num_layers if behind else layers[int(parts[2])])
    source_name, block = ".".join(parts), ".".join(parts[:3])
    if name.startswith("model.layers.") and behind:
        block = "mtp.layers.0"

    def narrow(tensor: Tensor) -> Tensor:
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            return tensor[hidden]
        if name.endswith("layernorm.weight") or name in ("model.norm.weight", "mtp.norm.weight") or "pre_fc" in name:
            return tensor[hidden]
        if name.endswith((".enorm.weight", ".hnorm.weight", ".shared_head.norm.weight")):
            return tensor[hidden]
        if name == "mtp.fc.weight" or name.endswith(".eh_proj.weight"):
            return tensor[hidden][:, torch.cat((hidden, 64 + hidden))]
        kept_whole = ("q_norm.weight", "k_norm.weight", "linear_attn.norm.weight", "A_log", "dt_bias", "conv1d.weight")
        kept_whole += ("q_proj.bias", "k_proj.bias", "v_proj.bias", "e_score_correction_bias")
        return tensor if name.endswith(kept_whole) else tensor[:, hidden]

    if parts[4:5] == ["experts"]:
        group = plan.experts[block][int(parts[5])]
        members = [narrow(read(source_name.replace(f"experts.{parts[5]}.", f"experts.{m}."))) for m in group.members]
        if len(members) == 1:
            return members[0]
        total = sum(w * t.double() for w, t in zip(group.weights, members, strict=True))
        return total.to(members[0].dtype)  # type: ignore[union-attr]
    tensor = narrow(read(source_name))
    if ".mlp.gate." in name:
        tensor = tensor[[group.base for group in plan.experts[block]]]
    return tensor


@pytest.mark.parametrize("source", FAMILIES, indirect=True)
@pytest.mark.parametrize("method", ["prune", "merge", "partial_preservation"])
@pytest.mark.parametrize("depth", ["last", "adjacent_cosine"])
def test_every_tensor_is_the_slice_that_its_name_says(
    method: str, depth: str, source: HFCheckpoint, plan_for: PlanFor
) -> None:
    plan = plan_for(TARGET, depth=depth, method=method)
    pruned = PrunedCheckpoint(plan, source)
    tensors = {name: pruned.read(name) for name in pruned.names}
    assert list(tensors) == list(hf_tensors(plan.target_shape))
    differing = 0
    for name, tensor in tensors.items():
        expected = expected_tensor(name, plan, source.read)
        if same_bytes(tensor, expected):
            continue
        # A float32 mean, rounded to bf16, may fall on the other side of a tie: one unit in the last place.
        assert ".experts." in name
        torch.testing.assert_close(tensor, expected, rtol=2**-7, atol=0)
        differing += int((tensor != expected).sum())
    assert differing <= 1e-4 * sum(tensor.numel() for tensor in tensors.values())
    assert total_bytes(pruned.shape, pruned.dtypes) == sum(t.nbytes for t in tensors.values())


def test_what_partial_preservation_preserves_is_preserved_bit_for_bit(source: HFCheckpoint, plan_for: PlanFor) -> None:
    plan = plan_for({"num_moe_experts": 6})
    pruned = PrunedCheckpoint(plan, source)
    for block, groups in plan.experts.items():
        alone = [(new, group.base) for new, group in enumerate(groups) if len(group.members) == 1]
        assert len(alone) >= 3
        for new, old in alone:
            name = "{}.mlp.experts.{}.up_proj.weight"
            assert same_bytes(pruned.read(name.format(block, new)), source.read(name.format(block, old)))


def test_merge_is_the_weighted_mean_rounded_once() -> None:
    a, b = torch.tensor([1.0, 256.0]).bfloat16(), torch.tensor([3.0, 1.0]).bfloat16()
    assert merge([a, b], (0.75, 0.25)).tolist() == [1.5, 192.0]
    three = [torch.tensor([x]).bfloat16() for x in (1.0, 0.00390625, 0.00390625)]
    # Summed in bf16 the two small terms would be lost one by one.
    assert merge(three, (1.0, 1.0, 1.0)).item() == 1.0078125
    assert merge([a], (1.0,)) is a


@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_an_identity_recipe_gives_every_byte_back(source: HFCheckpoint, plan_for: PlanFor, tmp_path: Path) -> None:
    pruned = PrunedCheckpoint(plan_for({}), source)
    write_pruned(pruned, tmp_path / "out", to="hf", stats=None)
    written = HFCheckpoint.open(tmp_path / "out")
    assert written.names == source.names
    assert all(same_bytes(written.read(name), source.read(name)) for name in source.names)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.one_case
@pytest.mark.parametrize("source", FAMILIES, indirect=True)
@pytest.mark.parametrize("method", ["prune", "partial_preservation"])
def test_order_of_pruning_and_conversion_does_not_matter(
    method: str, source: HFCheckpoint, plan_for: PlanFor, tmp_path: Path
) -> None:
    plan = plan_for(TARGET, method=method)
    # prune(convert(x)), in both formats
    hf_to_torch_dist(source.path, tmp_path / "converted")
    converted = open_checkpoint(tmp_path / "converted")
    assert fingerprint(converted) == fingerprint(source)
    late = PrunedCheckpoint(plan, converted)
    for to in ("hf", "torch_dist"):
        write_pruned(late, tmp_path / f"late-{to}", to=to, stats=None)
    # convert(prune(x))
    early = PrunedCheckpoint(plan, source)
    write_pruned(early, tmp_path / "early-hf", to="hf", stats=None)
    hf_to_torch_dist(tmp_path / "early-hf", tmp_path / "early-torch_dist")
    torch_dist_to_hf(tmp_path / "late-torch_dist", tmp_path / "back")
    reference = HFCheckpoint.open(tmp_path / "early-hf")
    for name in ("early-torch_dist", "late-hf", "late-torch_dist", "back"):
        other = open_checkpoint(tmp_path / name)
        assert other.shape == reference.shape == plan.target_shape
        assert all(same_bytes(other.read(tensor), reference.read(tensor)) for tensor in reference.names)
    for file in ("hf/tokenizer.json", "plan.json", "pruning_report.md"):
        assert (tmp_path / "late-torch_dist" / file).is_file()


def test_experts_stored_fused_are_pruned_alike_and_stay_fused(
    source: HFCheckpoint, plan_for: PlanFor, tmp_path: Path
) -> None:
    """Of the surviving blocks those are fused that were; statistics and plans are those of the other form."""
    mixed = frozenset({"model.layers.0", "model.layers.3", "model.layers.6", "mtp.layers.0"})
    whole = frozenset(source.shape.blocks)
    write_checkpoint(source, tmp_path / "fused", to="hf", expert_storage="fused")
    fused = HFCheckpoint.open(tmp_path / "fused")
    assert fused.fused_blocks == whole and fingerprint(fused) == fingerprint(source)
    plan = plan_for(TARGET, depth="adjacent_cosine", method="partial_preservation")
    expected = write_pruned(PrunedCheckpoint(plan, source), tmp_path / "plain", to="hf", stats=None)
    assert expected["expert_storage"] == "separate"
    fused.fused_blocks = mixed  # the form of files follows this alone
    survivors = {new for new, old in plan.source_blocks.items() if old in mixed}
    for to in ("hf", "torch_dist"):
        made = write_pruned(PrunedCheckpoint(plan, fused), tmp_path / to, to=to, stats=None)
        assert (made["content"], made["expert_storage"]) == (expected["content"], "mixed")
        assert open_checkpoint(tmp_path / to).fused_blocks == survivors
    torch_dist_to_hf(tmp_path / "torch_dist", tmp_path / "back")
    assert HFCheckpoint.open(tmp_path / "back").fused_blocks == survivors
    asked = write_pruned(
        PrunedCheckpoint(plan, fused), tmp_path / "asked", to="hf", stats=None, expert_storage="separate"
    )
    assert (tmp_path / "asked" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()
    assert asked["content"] == expected["content"]


@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_transformers_loads_the_mtp_block_of_a_pruned_model(
    to: str, source: HFCheckpoint, plan_for: PlanFor, tmp_path: Path
) -> None:
    """By nothing but what the export says of itself, after training's format too; the losses are ours."""
    from transformers import AutoModelForCausalLM

    write_pruned(PrunedCheckpoint(plan_for(TARGET), source), tmp_path / "pruned", to=to, stats=None)
    path = tmp_path / "pruned"
    if to == "torch_dist":
        torch_dist_to_hf(path, tmp_path / "back")
        path = tmp_path / "back"
    ids = torch.randint(0, source.shape.vocab_size, (4, 33), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = mtp_hidden(load_mtp(model), model.model(ids).last_hidden_state, ids)
        logits = model.lm_head(hidden)[:, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())
    (found,) = evaluate(HFCheckpoint.open(path), ids.numpy(), dtype=torch.float32).mtp_loss
    assert found == pytest.approx(float(expected), rel=1e-7)  # as in tests/evaluation


def test_a_plan_for_another_source_is_refused(source: HFCheckpoint, plan_for: PlanFor, tmp_path: Path) -> None:
    other = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "other", source.shape, seed=1))
    with pytest.raises(SlimError, match="the plan was made for another checkpoint"):
        PrunedCheckpoint(plan_for(TARGET), other)
