"""Qwen3.5-MoE within a model that sees pictures: carried whole, pruned with its vision tower, read by transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3_5MoeForCausalLM

from megatron_slim.architecture.shape import FULL_ATTENTION
from megatron_slim.checkpoint.convert import open_checkpoint, same_bytes, write_checkpoint
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.errors import CheckpointError, ShapeError
from megatron_slim.evaluation.perplexity import evaluate
from megatron_slim.pruning.apply import PrunedCheckpoint
from megatron_slim.pruning.elastic import find_elastic
from megatron_slim.pruning.elastic_plans import plan_budgets
from megatron_slim.pruning.elastic_slices import write_slice, write_sorted, write_unsorted
from megatron_slim.pruning.pipeline import write_pruned
from megatron_slim.pruning.plan import make_plan
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe import parse_recipe
from tests.mtp_oracle import load_mtp, mtp_hidden
from tests.vlm import SHAPE, config, files_tensors, load_vlm, picture_and_text, write_vlm

RandomStats = Callable[..., Statistics]
MERGER = "model.visual.merger.linear_fc2"


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vlm(tmp_path_factory.mktemp("vlm") / "hf")


def _pruned(source: HFCheckpoint, stats: Statistics, save: Path, to: str = "hf", **target: int) -> Path:
    recipe = parse_recipe({"version": 1, "target": target, "experts": {"method": "prune"}})
    plan = make_plan(recipe, stats, source.shape)
    write_pruned(PrunedCheckpoint(plan, source), save, to=to, stats=None)
    return save


def test_it_comes_back_from_torch_dist_byte_by_byte(vlm: Path, tmp_path: Path) -> None:
    first = write_checkpoint(open_checkpoint(vlm), tmp_path / "dist", to="torch_dist")
    second = write_checkpoint(open_checkpoint(tmp_path / "dist"), tmp_path / "back", to="hf")
    before, after = files_tensors(vlm), files_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(same_bytes(before[name], after[name]) for name in before)
    visual = [tensor for name, tensor in before.items() if ".visual." in name]
    carried = {"tensors": len(visual), "bytes": sum(tensor.nbytes for tensor in visual)}
    assert first["carried"] == second["carried"] == carried and first["content"] == second["content"]
    # transformers reads what it read, and the config.json says nothing else of it.
    inputs = picture_and_text()
    with torch.no_grad():
        assert torch.equal(load_vlm(tmp_path / "back")(**inputs).logits, load_vlm(vlm)(**inputs).logits)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    text, base = written.pop("text_config"), config()
    added = {"torch_dtype"}, {"num_mtp_layers", "mtp_layer_types"}
    assert {key: value for key, value in written.items() if key not in added[0]} == {
        key: value for key, value in base.items() if key != "text_config"
    }
    assert {key: value for key, value in text.items() if key not in added[1]} == base["text_config"]


def test_a_torch_dist_checkpoint_keeps_its_tower_or_says_so(
    vlm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(open_checkpoint(vlm), tmp_path / "dist", to="torch_dist")
    file = tmp_path / "dist" / "hf" / "slim_carried.tensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"slim_carried.tensors: is not what was written"):
        write_checkpoint(open_checkpoint(tmp_path / "dist"), tmp_path / "flipped", to="hf")
    assert not (tmp_path / "flipped").exists()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"there is no slim_carried.tensors"):
        open_checkpoint(tmp_path / "dist")
    # From the directory of the original.
    write_checkpoint(open_checkpoint(tmp_path / "dist", vlm), tmp_path / "whole", to="hf")
    before, after = files_tensors(vlm), files_tensors(tmp_path / "whole")
    assert all(same_bytes(before[name], after[name]) for name in before if ".visual." in name)
    (tmp_path / "dist" / "hf" / "slim_carried.json").unlink()
    with caplog.at_level("INFO"):
        write_checkpoint(open_checkpoint(tmp_path / "dist"), tmp_path / "alone", to="hf")
    assert "no tensor of qwen3_5_moe but its language model is there: that is written alone" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, config: tensors.pop(f"{MERGER}.weight"), r"linear_fc2.weight is missing"),
        (
            lambda tensors, config: tensors[f"{MERGER}.bias"].fill_(float("nan")),
            "linear_fc2.bias: 64 of 64 values are NaN",
        ),
        (
            lambda tensors, config: config["vision_config"].update(out_hidden_size=48),
            "out_hidden_size 48 is not hidden",
        ),
        (
            lambda tensors, config: config["vision_config"].update(deepstack_visual_indexes=[1]),
            "deepstack_visual_index",
        ),
        (lambda tensors, config: config.pop("vision_config"), "vision_config is missing"),
        (
            lambda tensors, config: tensors.update({f"{MERGER}.bias": torch.zeros(48)}),
            "rows that are not the 64 hidden",
        ),
    ],
)
def test_a_tower_that_is_not_this_is_refused(
    change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object], message: str, vlm: Path, tmp_path: Path
) -> None:
    tensors, asked = files_tensors(vlm), config()
    change(tensors, asked)
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(asked))
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(open_checkpoint(tmp_path / "hf"), tmp_path / "out", to="torch_dist")
    assert not (tmp_path / "out").exists()


def test_tensors_without_dimensions_and_yarn_are_read(vlm: Path, tmp_path: Path) -> None:
    tensors, asked = files_tensors(vlm) | {"model.visual.scale": torch.tensor(2.0)}, config()
    asked["text_config"]["rope_parameters"] |= {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(asked))
    source = open_checkpoint(tmp_path / "hf")
    assert source.shape.rope_scaling is not None
    write_checkpoint(source, tmp_path / "out", to="hf")
    assert files_tensors(tmp_path / "out")["model.visual.scale"].item() == 2.0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"]["rope_parameters"] == asked["text_config"]["rope_parameters"]


def test_losses_are_those_of_transformers(vlm: Path) -> None:
    """Of text, whose positions are alike on the three grids of its rotary embeddings; the MTP block's too."""
    tokens = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(1))
    model = load_vlm(vlm)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1].double()
    found = evaluate(HFCheckpoint.open(vlm), tokens.numpy(), dtype=torch.float32)
    assert found.loss == pytest.approx(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item(), rel=1e-6)


