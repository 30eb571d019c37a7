"""The rows of Qwen3-Next: every tensor once, with both its names, its axes and its layout."""

from __future__ import annotations

from megatron_slim.architecture.axes import concat, label, product
from megatron_slim.architecture.weight import HFTensor, Weight, copied, gated_mlp

_QUERY_HEADS = product("kv_group", "query_per_group", "head_dim")
_KEY_HEADS = product("gdn_key_head", "gdn_key_dim")
_VALUE_HEADS = product("gdn_key_head", "gdn_value_per_key", "gdn_value_dim")
_HEAD_SCALARS = product("gdn_key_head", "gdn_value_per_key")
_GDN_QKV = (label("query", _KEY_HEADS), label("key", _KEY_HEADS), label("value", _VALUE_HEADS))


FULL_ATTENTION_ROWS = (
    copied("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "hidden"),
    Weight(
        "self_attention.linear_qkv.weight",
        (
            product(
                "kv_group",
                concat(
                    product("query_per_group", label("query", "head_dim")),
                    product("query_per_group", label("gate", "head_dim")),
                    label("key", "head_dim"),
                    label("value", "head_dim"),
                ),
            ),
            "hidden",
        ),
        (
            HFTensor(
                "self_attn.q_proj.weight",
                (
                    product(
                        "kv_group", "query_per_group", concat(label("query", "head_dim"), label("gate", "head_dim"))
                    ),
                    "hidden",
                ),
            ),
            HFTensor("self_attn.k_proj.weight", (product("kv_group", label("key", "head_dim")), "hidden")),
            HFTensor("self_attn.v_proj.weight", (product("kv_group", label("value", "head_dim")), "hidden")),
        ),
        tp_dim=0,
    ),
    copied("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "hidden", _QUERY_HEADS, tp_dim=1),
    copied("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "head_dim"),
    copied("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "head_dim"),
)

LINEAR_ATTENTION_ROWS = (
    copied("self_attention.in_proj.layer_norm_weight", "input_layernorm.weight", "hidden"),
    Weight(
        "self_attention.in_proj.weight",
        (
            concat(*_GDN_QKV, label("z", _VALUE_HEADS), label("beta", _HEAD_SCALARS), label("alpha", _HEAD_SCALARS)),
            "hidden",
        ),
        (
            HFTensor(
                "linear_attn.in_proj_qkvz.weight",
                (
                    product(
                        "gdn_key_head",
                        concat(
                            label("query", "gdn_key_dim"),
                            label("key", "gdn_key_dim"),
                            label("value", "gdn_value_per_key", "gdn_value_dim"),
                            label("z", "gdn_value_per_key", "gdn_value_dim"),
                        ),
                    ),
                    "hidden",
                ),
            ),
            HFTensor(
                "linear_attn.in_proj_ba.weight",
                (
                    product(
                        "gdn_key_head",
                        concat(label("beta", "gdn_value_per_key"), label("alpha", "gdn_value_per_key")),
                    ),
                    "hidden",
                ),
            ),
        ),
        tp_dim=0,
        split=True,
    ),
    Weight(
        "self_attention.conv1d.weight",
        (concat(*_GDN_QKV), "one", "conv_kernel"),
        (HFTensor("linear_attn.conv1d.weight", (concat(*_GDN_QKV), "one", "conv_kernel")),),
        tp_dim=0,
        split=True,
    ),
    copied("self_attention.A_log", "linear_attn.A_log", _HEAD_SCALARS, tp_dim=0),
    copied("self_attention.dt_bias", "linear_attn.dt_bias", _HEAD_SCALARS, tp_dim=0),
    copied("self_attention.out_norm.weight", "linear_attn.norm.weight", "gdn_value_dim"),
    copied("self_attention.out_proj.weight", "linear_attn.out_proj.weight", "hidden", _VALUE_HEADS, tp_dim=1),
)

MOE_ROWS = (
    copied("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "hidden"),
    copied("mlp.router.weight", "mlp.gate.weight", "expert", "hidden"),
    *gated_mlp("mlp.experts.experts", "mlp.experts.{expert}", "moe_ffn", stacked=True),
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

FIRST_ROWS = (copied("embedding.word_embeddings.weight", "model.embed_tokens.weight", "vocab", "hidden", tp_dim=0),)
LAST_ROWS = (
    copied("decoder.final_layernorm.weight", "model.norm.weight", "hidden"),
    copied("output_layer.weight", "lm_head.weight", "vocab", "hidden", tp_dim=0),
)
