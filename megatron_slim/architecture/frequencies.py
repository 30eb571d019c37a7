"""Frequencies of rotary embeddings, plain and with YaRN, in transformers' order of operations."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slim.architecture.rope import Yarn
from megatron_slim.architecture.shape import ModelShape


def rotary_frequencies(shape: ModelShape) -> Tensor:
    """Radians per position of half as many pairs as dimensions of a head rotate, in fp32."""
    if shape.rope_scaling is not None:
        return yarn_frequencies(shape.rope_scaling, shape.rotary_dim, shape.rotary_base)
    return 1.0 / shape.rotary_base ** (torch.arange(0, shape.rotary_dim, 2, dtype=torch.float32) / shape.rotary_dim)


def yarn_frequencies(yarn: Yarn, dim: int, base: float) -> Tensor:
    """Radians per position of dim / 2 pairs of dimensions, in fp32.

    Far positions multiply every rounding: an angle at position 10^6 has but one digit behind the point.
    """
    radians = base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    low, high = yarn.ramp(dim, base)
    slow = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - slow
    return 1.0 / (yarn.factor * radians) * (1 - kept) + 1.0 / radians * kept
