"""What machines without Transformer Engine lack, under its parameter names: norms, and norm-then-project."""

from __future__ import annotations

from functools import partial

import megatron_slim.mcore

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import ExpertsBuilder
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_slim.aliases import Context
from megatron_slim.architecture.local_attention import LocalAttention
from megatron_slim.architecture.local_experts import LocalExperts


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, *, zero_centered: bool) -> Tensor:
    """RMSNorm over the last dimension, at least in fp32, in the input's dtype; ``zero_centered`` applies 1 + weight."""
    normed: Tensor = _RMSNorm.apply(hidden, weight, eps, zero_centered)
    return normed


class _RMSNorm(torch.autograd.Function):
    """y = x r s, where r is 1 over the root of the mean square and s the weight, or 1 + weight."""

    @staticmethod
    def forward(ctx: Context, hidden: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wide, scale = hidden.to(dtype), weight.to(dtype)
        scale = scale + 1.0 if zero_centered else scale
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = length.square_().div_(wide.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, inverse, scale)
        return (wide * inverse).mul_(scale).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, d_normed: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # dx = r (dy s - x r mean(dy s x r)), ds = sum over rows of dy x r
        hidden, weight, inverse, scale = ctx.saved_tensors
        d_normed, unit = d_normed.to(inverse.dtype), hidden.to(inverse.dtype) * inverse
        products = d_normed * unit
        d_scale = products.flatten(0, -2).sum(0)
        along = (products @ scale).div_(-unit.shape[-1])[..., None]
        d_hidden = torch.addcmul(d_normed * scale, unit, along).mul_(inverse)
        return d_hidden.to(hidden.dtype), d_scale.to(weight.dtype), None, None


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

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: object) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.layer_norm_weight = norm_weight(config, input_size)

    def forward(self, input_: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """Normalise ``input_`` (sequence, batch, hidden) and project it."""
        hidden = rms_norm(input_, self.layer_norm_weight, self.eps, zero_centered=self.zero_centered)
        output: tuple[Tensor, Tensor | None] = super().forward(hidden, *args, **kwargs)
        return output


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

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> ExpertsBuilder:
        """The module of the routed experts."""
        linear = {"linear_fc1": self.column_parallel_linear(), "linear_fc2": self.row_parallel_linear()}
        return partial(LocalExperts, submodules=MLPSubmodules(**linear))
