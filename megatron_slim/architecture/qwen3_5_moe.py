"""Qwen3.5-MoE and Qwen3.6-MoE: as Qwen3-Next, with the projections of Gated DeltaNet apart.

The published ones are models of text, pictures and films (``qwen3_5_moe``). Their language model is this one.
Positions of text are the same on all three grids of their rotary embeddings, which then are ordinary ones.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_slim.architecture.axes import concat, label
from megatron_slim.architecture.delta_net import GDN_QKV, HEAD_SCALARS, VALUE_HEADS, delta_net_rows
from megatron_slim.architecture.family import LINEAR_ATTENTION
from megatron_slim.architecture.qwen3_next import QWEN3_NEXT
from megatron_slim.architecture.weight import HFTensor
from megatron_slim.architecture.wrapper import Wrapper

_LINEAR_ATTENTION_ROWS = delta_net_rows(
    HFTensor("linear_attn.in_proj_qkv.weight", (concat(*GDN_QKV), "hidden"), fp8=True),
    HFTensor("linear_attn.in_proj_z.weight", (label("z", VALUE_HEADS), "hidden"), fp8=True),
    HFTensor("linear_attn.in_proj_b.weight", (label("beta", HEAD_SCALARS), "hidden")),
    HFTensor("linear_attn.in_proj_a.weight", (label("alpha", HEAD_SCALARS), "hidden")),
)

QWEN3_5_MOE = replace(
    QWEN3_NEXT,
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    rows={**QWEN3_NEXT.rows, LINEAR_ATTENTION: _LINEAR_ATTENTION_ROWS},
    keys={name: key for name, key in QWEN3_NEXT.keys.items() if name != "norm_topk_prob"},
    fixed={"norm_topk_prob": True},
    accepted={
        **QWEN3_NEXT.accepted,
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
        accepted={"deepstack_visual_indexes": ([], None)},
    ),
)
