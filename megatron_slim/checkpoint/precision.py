"""Weights that a checkpoint has in fp32 among others of 16 bits, and that stay so in a model of 16 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from megatron_slim.architecture.table import weights
from megatron_slim.architecture.weight import Weight
from megatron_slim.checkpoint.units import Checkpoint

if TYPE_CHECKING:  # which brings Megatron
    from megatron_slim.architecture.hidden_states import HiddenStatesModel


def float32_weights(checkpoint: Checkpoint, dtype: torch.dtype) -> list[Weight]:
    """Weights that stay in fp32 in a model of ``dtype``.

    Those that a checkpoint of several types has in fp32, if they may be (`Weight.float32`). One that is in fp32 as a
    whole says nothing of single weights: a model of 16 bits then has all of them in its own type.
    """
    if dtype == torch.float32 or len(set(checkpoint.dtypes.values())) == 1:
        return []
    return [each for each in weights(checkpoint.shape) if each.float32 and _dtype(each, checkpoint) == torch.float32]


def keep_types(models: Iterable[HiddenStatesModel], checkpoint: Checkpoint) -> None:
    """Make parameters fp32, to stay so, that `float32_weights` names; before weights are loaded and models are wrapped.

    Args:
        models: the virtual pipeline stages of a model on this rank, of one type.
        checkpoint: what they are, or will be, loaded from.
    """
    for model in models:
        # Megatron keeps its buffers in fp32 by itself.
        kept = {weight.key for weight in float32_weights(checkpoint, model.config.params_dtype) if not weight.buffer}
        if kept:
            model.keep_in_float32(kept)


def _dtype(weight: Weight, checkpoint: Checkpoint) -> torch.dtype:
    return checkpoint.dtypes[next(weight.hf_tensors(checkpoint.shape))[0].name]
