from __future__ import annotations

from typing import Any

import pytest

from megatron_slim.architecture.hf_config import shape_from_hf_config
from megatron_slim.architecture.published import (
    GLM_4_5,
    GLM_4_5_AIR,
    QWEN3_5_35A3B,
    QWEN3_5_122A10B,
    QWEN3_30A3B,
    QWEN3_NEXT_80A3B,
    Published,
)
from megatron_slim.architecture.shape import FAMILIES, FULL_ATTENTION, LINEAR_ATTENTION, ModelShape, layer_pattern
from megatron_slim.architecture.table import copies_of, count_parameters, hf_tensors, mtp_layers_in, weights
from megatron_slim.testing import tiny_hf_config, tiny_shape

PUBLISHED, PUBLISHED_MOE = QWEN3_NEXT_80A3B.config, QWEN3_30A3B.config


def published(**changes: Any) -> ModelShape:
    shape = shape_from_hf_config(PUBLISHED, mtp_num_layers=1)
    if "num_layers" in changes:
        changes["layer_types"] = layer_pattern(changes["num_layers"], 4)
    return shape.replace(**changes)


def test_parameters_of_the_published_model() -> None:
    assert count_parameters(published()).total == 81_324_862_720
    assert count_parameters(published(), include_mtp=False).total == 79_674_391_296


def test_parameters_of_the_published_qwen3_moe() -> None:
    """30.5B and 3.3B active, says its model card; transformers counts on the meta device."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    shape = shape_from_hf_config(PUBLISHED_MOE, mtp_num_layers=0)
    counted = count_parameters(shape)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**PUBLISHED_MOE))
    assert counted.total == model.num_parameters() == 30_532_122_624
    assert 3.3e9 <= counted.active < 3.4e9
    assert len(hf_tensors(shape)) == 18_867


@pytest.mark.parametrize(
    ("published", "total", "active"),
    [(QWEN3_5_35A3B, 34_660_610_688, 3_454_988_928), (QWEN3_5_122A10B, 122_111_526_912, 9_771_288_576)],
)
def test_parameters_of_the_published_qwen3_5(published: Published, total: int, active: int) -> None:
    """Of the language model, without MTP; 35B-A3B has 3.46B active. transformers counts on the meta device."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    counted = count_parameters(published.shape, include_mtp=False)
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**published.config["text_config"])
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert counted.total == model.num_parameters() == total and counted.active == active


@pytest.mark.parametrize(
    ("published", "trunk", "files"),
    [(GLM_4_5_AIR, 106_852_245_504, 110_468_824_832), (GLM_4_5, 352_797_814_784, 358_337_791_296)],
)
def test_parameters_of_the_published_glm(published: Published, trunk: int, files: int) -> None:
    """transformers counts the trunk on the meta device; files of 110B and 358B have MTP, its copies and biases too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    shape = published.shape
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**published.config))
    assert count_parameters(shape, include_mtp=False).total == model.num_parameters() == trunk
    biases = shape.num_moe_experts * len(list(shape.routed_blocks))
    copies = len(copies_of(shape)) * shape.vocab_size * shape.hidden_size
    assert count_parameters(shape).total + biases + copies == files
    stored = sum(row.numel(shape) for row in weights(shape))
    assert stored + copies == files


def test_tensors_of_the_published_qwen3_5() -> None:
    """1,811, of which 333 are the vision tower's; experts of the trunk are fused, those of the MTP block are not."""
    shape = QWEN3_5_35A3B.shape
    names = hf_tensors(shape, [block for block in shape.blocks if block.startswith("model.")])
    assert len(names) == 1_811 - 333
    assert sum(name.startswith("mtp.") for name in names) == 785


def test_tensors_of_the_published_checkpoint() -> None:
    names = hf_tensors(published())
    assert len(names) == 75_944
    assert sum(name.startswith("mtp.") for name in names) == 1_553


