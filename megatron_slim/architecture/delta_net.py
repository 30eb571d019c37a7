"""Gated DeltaNet (arXiv 2412.06464): its rows, and what it declares of itself (imports no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_slim.aliases import Keywords
from megatron_slim.architecture.axes import concat, label, product
from megatron_slim.architecture.family import LINEAR_ATTENTION
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

TRIANGLE = 64  # columns of the triangle that fla keeps per token and head
_KEY_HEADS = product("gdn_key_head", "gdn_key_dim")
VALUE_HEADS = product("gdn_key_head", "gdn_value_per_key", "gdn_value_dim")
HEAD_SCALARS = product("gdn_key_head", "gdn_value_per_key")
GDN_QKV = (label("query", _KEY_HEADS), label("key", _KEY_HEADS), label("value", VALUE_HEADS))


def delta_net_rows(*projections: HFTensor) -> tuple[Weight, ...]:
    """Gated DeltaNet, whose projection of the input a family stores as these tensors."""
    scalars = (label("beta", HEAD_SCALARS), label("alpha", HEAD_SCALARS))
    return (
        copied("self_attention.in_proj.layer_norm_weight", "input_layernorm.weight", "hidden"),
        Weight(
            "self_attention.in_proj.weight",
            (concat(*GDN_QKV, label("z", VALUE_HEADS), *scalars), "hidden"),
            projections,
            tp_dim=0,
            split=True,
        ),
        Weight(
            "self_attention.conv1d.weight",
            (concat(*GDN_QKV), "one", "conv_kernel"),
            (HFTensor("linear_attn.conv1d.weight", (concat(*GDN_QKV), "one", "conv_kernel")),),
            tp_dim=0,
            split=True,
        ),
        copied("self_attention.A_log", "linear_attn.A_log", HEAD_SCALARS, tp_dim=0, float32=True),
        copied("self_attention.dt_bias", "linear_attn.dt_bias", HEAD_SCALARS, tp_dim=0, float32=True),
        copied("self_attention.out_norm.weight", "linear_attn.norm.weight", "gdn_value_dim", float32=True),
        copied(
            "self_attention.out_proj.weight", "linear_attn.out_proj.weight", "hidden", VALUE_HEADS, tp_dim=1, fp8=True
        ),
    )


HEADS = Heads(
    field="linear_num_value_heads",
    noun="value heads",
    label="linear value heads",
    axis="gdn_value_per_key",
    group_axis="gdn_key_head",
    groups_field="linear_num_key_heads",
    groups_noun="linear key heads",
    width="linear_value_head_dim",
    statistic="linear_attn.value_heads",
    projection="out_proj",
    exchanged=True,  # it needs whole sequences
)


def _operations(shape: ModelShape, seq_length: int, kernels: Kernels) -> dict[str, float]:
    """Products within a chunk (scores of keys and queries, errors, outputs, solved keys), then those with the state."""
    key, value = shape.linear_key_head_dim, shape.linear_value_head_dim
    within_chunk = 2.0 * kernels.delta_rule_chunk * ((3 if kernels.solves_keys else 2) * key + 2 * value)
    return {"delta_rule": shape.linear_num_value_heads * (within_chunk + 6.0 * key * value)}


def _kept(shape: ModelShape, of: MicroBatch) -> float:
    w, heads, dim = of.width, shape.linear_num_value_heads, shape.linear_key_head_dim
    keys, values = shape.linear_num_key_heads * dim, heads * shape.linear_value_head_dim
    channels = 2 * keys + values
    # Before and after; ours convolves again, and keeps the whole projection, with gate, beta and decay.
    convolved = w * (2 * channels if of.fused else channels + values + 2 * heads)
    normed = w * 2 * keys + w * 2 * shape.linear_num_key_heads
    rule = w * (2 * heads * dim + values) + FP32 * heads  # every value head has its queries and keys, and a decay
    decays = 2 * FP32 * heads + w * heads
    gated = 2 * FP32 * values + w * values + w * values  # gate and its silu in fp32, what it multiplies, the product
    output = w * values + FP32 * heads  # also the input of the norm
    if of.fused:
        triangle = w * TRIANGLE * heads
        return convolved + normed + rule + decays + triangle + output + gated
    chunk = of.kernels.delta_rule_chunk
    state = FP32 * heads * dim * shape.linear_value_head_dim / chunk
    within = FP32 * (heads * 3 * chunk + values)  # similarities of queries and keys, the inverse; the errors
    return convolved + normed + rule + decays + state + within + output + gated


def _fp8_sides(shape: ModelShape) -> Iterator[Side]:
    keys = shape.linear_num_key_heads * shape.linear_key_head_dim
    values = shape.linear_num_value_heads * shape.linear_value_head_dim
    rows = 2 * keys + 2 * values + 2 * shape.linear_num_value_heads  # q, k; v, z; beta, alpha
    yield Side("in_proj of Gated DeltaNet", HEADS.field, rows, inputs=False)
    yield Side("out_proj of Gated DeltaNet", HEADS.field, values, inputs=True)


def _config(shape: ModelShape) -> Keywords:
    has_some = LINEAR_ATTENTION in shape.family.rows
    sizes = ("conv_kernel_dim", "key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")
    return {
        "experimental_attention_variant": "gated_delta_net" if has_some else None,
        "linear_attention_freq": [int(kind == LINEAR_ATTENTION) for kind in shape.layer_types] if has_some else None,
        **{f"linear_{size}": getattr(shape, f"linear_{size}") or None for size in sizes},
    }


KIND = AttentionKind(
    name=LINEAR_ATTENTION,
    noun="linear attention",
    part="delta-net",
    parts=projections,
    heads=HEADS,
    not_with_documents=("deterministic_mode",),
    operations=_operations,
    kept=_kept,
    fp8_sides=_fp8_sides,
    expert_fp8_sides=nothing,
    config=_config,
)
