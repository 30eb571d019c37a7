"""One transformer block of a checkpoint as a Megatron-Core layer, alone: what a streaming forward pass runs."""

from __future__ import annotations

from collections.abc import Mapping

import megatron_slim.mcore

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_slim.architecture.layer_specs import layer_spec, transformer_config
from megatron_slim.architecture.rotary import scale_attention, scale_rotary_frequencies
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import weights
from megatron_slim.architecture.weight import Weight
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.layout import to_megatron
from megatron_slim.checkpoint.precision import float32_weights


def block_config(shape: ModelShape, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration for forward passes in one precision."""
    return transformer_config(
        shape,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
    )


def build_block(checkpoint: Checkpoint, block: str, config: TransformerConfig) -> TransformerLayer:
    """Build one layer and load its weights.

    Args:
        checkpoint: the model.
        block: its name, ``model.layers.{i}`` or ``mtp.layers.{i}``.
        config: from `block_config`.
    """
    shape, index = checkpoint.shape, int(block.split(".")[-1])
    layer: TransformerLayer = build_module(
        layer_spec(shape.sublayers_of(block), config, shape.in_block(block).num_moe_experts),
        config=config,
        layer_number=index + 1,
    )
    scale_attention(layer, shape)
    parameters: dict[str, Tensor] = dict(layer.named_parameters())
    kept = {weight.key for weight in float32_weights(checkpoint, config.params_dtype)}
    with torch.no_grad():
        for weight in weights(shape):
            if weight.block == block and weight.buffer:
                layer.get_buffer(_parameter_name(weight, None, {})).copy_(checkpoint.read(weight.sources[0].name))
            elif weight.block == block:
                for expert in weight.experts(shape):
                    parameter = parameters.pop(_parameter_name(weight, expert, parameters))
                    if weight.key in kept:
                        parameter.data = parameter.data.float()
                    parameter.copy_(to_megatron(weight, shape, checkpoint.read, expert=expert))
    assert not parameters, f"{block}: nothing loads {sorted(parameters)}"
    return layer.cuda().eval()  # Megatron makes some parameters on the host


def _parameter_name(weight: Weight, expert: int | None, parameters: Mapping[str, Tensor]) -> str:
    """Name inside the layer of a parameter, whose key is that of a torch_dist checkpoint."""
    name = weight.key.split(".", 4 if ".transformer_layer." in weight.key else 3)[-1]
    if expert is None:
        return name
    prefix, suffix = name.split("experts.experts.")
    sequential = f"{prefix}experts.local_experts.{expert}.{suffix}"
    return sequential if sequential in parameters else f"{prefix}experts.{suffix}{expert}"


def rotary_embedding(shape: ModelShape, seq_length: int) -> Tensor:
    """Rotary angles of the positions 0 .. seq_length - 1."""
    rotary = RotaryEmbedding(shape.kv_channels, shape.rotary_percent, rotary_base=shape.rotary_base)
    scale_rotary_frequencies(rotary, shape)
    angles: Tensor = rotary(seq_length)
    return angles
