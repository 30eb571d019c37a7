"""Models whose sizes recipes can name as their source (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slim.aliases import JsonObject
from megatron_slim.architecture.hf_config import shape_from_hf_config
from megatron_slim.architecture.shape import ModelShape, layer_pattern


@dataclass(frozen=True)
class Published:
    """A model's config.json, and what that does not say.

    Attributes:
        config: as published with the weights.
        mtp_num_layers: MTP blocks among the tensors.
    """

    config: JsonObject
    mtp_num_layers: int

    @property
    def shape(self) -> ModelShape:
        """Its sizes."""
        return shape_from_hf_config(self.config, mtp_num_layers=self.mtp_num_layers)


# No layer_types, and nothing that says there is an MTP block.
QWEN3_NEXT_80A3B = Published(
    {
        "architectures": ["Qwen3NextForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5120,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_next",
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    mtp_num_layers=1,
)
QWEN3_30A3B = Published(
    {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    mtp_num_layers=0,
)
# A model that also sees pictures: of its config.json, the language model's part.
QWEN3_5_35A3B = Published(
    {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_output_gate": True,
            "full_attention_interval": 4,
            "head_dim": 256,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "layer_types": list(layer_pattern(40, 4)),
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_value_head_dim": 128,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_5_moe_text",
            "moe_intermediate_size": 512,
            "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False,
            "num_attention_heads": 16,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10],
                "partial_rotary_factor": 0.25,
                "rope_theta": 10000000,
                "rope_type": "default",
            },
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": 512,
            "vocab_size": 248320,
        },
        "tie_word_embeddings": False,
    },
    mtp_num_layers=1,
)
QWEN3_5_122A10B = Published(
    QWEN3_5_35A3B.config
    | {
        "text_config": QWEN3_5_35A3B.config["text_config"]
        | {
            "hidden_size": 3072,
            "layer_types": list(layer_pattern(48, 4)),
            "linear_num_value_heads": 64,
            "moe_intermediate_size": 1024,
            "num_attention_heads": 32,
            "num_hidden_layers": 48,
            "shared_expert_intermediate_size": 1024,
        }
    },
    mtp_num_layers=1,
)
GLM_4_5_AIR = Published(
    {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338],
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 10944,
        "max_position_embeddings": 131072,
        "model_type": "glm4_moe",
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 96,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 46,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "pad_token_id": 151329,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_qk_norm": False,
        "vocab_size": 151552,
    },
    mtp_num_layers=1,
)
# 4.7 reads 202,752 positions; else they are the same.
GLM_4_5 = Published(
    GLM_4_5_AIR.config
    | {
        "first_k_dense_replace": 3,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 160,
        "num_hidden_layers": 92,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
    },
    mtp_num_layers=1,
)
# The base of SlimQwen's study of experts, which `qwen3_next_80a3b_to_24a2b.yaml` makes of the 80A3B model.
SLIMQWEN_24A2B = Published(
    QWEN3_NEXT_80A3B.config | {"num_hidden_layers": 28, "num_experts": 256, "num_experts_per_tok": 8}, mtp_num_layers=1
)

MODELS = {
    "Qwen3-Next-80B-A3B": QWEN3_NEXT_80A3B,
    "Qwen3-30B-A3B": QWEN3_30A3B,
    "Qwen3.5-35B-A3B": QWEN3_5_35A3B,
    "Qwen3.5-122B-A10B": QWEN3_5_122A10B,
    "GLM-4.5-Air": GLM_4_5_AIR,
    "GLM-4.5": GLM_4_5,
    "SlimQwen-24A2B": SLIMQWEN_24A2B,
}
