"""Full attention: its rows, with and without an output gate, and what it declares of itself (imports no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_slim.aliases import Keywords
from megatron_slim.architecture.axes import concat, label, product
from megatron_slim.architecture.family import FULL_ATTENTION
from megatron_slim.architecture.prunable import Heads
from megatron_slim.architecture.sublayer_kind import (
    FP32,
    AttentionKind,
    Kernels,
    MicroBatch,
    Side,
    nothing,
    projections,
)
from megatron_slim.architecture.weight import HFTensor, Weight, copied

if TYPE_CHECKING:
    from megatron_slim.architecture.shape import ModelShape

_GATED_QUERIES, _GATES = (product("query_per_group", label(name, "head_dim")) for name in ("query", "gate"))
_QUERIES = product("query_per_group", label("query", "head_dim"))
_QUERY_AND_GATE = concat(label("query", "head_dim"), label("gate", "head_dim"))
_KEY, _VALUE = label("key", "head_dim"), label("value", "head_dim")
_KEY_AND_VALUE = (
    HFTensor("self_attn.k_proj.weight", (product("kv_group", _KEY), "hidden"), fp8=True),
    HFTensor("self_attn.v_proj.weight", (product("kv_group", _VALUE), "hidden"), fp8=True),
)
QKV = Weight(
    "self_attention.linear_qkv.weight",
    (product("kv_group", concat(_QUERIES, _KEY, _VALUE)), "hidden"),
    (HFTensor("self_attn.q_proj.weight", (product("kv_group", _QUERIES), "hidden"), fp8=True), *_KEY_AND_VALUE),
    tp_dim=0,
)
# A gate for every head's output follows its query.
GATED_QKV = Weight(
    "self_attention.linear_qkv.weight",
    (product("kv_group", concat(_GATED_QUERIES, _GATES, _KEY, _VALUE)), "hidden"),
    (
        HFTensor(
            "self_attn.q_proj.weight", (product("kv_group", "query_per_group", _QUERY_AND_GATE), "hidden"), fp8=True
        ),
        *_KEY_AND_VALUE,
    ),
    tp_dim=0,
)


# Of a model with biases: one row of which each number is a row of the projection above.
QKV_BIAS = Weight(
    "self_attention.linear_qkv.bias",
    QKV.dims[:1],
    tuple(HFTensor(source.name.replace(".weight", ".bias"), source.dims[:1]) for source in QKV.sources),
    tp_dim=0,
    when="add_qkv_bias",
)


def attention_rows(*qkv: Weight) -> tuple[Weight, ...]:
    """Full attention around its projection of queries, keys and values."""
    heads = product("kv_group", "query_per_group", "head_dim")
    return (
        copied("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "hidden"),
        *qkv,
        copied("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "hidden", heads, tp_dim=1, fp8=True),
        copied("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "head_dim", when="qk_layernorm"),
        copied("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "head_dim", when="qk_layernorm"),
    )


HEADS = Heads(
    field="num_attention_heads",
    noun="query heads",
    label="query heads",
    axis="query_per_group",
    group_axis="kv_group",
    groups_field="num_query_groups",
    groups_noun="KV groups",
    width="kv_channels",
    statistic="self_attn.heads",
    projection="linear_proj",
    exchanged=False,
)


def _operations(shape: ModelShape, seq_length: int, kernels: Kernels) -> dict[str, float]:
    scores = 4.0 * seq_length * shape.num_attention_heads * shape.kv_channels
    return {"core_attn": scores / 2 if kernels.skips_masked else scores}


def _kept(shape: ModelShape, of: MicroBatch) -> float:
    """Letters: q queries, k keys of a token."""
    w, heads, groups = of.width, shape.num_attention_heads, shape.num_query_groups
    q, k = heads * shape.kv_channels, groups * shape.kv_channels
    gate = (FP32 + w) * q if shape.family.attention_output_gate else 0.0  # its sigmoid, and what is multiplied by it
    projected = w * (q * (2 if shape.family.attention_output_gate else 1) + 2 * k)
    rotated = w * (q + k)
    if shape.qk_layernorm:
        rotated += FP32 * (heads + groups)  # the roots of their norms
    found = projected + rotated + (w * q + FP32 * heads) + gate
    if not of.fused:  # sines and cosines of all samples once, and what the norm of queries takes
        found += 4 * w * shape.rotary_dim / of.samples + (w * q if shape.qk_layernorm else 0.0)
    if not of.kernels.skips_masked:  # scores in fp32, the same rounded, and one mask for all samples
        found += of.seq_length * (heads * (FP32 + w if w < FP32 else FP32) + 1 / of.samples)
    return found


def _fp8_sides(shape: ModelShape) -> Iterator[Side]:
    queries = shape.num_attention_heads * shape.kv_channels
    gated = 2 if shape.family.attention_output_gate else 1
    rows = gated * queries + 2 * shape.num_query_groups * shape.kv_channels
    yield Side("linear_qkv", HEADS.field, rows, inputs=False)
    yield Side("linear_proj", HEADS.field, queries, inputs=True)


def _config(shape: ModelShape) -> Keywords:
    return {
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "qk_layernorm": shape.qk_layernorm,
        "attention_output_gate": shape.family.attention_output_gate,
        "add_qkv_bias": shape.add_qkv_bias,
    }


KIND = AttentionKind(
    name=FULL_ATTENTION,
    noun="full attention",
    part="attention",
    parts=projections,
    heads=HEADS,
    operations=_operations,
    kept=_kept,
    fp8_sides=_fp8_sides,
    expert_fp8_sides=nothing,
    config=_config,
)
