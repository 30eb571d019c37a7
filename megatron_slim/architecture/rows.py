"""Rows that the families of models share."""

from __future__ import annotations

from megatron_slim.architecture.axes import concat, label
from megatron_slim.architecture.weight import Weight, copied, gated_mlp

EMBEDDING_ROWS = (copied("embedding.word_embeddings.weight", "model.embed_tokens.weight", "vocab", "hidden", tp_dim=0),)
HEAD_ROWS = (
    copied("decoder.final_layernorm.weight", "model.norm.weight", "hidden"),
    copied("output_layer.weight", "lm_head.weight", "vocab", "hidden", tp_dim=0),
)

FFN_NORM = copied("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "hidden")
EXPERT_ROWS = gated_mlp("mlp.experts.experts", "mlp.experts.{expert}", "moe_ffn", stacked=True)
ROUTED_MOE_ROWS = (FFN_NORM, copied("mlp.router.weight", "mlp.gate.weight", "expert", "hidden"), *EXPERT_ROWS)
SHARED_EXPERT_ROWS = (
    *gated_mlp("mlp.shared_experts", "mlp.shared_expert", "shared_ffn"),
    copied("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", "one", "hidden"),
)
DENSE_ROWS = (FFN_NORM, *gated_mlp("mlp", "mlp", "ffn"))

_PAIR = concat(label("embedding", "hidden"), label("state", "hidden"))  # of the next token, and of this one


def mtp_rows(join: str, embedding_norm: str, hidden_norm: str, norm: str) -> tuple[Weight, ...]:
    """What an MTP block adds to the block in it, by the names of the modules in files."""
    return (
        copied("eh_proj.weight", f"{join}.weight", "hidden", _PAIR, tp_dim=0),
        copied("enorm.weight", f"{embedding_norm}.weight", "hidden"),
        copied("hnorm.weight", f"{hidden_norm}.weight", "hidden"),
        copied("final_layernorm.weight", f"{norm}.weight", "hidden"),
    )


MTP_ROWS = mtp_rows("mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm")
