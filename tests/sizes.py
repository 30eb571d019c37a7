"""Sizes of tiny models that several tests need."""

from __future__ import annotations

from typing import Any

from megatron_slim.architecture.shape import FAMILIES, FULL_ATTENTION, LINEAR_ATTENTION, ModelShape
from megatron_slim.testing import tiny_shape

# Odd and aperiodic, grouped heads, gates that do not add up to 1.
ODD: dict[str, Any] = {
    "num_layers": 5,
    "layer_types": (FULL_ATTENTION, LINEAR_ATTENTION, LINEAR_ATTENTION, FULL_ATTENTION, LINEAR_ATTENTION),
    "hidden_size": 48,
    "vocab_size": 101,
    "num_attention_heads": 6,
    "num_query_groups": 3,
    "kv_channels": 8,
    "rotary_percent": 0.5,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 9,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 24,
    "norm_topk_prob": False,
}


def mixed_layers(family: str, **sizes: Any) -> ModelShape:
    """A tiny model of a registered family: four layers, of each kind of attention in turn where it has two."""
    first = LINEAR_ATTENTION if LINEAR_ATTENTION in FAMILIES[family].attention else FULL_ATTENTION
    return tiny_shape(family, layer_types=(first, FULL_ATTENTION) * 2, **sizes)
