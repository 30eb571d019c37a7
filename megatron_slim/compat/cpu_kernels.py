"""On a CPU: what Megatron has kernels for on a GPU, and what it need not do."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_slim.products import linear
from megatron_slim.weight_gradient import weight_gradient


def multiply_fast() -> None:
    """Let Megatron's linear layers multiply as `products` does, and add the gradient of a weight to ``main_grad``.

    Where several ranks share a layer, Megatron's own function stays: it overlaps products and communication.
    """
    from megatron.core.tensor_parallel import layers

    def unless_shared(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(theirs)
        def run(input: Tensor, weight: Tensor, *, bias: Tensor | None, **how: Any) -> Tensor:
            shared = how["allreduce_dgrad"] or how["sequence_parallel"] or how.get("gtp_remat_size", 1) > 1
            if bias is not None or shared or how.get("grad_output_buffer") is not None:
                return theirs(input, weight, bias=bias, **how)
            rows: Tensor = _Linear.apply(input.flatten(0, -2), weight)
            return rows.view(*input.shape[:-1], len(weight))

        return run

    layers.linear_with_frozen_weight = unless_shared(layers.linear_with_frozen_weight)
    layers.linear_with_grad_accumulation_and_async_allreduce = unless_shared(
        layers.linear_with_grad_accumulation_and_async_allreduce
    )


class _Linear(torch.autograd.Function):
    """Inputs [n, k] times the transpose of a weight [m, k]."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return linear(inputs, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        return linear(d_outputs, weight.t()), weight_gradient(weight, d_outputs, inputs)


# Of malloc.h. What is kept: for the blocks of a streaming pass the most that glibc itself would come to keep; for a
# training step, whose logits and gradients are larger, enough for all of them.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
STREAMING, TRAINING = (16 << 20, 64 << 20), (64 << 20, 1 << 30)


def keep_freed_memory(kept: tuple[int, int]) -> None:
    """Have the C library keep what tensors free for those that come next; by itself glibc returns it to the system,
    and every tensor waits for its pages again.

    Args:
        kept: bytes of the largest block that is kept, and of all.
    """
    if platform.libc_ver()[0] == "glibc" and not torch.cuda.is_available():
        for option, size in zip((_MMAP_THRESHOLD, _TRIM_THRESHOLD), kept, strict=True):
            ctypes.CDLL(None).mallopt(option, size)


def leave_sorted_chunks() -> None:
    """Keep Megatron's all-to-all dispatcher from copying routed tokens in the order in which they already are.

    After the all-to-all it sorts what came from all ranks by expert; what came from one rank alone is sorted.
    """
    from megatron.core.transformer.moe import token_dispatcher

    sort = token_dispatcher.sort_chunks_by_idxs

    def sort_unless_sorted(
        rows: Tensor, sizes: Tensor, order: Tensor, probs: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if bool((order[1:] > order[:-1]).all()):
            return rows, probs
        found: tuple[Tensor, Tensor | None] = sort(rows, sizes, order, probs=probs, **kwargs)
        return found

    token_dispatcher.sort_chunks_by_idxs = sort_unless_sorted


class _Done:
    """A collective that has ended."""

    def wait(self) -> None:
        pass


def leave_buffers_of_one_rank() -> None:
    """Keep Megatron's distributed optimizer from sending its buffers of gradients and parameters to itself.

    In a group of one rank its part of a buffer is the buffer, and gloo copies it twice.
    """
    from megatron.core.distributed import param_and_grad_buffer as buffers

    together = buffers._coalescing_manager

    @contextlib.contextmanager
    def coalesce(group: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if group.size() == 1:
            yield _Done()
        else:
            with together(group, *args, **kwargs) as handle:
                yield handle

    def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(output: Tensor, own: Tensor, *args: Any, group: Any, **kwargs: Any) -> Any:
            if group.size() > 1:
                return collective(output, own, *args, group=group, **kwargs)
            if output.data_ptr() != own.data_ptr():
                output.copy_(own)
            return None

        return run

    buffers._coalescing_manager = coalesce
    buffers.dist_reduce_scatter_func = unless_alone(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = unless_alone(buffers.dist_all_gather_func)
