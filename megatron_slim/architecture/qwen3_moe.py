"""Qwen3-MoE: full attention and routed experts in every layer."""

from __future__ import annotations

from megatron_slim.architecture.axes import concat, label, product
from megatron_slim.architecture.family import COMMON_ACCEPTED, COMMON_KEYS, FULL_ATTENTION, Family
from megatron_slim.architecture.rows import EMBEDDING_ROWS, HEAD_ROWS, ROUTED_MOE_ROWS, attention_rows
from megatron_slim.architecture.weight import HFTensor, Weight

_QUERIES = product("query_per_group", label("query", "head_dim"))
_KEY, _VALUE = label("key", "head_dim"), label("value", "head_dim")

_QKV = Weight(
    "self_attention.linear_qkv.weight",
    (product("kv_group", concat(_QUERIES, _KEY, _VALUE)), "hidden"),
    (
        HFTensor("self_attn.q_proj.weight", (product("kv_group", _QUERIES), "hidden")),
        HFTensor("self_attn.k_proj.weight", (product("kv_group", _KEY), "hidden")),
        HFTensor("self_attn.v_proj.weight", (product("kv_group", _VALUE), "hidden")),
    ),
    tp_dim=0,
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    first_rows=EMBEDDING_ROWS,
    attention_rows={FULL_ATTENTION: attention_rows(_QKV)},
    moe_rows=ROUTED_MOE_ROWS,
    last_rows=HEAD_ROWS,
    keys=COMMON_KEYS,
    # transformers rotates whole heads whatever config.json says.
    accepted={**COMMON_ACCEPTED, "use_sliding_window": (False, None), "partial_rotary_factor": (1, 1.0, None)},
    optional_head_dim=True,
    aliases={"num_local_experts": "num_experts"},  # what transformers 5 writes
)
