"""Qwen3-MoE: full attention and routed experts in every layer."""

from __future__ import annotations

from megatron_slim.architecture.family import COMMON_ACCEPTED, COMMON_KEYS, FULL_ATTENTION, MOE, Family
from megatron_slim.architecture.full_attention import QKV, attention_rows
from megatron_slim.architecture.rows import EMBEDDING_ROWS, HEAD_ROWS, ROUTED_MOE_ROWS

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    first_rows=EMBEDDING_ROWS,
    rows={FULL_ATTENTION: attention_rows(QKV), MOE: ROUTED_MOE_ROWS},
    last_rows=HEAD_ROWS,
    keys=COMMON_KEYS,
    # transformers rotates whole heads whatever config.json says.
    accepted={**COMMON_ACCEPTED, "use_sliding_window": (False, None), "partial_rotary_factor": (1, 1.0, None)},
    optional_head_dim=True,
    aliases={"num_local_experts": "num_experts"},  # what transformers 5 writes
)
