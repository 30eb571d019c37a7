"""What machines without Transformer Engine lack, under its parameter names: norms, norm-then-project, attention."""

from __future__ import annotations

import copy
from typing import Any

import megatron_slim.mcore

import torch
import torch.distributed as dist
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_slim.architecture.context_parallel import positions_of


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, *, zero_centered: bool) -> Tensor:
    """RMSNorm over the last dimension, computed in fp32, in the input's dtype; ``zero_centered`` applies 1 + weight."""
    wide = hidden.float()
    scale = weight.float() + 1.0 if zero_centered else weight.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * scale).to(hidden.dtype)


def norm_weight(config: TransformerConfig, size: int) -> nn.Parameter:
    """A norm's weight that starts as the identity."""
    create = torch.zeros if config.layernorm_zero_centered_gamma else torch.ones
    weight = nn.Parameter(create(size, dtype=config.params_dtype, device=torch.cuda.current_device()))
    # Every tensor-parallel rank sees its part of the sequence: Megatron sums the gradients of parameters so marked.
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight


class RMSNorm(nn.Module):
    """RMSNorm with zero-centred weights and sequence parallelism, both of which `WrappedTorchNorm` refuses."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = norm_weight(config, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension of ``hidden``."""
        return rms_norm(hidden, self.weight, self.eps, zero_centered=self.zero_centered)


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm and a column-parallel linear layer in one module, with Transformer Engine's parameter names."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.layer_norm_weight = norm_weight(config, input_size)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Normalise ``input_`` (sequence, batch, hidden) and project it."""
        hidden = rms_norm(input_, self.layer_norm_weight, self.eps, zero_centered=self.zero_centered)
        output: tuple[Tensor, Tensor | None] = super().forward(hidden, *args, **kwargs)
        return output


class LocalAttention(DotProductAttention):
    """Megatron's attention, and under context parallelism that of this rank's queries to the keys of all.

    Keys and values are gathered whole, so that their memory does not shrink with the context parallel size as it does
    with Transformer Engine.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        whole = copy.copy(config)
        whole.context_parallel_size = 1  # others are refused there
        super().__init__(whole, *args, **kwargs)
        self.context_parallel = config.context_parallel_size > 1

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Attend causally: query, key and value [s, b, heads, head dim] of this rank's part of the sequence."""
        if self.context_parallel:
            group = self.pg_collection.cp
            key, value = (gather_from_sequence_parallel_region(each, group=group) for each in (key, value))
            ranks, length = dist.get_world_size(group), len(key)
            of_keys = torch.cat([positions_of(rank, ranks, length) for rank in range(ranks)])
            attention_mask = of_keys[None, :] > positions_of(dist.get_rank(group), ranks, length)[:, None]
        context: Tensor = super().forward(query, key, value, attention_mask, *args, **kwargs)
        return context


class LocalBackend(LocalSpecProvider):
    """Megatron-Core's local backend with norms that may be zero-centred, and attention that may be sharded."""

    def core_attention(self) -> type:
        """The module that attends."""
        return LocalAttention

    def fuse_layernorm_and_linear(self) -> bool:
        """Yes: `column_parallel_layer_norm_linear`."""
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        """The module that normalises and projects."""
        return LayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False, has_residual: bool = False) -> LayerNormBuilder:
        """The one norm of these models."""
        return RMSNorm
