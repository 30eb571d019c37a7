"""Rows that the families of models share."""

from __future__ import annotations

from megatron_slim.architecture.axes import concat
from megatron_slim.architecture.weight import copied, gated_mlp

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
