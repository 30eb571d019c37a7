"""GLM-4.5 as transformers writes it and as it is published, through conversion and pruning, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import count_parameters
from megatron_slim.checkpoint.convert import hf_to_torch_dist, same_bytes, torch_dist_to_hf, write_checkpoint
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.errors import CheckpointError, RecipeError, ShapeError
from megatron_slim.pruning.recipe_checks import check_recipe
from megatron_slim.recipe import parse_recipe
from megatron_slim.testing import tiny_hf_config, tiny_shape, write_tiny_checkpoint

CONVERT, PRUNE = "tools/convert_checkpoint.py", "tools/prune_checkpoint.py"
SHAPE = tiny_shape("glm4_moe", mtp_num_layers=0, num_dense_layers=2, qk_layernorm=False)
WHOLE = tiny_shape("glm4_moe", num_layers=5)
COPIES = {"embed_tokens.weight", "shared_head.head.weight"}
Tool = Callable[..., Any]


def on_disk(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def model() -> Glm4MoeForCausalLM:
    torch.manual_seed(0)
    found = Glm4MoeForCausalLM(Glm4MoeConfig(**tiny_hf_config(SHAPE), attn_implementation="eager"))
    for name, tensor in found.state_dict().items():
        # transformers starts norms at exactly 1 and biases at 0, which would hide a wrong one.
        torch.nn.init.normal_(tensor, 1.0 if "norm" in name else 0.0, 0.1)
    return found.eval()


@pytest.fixture(scope="module")
def converted(model: Glm4MoeForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where transformers' own directory ``hf`` is, its torch_dist, and what came ``back``."""
    root = tmp_path_factory.mktemp("glm4-moe")
    model.save_pretrained(root / "hf", max_shard_size="200KB")
    hf_to_torch_dist(root / "hf", root / "torch_dist")
    torch_dist_to_hf(root / "torch_dist", root / "back")
    return root


def test_what_transformers_writes_comes_back_byte_by_byte(model: Glm4MoeForCausalLM, converted: Path) -> None:
    source, back = HFCheckpoint.open(converted / "hf"), HFCheckpoint.open(converted / "back")
    assert source.shape == back.shape == SHAPE
    assert all(same_bytes(source.read(name), back.read(name)) for name in source.names)
    assert count_parameters(SHAPE).total == model.num_parameters()


def test_transformers_reads_what_came_back(model: Glm4MoeForCausalLM, converted: Path) -> None:
    again, info = AutoModelForCausalLM.from_pretrained(
        converted / "back", output_loading_info=True, attn_implementation="eager"
    )
    assert isinstance(again, Glm4MoeForCausalLM) and not any(info.values()), info
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_evaluation_of_either_format(model: Glm4MoeForCausalLM, converted: Path, tool: Tool, tmp_path: Path) -> None:
    samples = np.random.default_rng(3).integers(0, SHAPE.vocab_size, (3, 20))
    np.save(tmp_path / "tokens.npy", samples)
    ids = torch.from_numpy(samples)
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    for name in ("hf", "torch_dist"):
        run = tool("tools/evaluate.py", "--load", converted / name, "--data", tmp_path / "tokens.npy", "--json")
        assert run.code == 0, run.stderr
        assert run.json["loss"] == pytest.approx(expected, rel=1e-6) and run.json["mtp_loss"] == []


# --- the MTP block: behind the trunk, with copies of embedding and output layer or without ---


@pytest.mark.parametrize("copies", [True, False], ids=["4.5", "4.6"])
def test_every_byte_of_the_files_comes_back(copies: bool, tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", WHOLE, copies=copies)
    files = on_disk(source)
    names = {f"model.layers.5.{name}" for name in COPIES}
    assert names & files.keys() == (names if copies else set())
    hf_to_torch_dist(source, tmp_path / "torch_dist", processes=2)
    torch_dist_to_hf(tmp_path / "torch_dist", tmp_path / "back", processes=2)
    back = on_disk(tmp_path / "back")
    assert back.keys() == files.keys() and all(same_bytes(back[name], files[name]) for name in files)
    for path in (source, tmp_path / "back"):
        assert HFCheckpoint.open(path).copies == (COPIES if copies else set())


def test_copies_of_a_pruned_model_are_those_of_its_own(tool: Tool, tmp_path: Path) -> None:
    """The MTP block moves up behind the layers that are left; so it is in block-scaled FP8."""
    source = write_tiny_checkpoint(tmp_path / "hf", WHOLE, copies=True)
    (tmp_path / "r.yaml").write_text("version: 1\ntarget: {num_layers: 3, hidden_size: 48, num_moe_experts: 4}\n")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 128, (3, 16)))
    given = ("--load", source, "--recipe", tmp_path / "r.yaml", "--calibration-data", tmp_path / "tokens.npy")
    done = tool(PRUNE, *given, "--save", tmp_path / "out")
    assert done.code == 0, done.stderr
    write_checkpoint(HFCheckpoint.open(tmp_path / "out"), tmp_path / "fp8", to="hf", quantize="fp8")
    for path in (tmp_path / "out", tmp_path / "fp8"):
        files = on_disk(path)
        assert torch.equal(files["model.layers.3.embed_tokens.weight"], files["model.embed_tokens.weight"])
        assert torch.equal(files["model.layers.3.shared_head.head.weight"], files["lm_head.weight"])
        assert files["lm_head.weight"].shape == (128, 48) and "model.layers.5.eh_proj.weight" not in files
    listed = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert {"model.layers.3.shared_head.head", "model.layers.3.embed_tokens"} <= {*listed["modules_to_not_convert"]}


