"""A model family as data: its rows, and what its config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_slim.aliases import Document
from megatron_slim.architecture.weight import Weight
from megatron_slim.architecture.wrapper import Wrapper

LINEAR_ATTENTION, FULL_ATTENTION = "linear_attention", "full_attention"
MOE, DENSE = "moe", "dense"
ATTENTION = (LINEAR_ATTENTION, FULL_ATTENTION)
MTP_SUBLAYERS = (FULL_ATTENTION, MOE)  # of the block inside an MTP block

LAYERS, MTP = "model.layers.", "mtp."  # what names in files begin with

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
COMMON_ACCEPTED: dict[str, tuple[object, ...]] = {
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
        rows: of every kind of sublayer that its blocks are made of, the norm before it included.
        last_rows: parameters after the blocks.
        keys: Megatron's name -> key in config.json, of the sizes that this family has.
        accepted: keys that ask for what is not implemented -> values accepted.
        fixed: values of a `ModelShape` that config.json does not say, because all models of the family have them.
        multiples: Megatron's name -> key in config.json that gives it as a multiple of another size, and that size's
            Megatron name.
        mtp_rows: what the MTP block adds to the block in it, ``{block}`` being that block's prefix; empty: there is
            none.
        mtp_count: key in config.json that clients read the number of MTP blocks from.
        mtp_after_trunk: files have MTP blocks as layers after the last one.
        mtp_copies: tensors that files may have in every MTP block though they are the trunk's, without its prefix ->
            Megatron's key.
        full_attention_interval: period of the full-attention layers where config.json does not list the layers' types.
        attention_output_gate: ``q_proj`` holds a gate for every head's output.
        shared_expert_gate: the shared expert has a gate.
        router_score_function: Megatron's name of what makes scores of a router's logits.
        zero_centered_norms: norms multiply by 1 + weight, all but that of Gated DeltaNet's output.
        optional_head_dim: without ``head_dim`` it is hidden_size / num_attention_heads.
        wrapper: the larger model that holds such a language model; None: there is none.
        aliases: other names of keys, which are read and not written.
    """

    model_type: str
    architecture: str
    first_rows: tuple[Weight, ...]
    rows: Mapping[str, tuple[Weight, ...]]
    last_rows: tuple[Weight, ...]
    keys: Mapping[str, str]
    accepted: Mapping[str, tuple[object, ...]]
    fixed: Document = field(default_factory=dict)
    multiples: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    mtp_rows: tuple[Weight, ...] = ()
    mtp_count: str = "num_nextn_predict_layers"
    mtp_after_trunk: bool = False
    mtp_copies: Mapping[str, str] = field(default_factory=dict)
    full_attention_interval: int = 1
    attention_output_gate: bool = False
    shared_expert_gate: bool = True
    router_score_function: str = "softmax"
    zero_centered_norms: bool = False
    optional_head_dim: bool = False
    wrapper: Wrapper | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def attention(self) -> tuple[str, ...]:
        """The kinds of attention that its blocks may have."""
        return tuple(kind for kind in self.rows if kind in ATTENTION)

    @property
    def has_router_bias(self) -> bool:
        """Whether a bias, which is not trained by gradients, takes part in the choice of experts."""
        return any(row.buffer for row in self.rows[MOE])

    def mtp_prefix(self, num_layers: int, depth: int) -> str:
        """What names of an MTP block's transformer block begin with in files of a model of so many layers."""
        return f"{LAYERS}{num_layers + depth}" if self.mtp_after_trunk else f"{MTP}layers.{depth}"

    def mtp_names(self, num_layers: int) -> str:
        """A pattern of all names of MTP blocks in files, for people."""
        return f"{self.mtp_prefix(num_layers, 0)}.*" if self.mtp_after_trunk else f"{MTP}*"

    def mtp_depth(self, name: str, num_layers: int) -> int | None:
        """The MTP block that a tensor in the files is of; None where it is of the trunk."""
        stem = LAYERS if self.mtp_after_trunk else f"{MTP}layers."
        number = name.removeprefix(stem).split(".")[0] if name.startswith(stem) else ""
        if not (number.isascii() and number.isdecimal()):
            return 0 if name.startswith(MTP) and not self.mtp_after_trunk else None
        if not self.mtp_after_trunk:
            return int(number)
        return int(number) - num_layers if int(number) >= num_layers else None
