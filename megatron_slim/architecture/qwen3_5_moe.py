"""Qwen3.5-MoE and Qwen3.6-MoE: as Qwen3-Next, with the projections of Gated DeltaNet apart.

The published ones are models of text, pictures and films (``qwen3_5_moe``). Their language model is this one.
Positions of text are the same on all three grids of their rotary embeddings, which then are ordinary ones.
"""

from __future__ import annotations

from megatron_slim.architecture.axes import concat, label
from megatron_slim.architecture.delta_net import GDN_QKV, HEAD_SCALARS, VALUE_HEADS, delta_net_rows
from megatron_slim.architecture.family import (
    COMMON_ACCEPTED,
    COMMON_KEYS,
    DELTA_NET_KEYS,
    FULL_ATTENTION,
    LINEAR_ATTENTION,
    Family,
)
from megatron_slim.architecture.full_attention import GATED_QKV, attention_rows
from megatron_slim.architecture.rows import EMBEDDING_ROWS, HEAD_ROWS, MTP_ROWS, ROUTED_MOE_ROWS, SHARED_EXPERT_ROWS
from megatron_slim.architecture.weight import HFTensor
from megatron_slim.architecture.wrapper import Wrapper

_LINEAR_ATTENTION_ROWS = delta_net_rows(
    HFTensor("linear_attn.in_proj_qkv.weight", (concat(*GDN_QKV), "hidden"), fp8=True),
    HFTensor("linear_attn.in_proj_z.weight", (label("z", VALUE_HEADS), "hidden"), fp8=True),
    HFTensor("linear_attn.in_proj_b.weight", (label("beta", HEAD_SCALARS), "hidden")),
    HFTensor("linear_attn.in_proj_a.weight", (label("alpha", HEAD_SCALARS), "hidden")),
)
_KEYS = {name: key for name, key in COMMON_KEYS.items() if name != "norm_topk_prob"}

QWEN3_5_MOE = Family(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    first_rows=EMBEDDING_ROWS,
    attention_rows={LINEAR_ATTENTION: _LINEAR_ATTENTION_ROWS, FULL_ATTENTION: attention_rows(GATED_QKV)},
    moe_rows=(*ROUTED_MOE_ROWS, *SHARED_EXPERT_ROWS),
    last_rows=HEAD_ROWS,
    mtp_rows=MTP_ROWS,
    keys={**_KEYS, **DELTA_NET_KEYS},
    fixed={"norm_topk_prob": True},
    accepted={
        **COMMON_ACCEPTED,
        "norm_topk_prob": (True, None),
        "attn_output_gate": (True, None),
        "output_gate_type": ("swish", "silu", None),
        "mtp_use_dedicated_embeddings": (False, None),
    },
    mtp_count="mtp_num_hidden_layers",
    wrapper=Wrapper(
        model_type="qwen3_5_moe",
        architecture="Qwen3_5MoeForConditionalGeneration",
        text="text_config",
        trunk="model.language_model.",
        others=("model.visual.",),
        hidden_rows=("model.visual.merger.linear_fc2.weight", "model.visual.merger.linear_fc2.bias"),
        hidden_key=("vision_config", "out_hidden_size"),
    ),
    full_attention_interval=4,
    attention_output_gate=True,
    zero_centered_norms=True,
)
