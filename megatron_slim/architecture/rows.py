"""Rows that the families of models share."""

from __future__ import annotations

from megatron_slim.architecture.axes import concat, label, product
from megatron_slim.architecture.weight import HFTensor, Weight, copied, gated_mlp

EMBEDDING_ROWS = (copied("embedding.word_embeddings.weight", "model.embed_tokens.weight", "vocab", "hidden", tp_dim=0),)
HEAD_ROWS = (
    copied("decoder.final_layernorm.weight", "model.norm.weight", "hidden"),
    copied("output_layer.weight", "lm_head.weight", "vocab", "hidden", tp_dim=0),
)

ROUTED_MOE_ROWS = (
    copied("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "hidden"),
    copied("mlp.router.weight", "mlp.gate.weight", "expert", "hidden"),
    *gated_mlp("mlp.experts.experts", "mlp.experts.{expert}", "moe_ffn", stacked=True),
)
SHARED_EXPERT_ROWS = (
    *gated_mlp("mlp.shared_experts", "mlp.shared_expert", "shared_ffn"),
    copied("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", "one", "hidden"),
)

_PAIR = concat("hidden", "hidden")
MTP_ROWS = (
    copied("eh_proj.weight", "mtp.fc.weight", "hidden", _PAIR, tp_dim=0),
    copied("enorm.weight", "mtp.pre_fc_norm_embedding.weight", "hidden"),
    copied("hnorm.weight", "mtp.pre_fc_norm_hidden.weight", "hidden"),
    copied("final_layernorm.weight", "mtp.norm.weight", "hidden"),
)

_GATED_QUERIES, _GATES = (product("query_per_group", label(name, "head_dim")) for name in ("query", "gate"))
_QUERIES = product("query_per_group", label("query", "head_dim"))
_QUERY_AND_GATE = concat(label("query", "head_dim"), label("gate", "head_dim"))
_KEY, _VALUE = label("key", "head_dim"), label("value", "head_dim")
_KEY_AND_VALUE = (
    HFTensor("self_attn.k_proj.weight", (product("kv_group", _KEY), "hidden")),
    HFTensor("self_attn.v_proj.weight", (product("kv_group", _VALUE), "hidden")),
)
QKV = Weight(
    "self_attention.linear_qkv.weight",
    (product("kv_group", concat(_QUERIES, _KEY, _VALUE)), "hidden"),
    (HFTensor("self_attn.q_proj.weight", (product("kv_group", _QUERIES), "hidden")), *_KEY_AND_VALUE),
    tp_dim=0,
)
# A gate for every head's output follows its query.
GATED_QKV = Weight(
    "self_attention.linear_qkv.weight",
    (product("kv_group", concat(_GATED_QUERIES, _GATES, _KEY, _VALUE)), "hidden"),
    (
        HFTensor("self_attn.q_proj.weight", (product("kv_group", "query_per_group", _QUERY_AND_GATE), "hidden")),
        *_KEY_AND_VALUE,
    ),
    tp_dim=0,
)


def attention_rows(qkv: Weight) -> tuple[Weight, ...]:
    """Full attention around its projection of queries, keys and values."""
    heads = product("kv_group", "query_per_group", "head_dim")
    return (
        copied("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "hidden"),
        qkv,
        copied("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "hidden", heads, tp_dim=1),
        copied("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "head_dim"),
        copied("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "head_dim"),
    )


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
        copied("self_attention.out_proj.weight", "linear_attn.out_proj.weight", "hidden", VALUE_HEADS, tp_dim=1),
    )
