"""Qwen3-Next: Gated DeltaNet and gated full attention, routed experts and a shared one, an MTP block."""

from __future__ import annotations

from megatron_slim.architecture.axes import concat, label, product
from megatron_slim.architecture.family import COMMON_ACCEPTED, COMMON_KEYS, FULL_ATTENTION, LINEAR_ATTENTION, Family
from megatron_slim.architecture.rows import EMBEDDING_ROWS, HEAD_ROWS, ROUTED_MOE_ROWS, attention_rows
from megatron_slim.architecture.weight import HFTensor, Weight, copied, gated_mlp

_KEY_HEADS = product("gdn_key_head", "gdn_key_dim")
_VALUE_HEADS = product("gdn_key_head", "gdn_value_per_key", "gdn_value_dim")
_HEAD_SCALARS = product("gdn_key_head", "gdn_value_per_key")
_GDN_QKV = (label("query", _KEY_HEADS), label("key", _KEY_HEADS), label("value", _VALUE_HEADS))

_QUERIES, _GATES = (product("query_per_group", label(name, "head_dim")) for name in ("query", "gate"))
_QUERY_AND_GATE = concat(label("query", "head_dim"), label("gate", "head_dim"))
_KEY, _VALUE = label("key", "head_dim"), label("value", "head_dim")

_QKV = Weight(
    "self_attention.linear_qkv.weight",
    (product("kv_group", concat(_QUERIES, _GATES, _KEY, _VALUE)), "hidden"),
    (
        HFTensor("self_attn.q_proj.weight", (product("kv_group", "query_per_group", _QUERY_AND_GATE), "hidden")),
        HFTensor("self_attn.k_proj.weight", (product("kv_group", _KEY), "hidden")),
        HFTensor("self_attn.v_proj.weight", (product("kv_group", _VALUE), "hidden")),
    ),
    tp_dim=0,
)

_LINEAR_ATTENTION_ROWS = (
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
    copied("self_attention.A_log", "linear_attn.A_log", _HEAD_SCALARS, tp_dim=0, float32=True),
    copied("self_attention.dt_bias", "linear_attn.dt_bias", _HEAD_SCALARS, tp_dim=0, float32=True),
    copied("self_attention.out_norm.weight", "linear_attn.norm.weight", "gdn_value_dim", float32=True),
    copied("self_attention.out_proj.weight", "linear_attn.out_proj.weight", "hidden", _VALUE_HEADS, tp_dim=1),
)

_SHARED_EXPERT_ROWS = (
    *gated_mlp("mlp.shared_experts", "mlp.shared_expert", "shared_ffn"),
    copied("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", "one", "hidden"),
)

_PAIR = concat("hidden", "hidden")
_MTP_ROWS = (
    copied("eh_proj.weight", "mtp.fc.weight", "hidden", _PAIR, tp_dim=0),
    copied("enorm.weight", "mtp.pre_fc_norm_embedding.weight", "hidden"),
    copied("hnorm.weight", "mtp.pre_fc_norm_hidden.weight", "hidden"),
    copied("final_layernorm.weight", "mtp.norm.weight", "hidden"),
)

_OWN_KEYS = {
    "linear_num_key_heads": "linear_num_key_heads",
    "linear_num_value_heads": "linear_num_value_heads",
    "linear_key_head_dim": "linear_key_head_dim",
    "linear_value_head_dim": "linear_value_head_dim",
    "linear_conv_kernel_dim": "linear_conv_kernel_dim",
    "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
    "rotary_percent": "partial_rotary_factor",
}

QWEN3_NEXT = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    first_rows=EMBEDDING_ROWS,
    attention_rows={LINEAR_ATTENTION: _LINEAR_ATTENTION_ROWS, FULL_ATTENTION: attention_rows(_QKV)},
    moe_rows=(*ROUTED_MOE_ROWS, *_SHARED_EXPERT_ROWS),
    last_rows=HEAD_ROWS,
    mtp_rows=_MTP_ROWS,
    keys={**COMMON_KEYS, **_OWN_KEYS},
    accepted=COMMON_ACCEPTED,
    full_attention_interval=4,
    attention_output_gate=True,
    zero_centered_norms=True,
)