@pytest.mark.parametrize("row", [3, 100], ids=["at the start", "far behind"])
def test_another_embedding_in_the_mtp_block_is_refused(row: int, tool: Tool, tmp_path: Path) -> None:
    """Where the first rows differ on opening, and else when it is read; nothing is written."""
    source = write_tiny_checkpoint(tmp_path / "hf", WHOLE, copies=True, shards=1)
    files = on_disk(source)
    files["model.layers.5.embed_tokens.weight"][row, 7] += 1
    save_file(files, source / "model.safetensors")
    message = "model.layers.5.embed_tokens.weight is not a copy of model.embed_tokens.weight"
    done = tool(CONVERT, "--load", source, "--save", tmp_path / "out", "--to", "torch_dist")
    assert done.code == 2 and message in done.error and "--without-mtp" in done.error
    assert not (tmp_path / "out").exists()
    if row < 64:
        with pytest.raises(CheckpointError, match="is not a copy"):
            HFCheckpoint.open(source)
    without = tool(CONVERT, "--load", source, "--save", tmp_path / "out", "--to", "torch_dist", "--without-mtp")
    assert without.code == 0 and HFCheckpoint.open(source, without_mtp=True).shape.mtp_num_layers == 0


def test_a_copy_of_another_shape_is_refused(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", WHOLE, copies=True, shards=1)
    files = on_disk(source)
    files["model.layers.5.shared_head.head.weight"] = torch.zeros(128, 32, dtype=torch.bfloat16)
    save_file(files, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"shared_head\.head\.weight is not a copy of lm_head\.weight"):
        HFCheckpoint.open(source)


def test_a_declared_block_without_tensors_names_where_it_would_be(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", WHOLE.replace(mtp_num_layers=0))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    with pytest.raises(CheckpointError, match=r"there is no model\.layers\.5\.\* tensor"):
        HFCheckpoint.open(source)


# --- what is refused ---


def _config(**changes: Any) -> dict[str, Any]:
    return {**tiny_hf_config(SHAPE), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob False is not supported (only True)"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported (only 'sigmoid')"),
        ({"first_k_dense_replace": 4}, "num_dense_layers 4 of num_layers 4 leave none with experts"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace -1 is not an integer of zero or more"),
        ({"n_shared_experts": 0}, "n_shared_experts 0 is not a positive integer"),
        ({"n_group": 3}, "num_moe_experts 8 are not groups of two or more, 3 in number"),
        ({"n_group": 4, "topk_group": 2}, "moe_router_topk 2 is not twice moe_router_group_topk 2"),
        ({"n_group": 2, "topk_group": 3}, "moe_router_topk 2 do not fit into 3 of 2 groups of 4 experts"),
        ({"topk_group": 2}, "moe_router_group_topk 2 of one group"),
        ({"attention_bias": 1}, "attention_bias 1 is neither true nor false"),
        ({"routed_scaling_factor": "1"}, "routed_scaling_factor '1' is not a finite number"),
    ],
)
def test_what_megatron_would_compute_otherwise_is_refused(changes: dict[str, Any], message: str) -> None:
    from megatron_slim.architecture.hf_config import shape_from_hf_config

    with pytest.raises(ShapeError) as caught:
        shape_from_hf_config(_config(**changes), mtp_num_layers=0)
    assert message in str(caught.value)


def grouped(**sizes: int) -> ModelShape:
    return tiny_shape("glm4_moe", moe_router_topk=4, moe_router_num_groups=4, moe_router_group_topk=2, **sizes)


def test_groups_of_experts_stay_equal() -> None:
    """The router chooses groups first: each must lose as many experts."""
    recipe = {"version": 1, "target": {"num_moe_experts": 8}, "experts": {"num_groups": 4}}
    check_recipe(parse_recipe(recipe), grouped(num_moe_experts=16))
    with pytest.raises(RecipeError, match=r"experts\.num_groups 1 is not a multiple of 4, the groups that the router"):
        check_recipe(parse_recipe({**recipe, "experts": {}}), grouped(num_moe_experts=16))
    with pytest.raises(RecipeError, match="not twice moe_router_group_topk 2"):
        check_recipe(parse_recipe({"version": 1, "target": {"moe_router_topk": 3}}), grouped())
    with pytest.raises(RecipeError, match="moe_shared_expert_intermediate_size 32 is not a multiple of"):
        check_recipe(parse_recipe({"version": 1, "target": {"moe_ffn_hidden_size": 24}}), SHAPE)


@pytest.mark.parametrize(("method", "kept"), [("last", (0, 1, 2)), ("block_influence", (0, 1, 3))])
def test_a_layer_with_experts_is_left(method: str, kept: tuple[int, ...]) -> None:
    """Where the dense layers matter most, the best of the others takes the last one's place."""
    from megatron_slim.pruning.depth import kept_layers, possible_depths
    from megatron_slim.pruning.statistics import Statistics

    shape = tiny_shape("glm4_moe", num_layers=5, num_dense_layers=3)
    influence = [0.9, 0.8, 0.5, 0.2, 0.1]
    stats = {f"model.layers.{n}.block_influence": np.float32(value) for n, value in enumerate(influence)}
    recipe = parse_recipe({"version": 1, "target": {"num_layers": 3}, "depth": {"method": method}})
    if method == "last":
        with pytest.raises(RecipeError, match=r"target\.num_layers 3 leaves no full_attention layer with experts"):
            check_recipe(recipe, shape)
        return
    check_recipe(recipe, shape)
    assert kept_layers(recipe, Statistics(stats, {}), shape) == kept
    dense = {sum(kind == "dense" for _, kind in depth) for depth in possible_depths(recipe, shape, 3)}
    assert dense == {1, 2, 3}