def test_the_language_model_alone(vlm: Path, tmp_path: Path) -> None:
    """Without a tensor of the larger model it is written as a language model, MTP block and all."""
    tensors = {name: tensor for name, tensor in files_tensors(vlm).items() if ".visual." not in name}
    (tmp_path / "text").mkdir()
    save_file(tensors, tmp_path / "text" / "model.safetensors")
    (tmp_path / "text" / "config.json").write_bytes((vlm / "config.json").read_bytes())
    source = open_checkpoint(tmp_path / "text")
    assert "carried" not in write_checkpoint(source, tmp_path / "out", to="hf")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert isinstance(model, Qwen3_5MoeForCausalLM) and not any(info.values())
    tokens = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(1))
    block = load_mtp(model)
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state
        trunk = model.lm_head(hidden)[:, :-1].double()
        drafts = model.lm_head(mtp_hidden(block, hidden, tokens))[:, :-1].double()
    found = evaluate(HFCheckpoint.open(tmp_path / "out"), tokens.numpy(), dtype=torch.float32)
    expected = F.cross_entropy(trunk.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert found.loss == pytest.approx(expected, rel=1e-6)
    expected = F.cross_entropy(drafts.flatten(0, 1), tokens[:, 2:].flatten()).item()
    assert found.mtp_loss == pytest.approx((expected,), rel=1e-6)


def _hidden_dims(name: str, shape: tuple[int, ...]) -> list[int]:
    """The dimensions of a tensor that are the hidden size, from what a person knows about the names."""
    last = (".q_proj.", ".k_proj.", ".v_proj.", ".in_proj_", ".gate_proj.", ".up_proj.", ".gate.", "_gate.", "gate_up")
    first = (".o_proj.", ".out_proj.", f"{MERGER}.")
    if any(part in name for part in first):
        return [0]
    if "embed_tokens" in name or "lm_head" in name or any(part in name for part in last):
        return [len(shape) - 1]
    if "down_proj" in name:
        return [len(shape) - 2]
    if name.startswith("mtp.") or "visual" in name:
        return []
    return [0] if name.endswith(("layernorm.weight", "norm.weight")) and shape == (64,) else []


def test_pictures_are_seen_as_before_where_what_went_was_zero(
    vlm: Path, random_stats: RandomStats, tmp_path: Path
) -> None:
    """A quarter of the hidden dimensions; norms see fewer of them, and are scaled for it."""
    stats = random_stats(open_checkpoint(vlm))
    gone = np.random.default_rng(0).permutation(64)[:16]
    for kind in ("norm_activation", "norm_activation_l2"):
        stats.tensors[f"hidden.{kind}"][gone] = 0
    tensors = files_tensors(vlm)
    for name, tensor in tensors.items():
        for dim in _hidden_dims(name, tuple(tensor.shape)):
            if not name.endswith("norm.weight"):
                tensor.index_fill_(dim, torch.from_numpy(gone), 0.0)
    (tmp_path / "zeroed").mkdir()
    save_file(tensors, tmp_path / "zeroed" / "model.safetensors", metadata={"format": "pt"})
    asked = config()
    asked["text_config"]["rms_norm_eps"] = 1e-12  # it is added to a mean over the hidden dimensions
    (tmp_path / "zeroed" / "config.json").write_text(json.dumps(asked))
    source = open_checkpoint(tmp_path / "zeroed")
    same = random_stats(source).metadata
    pruned = _pruned(source, Statistics(stats.tensors, same), tmp_path / "pruned", hidden_size=48)

    after = files_tensors(pruned)
    kept = sorted(set(range(64)) - set(gone.tolist()))
    for part in ("weight", "bias"):
        assert torch.equal(after[f"{MERGER}.{part}"], tensors[f"{MERGER}.{part}"][kept])
    others = [name for name in tensors if ".visual." in name and MERGER not in name]
    assert others and all(same_bytes(after[name], tensors[name]) for name in others)
    assert json.loads((pruned / "config.json").read_text())["vision_config"]["out_hidden_size"] == 48
    # x / sqrt(sum / 48) instead of x / sqrt(sum / 64): the zero-centred norms 1 + w of the hidden dimensions make up.
    for name, tensor in after.items():
        if "visual" not in name and tensor.shape == (48,) and name.endswith("norm.weight"):
            after[name] = (1 + tensor) * (64 / 48) ** 0.5 - 1
    save_file(after, pruned / "model.safetensors", metadata={"format": "pt"})
    inputs, other = picture_and_text(), picture_and_text(1)
    before, now = load_vlm(tmp_path / "zeroed"), load_vlm(pruned)
    with torch.no_grad():
        expected, found = before(**inputs).logits, now(**inputs).logits
        blind = now(**{**inputs, "pixel_values": other["pixel_values"]}).logits
    assert (found - blind).abs().max() > 1e-3, "the picture has an effect"
    # Sums over fewer terms round otherwise; logits are of the order of 1.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_every_axis_is_pruned_with_it(to: str, vlm: Path, random_stats: RandomStats, tmp_path: Path) -> None:
    source = open_checkpoint(vlm)
    target = {"hidden_size": 32, "num_moe_experts": 4, "moe_ffn_hidden_size": 24}
    target |= {"moe_shared_expert_intermediate_size": 16, "linear_num_value_heads": 2, "num_attention_heads": 2}
    saved = _pruned(source, random_stats(source), tmp_path / "out", to, **target)
    if to == "torch_dist":
        write_checkpoint(open_checkpoint(saved), tmp_path / "export", to="hf")
        saved = tmp_path / "export"
    with torch.no_grad():
        assert torch.isfinite(load_vlm(saved)(**picture_and_text()).logits).all()


@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_a_slice_has_its_tower(to: str, vlm: Path, random_stats: RandomStats, tmp_path: Path) -> None:
    """The rows that its hidden dimensions need; and sorted and back it is the tower of before."""
    source = HFCheckpoint.open(vlm)
    budgets = [{"name": "whole"}, {"name": "small", "target": {"hidden_size": 48, "num_layers": 4}}]
    planned = plan_budgets(parse_recipe({"version": 1, "budgets": budgets}).budgets, random_stats(source), source.shape)
    options = {"stats": None, "budgets": planned, "to": to}
    write_pruned(PrunedCheckpoint(planned[0].plan, source), tmp_path / "elastic", **options)
    elastic = find_elastic(tmp_path / "elastic")
    assert elastic is not None
    write_slice(open_checkpoint(tmp_path / "elastic"), elastic, "small", tmp_path / "slice", to="hf")
    alone = _pruned(source, random_stats(source), tmp_path / "alone", hidden_size=48, num_layers=4)
    found, expected = files_tensors(tmp_path / "slice"), files_tensors(alone)
    assert found.keys() == expected.keys() and any(".visual." in name for name in found)
    assert [name for name in found if not same_bytes(found[name], expected[name])] == []
    write_sorted(open_checkpoint(tmp_path / "elastic"), elastic, tmp_path / "sorted", to=to)
    order = find_elastic(tmp_path / "sorted")
    assert order is not None
    write_unsorted(open_checkpoint(tmp_path / "sorted"), order, tmp_path / "back", to="hf")
    back, before = files_tensors(tmp_path / "back"), files_tensors(vlm)
    assert back.keys() == before.keys() and all(same_bytes(back[name], before[name]) for name in back)


def test_fp8_leaves_what_is_carried_alone(vlm: Path, tmp_path: Path) -> None:
    write_checkpoint(open_checkpoint(vlm), tmp_path / "fp8", to="hf", quantize="fp8")
    before, after = files_tensors(vlm), files_tensors(tmp_path / "fp8")
    visual = [name for name in before if ".visual." in name]
    assert all(same_bytes(before[name], after[name]) for name in visual)
    assert after["model.language_model.layers.0.linear_attn.in_proj_qkv.weight"].dtype == torch.float8_e4m3fn
    assert after["model.language_model.layers.0.linear_attn.in_proj_a.weight"].dtype == torch.bfloat16
    listed = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert {"model.visual.blocks.0.attn.qkv", "model.language_model.layers.0.mlp.gate", "mtp.fc", "lm_head"} <= {
        *listed
    }
    read = HFCheckpoint.open(tmp_path / "fp8", dequantize_fp8=True)
    assert read.shape == SHAPE and len(read.carried) == len(visual)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": None}, "text_config is missing, or is not an object"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True is not supported"),
        ({"text_config": config()["text_config"] | {"model_type": "llama"}}, "model_type 'llama' is not supported"),
        ({"text_config": config()["text_config"] | {"attn_output_gate": False}}, "attn_output_gate False is not"),
        ({"text_config": config()["text_config"] | {"hidden_size": 48}}, "out_hidden_size 64 is not hidden_size 48"),
    ],
)
def test_configs_that_are_not_this_are_refused(change: dict[str, Any], message: str, vlm: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((vlm / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config() | change))
    with pytest.raises((ShapeError, CheckpointError), match=message):
        open_checkpoint(tmp_path)


def test_what_travels_is_read_back(vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_slim.checkpoint import carried

    write = carried.OutputFile.write_at
    monkeypatch.setattr(carried.OutputFile, "write_at", lambda self, at, data: write(self, at, bytes(len(data))))
    with pytest.raises(CheckpointError, match=r"model.visual.* not what was written when read back"):
        open_checkpoint(vlm).carried.save(tmp_path, verify=True)


def test_mtp_may_be_left_out_and_full_attention_alone(tmp_path: Path) -> None:
    shape = dataclasses.replace(SHAPE, num_layers=2, layer_types=(FULL_ATTENTION,) * 2)
    source = open_checkpoint(write_vlm(tmp_path / "hf", shape), without_mtp=True)
    assert source.shape.mtp_num_layers == 0 and source.shape.num_layers == 2
    write_checkpoint(source, tmp_path / "out", to="hf")
    assert open_checkpoint(tmp_path / "out").shape == source.shape
    load_vlm(tmp_path / "out")
