"""YaRN in modules of Megatron-Core.

Its own ``YarnRotaryEmbedding`` rotates whole heads, whatever ``rotary_percent`` says. So the plain one is given other
frequencies, and attention the factor by which it multiplies sine and cosine.
"""

from __future__ import annotations

import megatron_slim.mcore

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from torch import nn

from megatron_slim.architecture.frequencies import yarn_frequencies
from megatron_slim.architecture.shape import ModelShape


def scale_rotary_frequencies(rotary: RotaryEmbedding, shape: ModelShape) -> None:
    """Replace the frequencies of a plain embedding of this shape by what the shape says of scaling."""
    if shape.rope_scaling is not None:
        rotary.inv_freq = yarn_frequencies(shape.rope_scaling, shape.rotary_dim, shape.rotary_base).to(rotary.inv_freq)


def scale_attention(module: nn.Module, shape: ModelShape) -> None:
    """Tell every attention inside a module of this shape what to multiply sine and cosine by."""
    if shape.rope_scaling is not None:
        for attention in module.modules():
            if isinstance(attention, SelfAttention):
                attention._yarn_concentration_factor = shape.rope_scaling.attention_factor
