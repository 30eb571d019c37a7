"""GLM-4.5, 4.6, 4.7 and their Air models: full attention with biases, a few dense blocks first, then routed experts.

The router's scores are sigmoids. A bias is added to them for the choice of experts alone, which balances their load and
is not trained by gradients. The MTP block is stored as the layer after the last one, in the files of GLM-4.5 with
copies of the embedding and the output layer.
"""

from __future__ import annotations

from megatron_slim.architecture.family import COMMON_ACCEPTED, COMMON_KEYS, DENSE, FULL_ATTENTION, MOE, Family
from megatron_slim.architecture.full_attention import QKV, QKV_BIAS, attention_rows
from megatron_slim.architecture.rows import DENSE_ROWS, EMBEDDING_ROWS, EXPERT_ROWS, FFN_NORM, HEAD_ROWS, mtp_rows
from megatron_slim.architecture.weight import copied, gated_mlp

# transformers has both of the router's tensors in fp32, whatever type the model has.
_MOE_ROWS = (
    FFN_NORM,
    copied("mlp.router.weight", "mlp.gate.weight", "expert", "hidden", float32=True),
    *EXPERT_ROWS,
    copied("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", "expert", float32=True, buffer=True),
    *gated_mlp("mlp.shared_experts", "mlp.shared_experts", "shared_ffn"),
)

GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    first_rows=EMBEDDING_ROWS,
    rows={FULL_ATTENTION: attention_rows(QKV, QKV_BIAS), DENSE: DENSE_ROWS, MOE: _MOE_ROWS},
    last_rows=HEAD_ROWS,
    mtp_rows=mtp_rows("{block}.eh_proj", "{block}.enorm", "{block}.hnorm", "{block}.shared_head.norm"),
    mtp_after_trunk=True,
    mtp_copies={
        "embed_tokens.weight": "embedding.word_embeddings.weight",
        "shared_head.head.weight": "output_layer.weight",
    },
    keys={
        **COMMON_KEYS,
        "num_moe_experts": "n_routed_experts",
        "ffn_hidden_size": "intermediate_size",
        "num_dense_layers": "first_k_dense_replace",
        "moe_router_topk_scaling_factor": "routed_scaling_factor",
        "moe_router_num_groups": "n_group",
        "moe_router_group_topk": "topk_group",
        "qk_layernorm": "use_qk_norm",
        "add_qkv_bias": "attention_bias",
        "rotary_percent": "partial_rotary_factor",
    },
    multiples={"moe_shared_expert_intermediate_size": ("n_shared_experts", "moe_ffn_hidden_size")},
    # Their loss for balance, where there is one, is not in config.json: the bias balances.
    fixed={"router_aux_loss_coef": 0.0},
    accepted={
        **{key: values for key, values in COMMON_ACCEPTED.items() if key != "attention_bias"},
        # Megatron's sigmoid scores always add up to 1 before they are scaled.
        "norm_topk_prob": (True,),
        "topk_method": ("noaux_tc", None),
        "scoring_func": ("sigmoid", None),
    },
    optional_head_dim=True,
    aliases={"num_local_experts": "n_routed_experts"},
    shared_expert_gate=False,
    router_score_function="sigmoid",
)
