"""Qwen3-Next: Gated DeltaNet and gated full attention, routed experts and a shared one, an MTP block."""

from __future__ import annotations

from megatron_slim.architecture.axes import concat, label, product
from megatron_slim.architecture.delta_net import delta_net_rows
from megatron_slim.architecture.family import (
    COMMON_ACCEPTED,
    COMMON_KEYS,
    DELTA_NET_KEYS,
    FULL_ATTENTION,
    LINEAR_ATTENTION,
    MOE,
    Family,
)
from megatron_slim.architecture.full_attention import GATED_QKV, attention_rows
from megatron_slim.architecture.rows import EMBEDDING_ROWS, HEAD_ROWS, MTP_ROWS, ROUTED_MOE_ROWS, SHARED_EXPERT_ROWS
from megatron_slim.architecture.weight import HFTensor

# Two projections, each with the parts of one key head after those of another.
_OF_KEY_HEAD = concat(
    label("query", "gdn_key_dim"),
    label("key", "gdn_key_dim"),
    label("value", "gdn_value_per_key", "gdn_value_dim"),
    label("z", "gdn_value_per_key", "gdn_value_dim"),
)
_SCALARS_OF_KEY_HEAD = concat(label("beta", "gdn_value_per_key"), label("alpha", "gdn_value_per_key"))
_LINEAR_ATTENTION_ROWS = delta_net_rows(
    HFTensor("linear_attn.in_proj_qkvz.weight", (product("gdn_key_head", _OF_KEY_HEAD), "hidden"), fp8=True),
    HFTensor("linear_attn.in_proj_ba.weight", (product("gdn_key_head", _SCALARS_OF_KEY_HEAD), "hidden")),
)

QWEN3_NEXT = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    first_rows=EMBEDDING_ROWS,
    rows={
        LINEAR_ATTENTION: _LINEAR_ATTENTION_ROWS,
        FULL_ATTENTION: attention_rows(GATED_QKV),
        MOE: (*ROUTED_MOE_ROWS, *SHARED_EXPERT_ROWS),
    },
    last_rows=HEAD_ROWS,
    mtp_rows=MTP_ROWS,
    keys={**COMMON_KEYS, **DELTA_NET_KEYS},
    accepted=COMMON_ACCEPTED,
    full_attention_interval=4,
    attention_output_gate=True,
    zero_centered_norms=True,
)
