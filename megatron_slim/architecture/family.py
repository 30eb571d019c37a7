"""A model family as data: its rows, and what its config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_slim.architecture.weight import Weight
from megatron_slim.architecture.wrapper import Wrapper

LINEAR_ATTENTION, FULL_ATTENTION = "linear_attention", "full_attention"

# Megatron's name -> Hugging Face's key, where every family has both.
COMMON_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "num_moe_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "rotary_base": "rope_theta",
    "max_position_embeddings": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "norm_topk_prob": "norm_topk_prob",
}
# The same of Gated DeltaNet, its gated attention and its shared expert.
DELTA_NET_KEYS = {
    "linear_num_key_heads": "linear_num_key_heads",
    "linear_num_value_heads": "linear_num_value_heads",
    "linear_key_head_dim": "linear_key_head_dim",
    "linear_value_head_dim": "linear_value_head_dim",
    "linear_conv_kernel_dim": "linear_conv_kernel_dim",
    "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
    "rotary_percent": "partial_rotary_factor",
}

# Keys that ask for what this package does not implement -> the values it accepts, the usual one first.
COMMON_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "tie_word_embeddings": (False,),
    "rope_type": ("default",),
}


@dataclass(frozen=True)
class Family:
    """What sets one family of models apart; everything else is the same code.

    Attributes:
        model_type: as config.json says it.
        architecture: transformers' class.
        first_rows: parameters before the blocks.
        attention_rows: norm and attention of a block, by layer type; which types there are.
        moe_rows: norm and MoE of a block.
        last_rows: parameters after the blocks.
        keys: Megatron's name -> key in config.json, of the sizes that this family has.
        accepted: keys that ask for what is not implemented -> values accepted.
        fixed: values of a `ModelShape` that config.json does not say, because all models of the family have them.
        mtp_rows: what the MTP block adds to a full-attention block; empty: there is none.
        mtp_count: key in config.json that clients read the number of MTP blocks from.
        full_attention_interval: period of the full-attention layers where config.json does not list the layers' types.
        attention_output_gate: ``q_proj`` holds a gate for every head's output.
        zero_centered_norms: norms multiply by 1 + weight, all but that of Gated DeltaNet's output.
        optional_head_dim: without ``head_dim`` it is hidden_size / num_attention_heads.
        wrapper: the larger model that holds such a language model; None: there is none.
        aliases: other names of keys, which are read and not written.
    """

    model_type: str
    architecture: str
    first_rows: tuple[Weight, ...]
    attention_rows: Mapping[str, tuple[Weight, ...]]
    moe_rows: tuple[Weight, ...]
    last_rows: tuple[Weight, ...]
    keys: Mapping[str, str]
    accepted: Mapping[str, tuple[Any, ...]]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    mtp_rows: tuple[Weight, ...] = ()
    mtp_count: str = "num_nextn_predict_layers"
    full_attention_interval: int = 1
    attention_output_gate: bool = False
    zero_centered_norms: bool = False
    optional_head_dim: bool = False
    wrapper: Wrapper | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
