"""Megatron's layouts, against transformers' own code and against reshapes written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import weights
from megatron_slim.architecture.weight import Weight
from megatron_slim.checkpoint.layout import (
    from_megatron,
    rows_in_megatron,
    runs_of_sources,
    split_keys,
    stored_shapes,
    to_megatron,
)
from megatron_slim.testing import random_tensors, tiny_shape

SHAPES = [
    tiny_shape(),
    tiny_shape(num_query_groups=1, linear_num_key_heads=4),
    tiny_shape(
        num_query_groups=4, linear_num_value_heads=6, linear_value_head_dim=8, kv_channels=24, num_moe_experts=3
    ),
]


def _find(shape: ModelShape, ending: str) -> Weight:
    return next(weight for weight in weights(shape) if weight.key.endswith(ending))


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_bit_for_bit(shape: ModelShape) -> None:
    tensors = random_tensors(shape)
    seen: set[str] = set()
    for weight in weights(shape):
        parameter = to_megatron(weight, shape, tensors.__getitem__)
        assert tuple(parameter.shape) == weight.shape(shape)
        for name, tensor in from_megatron(weight, shape, parameter).items():
            assert tensor.is_contiguous()
            assert torch.equal(tensor, tensors[name]), name
            seen.add(name)
    assert seen == tensors.keys()


@pytest.mark.parametrize("shape", SHAPES)
def test_one_expert_is_a_slice_of_all(shape: ModelShape) -> None:
    tensors = random_tensors(shape)
    for weight in (w for w in weights(shape) if w.stacked):
        whole = to_megatron(weight, shape, tensors.__getitem__)
        for expert in range(shape.num_moe_experts):
            one = to_megatron(weight, shape, tensors.__getitem__, expert=expert)
            assert torch.equal(one, whole[expert])
            for name, tensor in from_megatron(weight, shape, one, expert=expert).items():
                assert torch.equal(tensor, tensors[name])


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_qkv_is_per_group_queries_gates_key_value(shape: ModelShape) -> None:
    weight = _find(shape, "3.self_attention.linear_qkv.weight")
    tensors = random_tensors(shape)
    groups, dim, hidden = shape.num_query_groups, shape.kv_channels, shape.hidden_size
    prefix = "model.layers.3.self_attn"
    query, gate = tensors[f"{prefix}.q_proj.weight"].view(groups, -1, 2, dim, hidden).unbind(2)
    key = tensors[f"{prefix}.k_proj.weight"].view(groups, 1, dim, hidden)
    value = tensors[f"{prefix}.v_proj.weight"].view(groups, 1, dim, hidden)
    expected = torch.cat([query, gate, key, value], dim=1).reshape(-1, hidden)
    assert torch.equal(to_megatron(weight, shape, tensors.__getitem__), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_gdn_in_proj_is_grouped_as_transformers_ungroups_it(shape: ModelShape) -> None:
    """`Qwen3NextGatedDeltaNet.fix_query_key_value_ordering` is what takes HF's interleaved rows apart."""
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    prefix = "model.layers.0.linear_attn"
    tensors = {name: tensor.float() for name, tensor in random_tensors(shape).items()}

    class Sizes:
        num_k_heads, num_v_heads = shape.linear_num_key_heads, shape.linear_num_value_heads
        head_k_dim, head_v_dim = shape.linear_key_head_dim, shape.linear_value_head_dim

    x = torch.eye(shape.hidden_size)[None]
    qkvz = x @ tensors[f"{prefix}.in_proj_qkvz.weight"].T
    ba = x @ tensors[f"{prefix}.in_proj_ba.weight"].T
    parts = modeling.Qwen3NextGatedDeltaNet.fix_query_key_value_ordering(Sizes, qkvz, ba)
    expected = torch.cat([part.reshape(1, shape.hidden_size, -1) for part in parts], dim=-1)[0].T
    weight = _find(shape, "0.self_attention.in_proj.weight")
    assert torch.equal(to_megatron(weight, shape, tensors.__getitem__), expected)


def test_swiglu_is_gate_then_up() -> None:
    shape = tiny_shape()
    tensors = random_tensors(shape)
    parameter = to_megatron(_find(shape, "0.mlp.experts.experts.linear_fc1.weight"), shape, tensors.__getitem__)
    gate, up = (tensors[f"model.layers.0.mlp.experts.5.{kind}_proj.weight"] for kind in ("gate", "up"))
    assert torch.equal(parameter[5], torch.cat([gate, up]))


def test_a_tensor_with_the_same_layout_is_not_copied() -> None:
    shape = tiny_shape()
    tensors = random_tensors(shape)
    assert to_megatron(_find(shape, "output_layer.weight"), shape, tensors.__getitem__) is tensors["lm_head.weight"]


def test_split_keys_tile_the_parameter() -> None:
    shape = tiny_shape()
    weight = _find(shape, "0.self_attention.in_proj.weight")
    keys = split_keys(weight, shape)
    assert [key.rsplit(".", 1)[1] for key, _ in keys] == ["query", "key", "value", "z", "beta", "alpha"]
    rows = [row for _, run in keys for row in range(run.start, run.stop)]
    assert rows == list(range(weight.shape(shape)[0]))
    assert sum(size[0] for _, size in stored_shapes(weight, shape)) == weight.shape(shape)[0]


def test_tensors_of_an_expert_are_runs_of_its_parameter() -> None:
    shape = tiny_shape()
    both, down = (_find(shape, f"0.mlp.experts.experts.linear_fc{i}.weight") for i in (1, 2))
    assert runs_of_sources(both, shape) == [slice(0, 32), slice(32, 64)]
    assert runs_of_sources(down, shape) == [slice(0, 64)]
    assert runs_of_sources(_find(shape, "3.self_attention.linear_qkv.weight"), shape) is None


def test_rows_in_megatron_are_where_conversion_puts_them() -> None:
    shape = tiny_shape(layer_types=("linear_attention", "full_attention"))
    for weight in weights(shape):
        if weight.stacked:
            continue
        rows = weight.shape(shape)[0]
        numbers = torch.arange(rows).reshape(rows, *(1,) * (len(weight.dims) - 1)).expand(weight.shape(shape))
        for source, tensor in enumerate(from_megatron(weight, shape, numbers).values()):
            assert rows_in_megatron(weight, shape, source).tolist() == tensor.reshape(len(tensor), -1)[:, 0].tolist()


def test_mixed_types_are_refused() -> None:
    shape = tiny_shape()
    tensors: dict[str, Any] = random_tensors(shape)
    name = "model.layers.0.mlp.shared_expert.up_proj.weight"

    def read(wanted: str) -> Tensor:
        return tensors[wanted].float() if wanted == name else tensors[wanted]

    with pytest.raises(AssertionError, match="mixed dtypes"):
        to_megatron(_find(shape, "0.mlp.shared_experts.linear_fc1.weight"), shape, read)
