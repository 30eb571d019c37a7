"""Rows that the families of models share."""

from __future__ import annotations

from megatron_slim.architecture.axes import product
from megatron_slim.architecture.weight import Weight, copied, gated_mlp

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