@pytest.mark.parametrize(
    ("changes", "total", "active"),
    [
        # SlimQwen, table 6 (80B/3.8B, 23B/2B, 6B/1B) and section 3.2; counted without MTP, in billions.
        ({}, 79.7, 3.9),
        ({"num_layers": 36, "hidden_size": 1536, "num_moe_experts": 256, "moe_router_topk": 8}, 23.2, 2.1),
        ({"num_layers": 32, "hidden_size": 1536, "num_moe_experts": 256, "moe_router_topk": 8}, 20.7, 1.9),
        ({"num_layers": 20, "hidden_size": 1280, "num_moe_experts": 128, "moe_router_topk": 8}, 5.9, 1.1),
    ],
)
def test_parameters_of_the_papers_models(changes: dict[str, Any], total: float, active: float) -> None:
    count = count_parameters(published(**changes), include_mtp=False)
    assert (round(count.total / 1e9, 1), round(count.active / 1e9, 1)) == (total, active)


@pytest.mark.parametrize(
    "shape",
    [
        *map(tiny_shape, FAMILIES),
        tiny_shape(mtp_num_layers=0, num_query_groups=4, linear_num_value_heads=2),
        tiny_shape(layer_types=(FULL_ATTENTION, LINEAR_ATTENTION, LINEAR_ATTENTION), moe_router_topk=8),
        tiny_shape("qwen3_moe", num_query_groups=1, kv_channels=24, num_moe_experts=5),
    ],
)
def test_the_table_is_what_transformers_builds(shape: ModelShape) -> None:
    """Names and shapes against transformers' models, trunk and MTP block, on the meta device; they fuse the experts."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    from tests.mtp_oracle import named, new_mtp

    config = transformers.AutoConfig.for_model(**tiny_hf_config(shape))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        tensors = model.state_dict()
        if shape.mtp_num_layers:
            tensors |= named(new_mtp(model).state_dict().items(), shape)
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    ours = {name: tensor.shape(shape) for name, tensor in hf_tensors(shape).items()}
    experts, ffn = shape.num_moe_experts, shape.moe_ffn_hidden_size
    for block in shape.routed_blocks:
        prefix = f"{shape.hf_prefix(block)}.mlp.experts"
        for expert in range(experts):
            assert ours.pop(f"{prefix}.{expert}.gate_proj.weight") == (ffn, shape.hidden_size)
            assert ours.pop(f"{prefix}.{expert}.up_proj.weight") == (ffn, shape.hidden_size)
            assert ours.pop(f"{prefix}.{expert}.down_proj.weight") == (shape.hidden_size, ffn)
        assert theirs.pop(f"{prefix}.gate_up_proj") == (experts, 2 * ffn, shape.hidden_size)
        assert theirs.pop(f"{prefix}.down_proj") == (experts, shape.hidden_size, ffn)
    assert ours == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_parameters_hold_the_same_elements(family: str) -> None:
    shape = tiny_shape(family)
    for weight in weights(shape):
        total = 0
        for tensor, _ in weight.hf_tensors(shape):
            numel = 1
            for extent in tensor.shape(shape):
                numel *= extent
            total += numel
        assert total == weight.numel(shape), weight.key
    keys = [weight.key for weight in weights(shape)]
    assert len(keys) == len(set(keys))


def test_mtp_is_found_by_tensor_names() -> None:
    shape = tiny_shape()
    names = set(hf_tensors(shape))
    assert mtp_layers_in(names, shape) == 1
    assert mtp_layers_in({name for name in names if not name.startswith("mtp.")}, shape) == 0
    assert mtp_layers_in({"mtp.fc.weight"}, shape) == 1
    assert mtp_layers_in({"mtp.layers.1.mlp.gate.weight"}, shape) == 2


def test_mtp_is_found_behind_the_trunk() -> None:
    """As GLM's is, under the numbers that follow those of the trunk."""
    shape = tiny_shape("glm4_moe")
    names = set(hf_tensors(shape))
    assert mtp_layers_in(names, shape) == 1
    assert mtp_layers_in(names, shape.replace(num_layers=5, layer_types=(FULL_ATTENTION,) * 5)) == 0
    assert mtp_layers_in({"model.layers.5.enorm.weight"}, shape) == 2
    assert mtp_layers_in({"model.layers.x.enorm.weight", "mtp.fc.weight"}, shape) == 0
