"""Memory of a chunk's parameters in Megatron's buffers, as its own rules put them there (torch is imported late)."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_slim.architecture.matrices import has_rest
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import weights
from megatron_slim.optimizers import ADAM, OPTIMIZERS
from megatron_slim.planning.layouts import Settings, TrainLayout
from megatron_slim.planning.memory import GRADIENT, Memory

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
    from torch import Tensor


def buffer_memory(
    chunk: DistributedDataParallel, shape: ModelShape, layout: TrainLayout, settings: Settings, args: Namespace
) -> tuple[Memory, list[int]]:
    """Weights and gradients of one chunk, and bytes of the optimizer's state on every rank of its pipeline stage.

    Args:
        chunk: of the student, on any device.
        shape: sizes of the student.
        layout: the parallel sizes.
        settings: the run.
        args: Megatron's, validated.
    """
    import megatron_slim.mcore

    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.layer_wise_optimizer import (
        LayerWiseDistributedOptimizer,
        tag_params_for_buffer_routing,
    )

    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=args.accumulate_allreduce_grads_in_fp32,
        pad_buckets_for_high_nccl_busbw=args.ddp_pad_buckets_for_high_nccl_busbw,
    )
    owner, dense, expert = DistributedOptimizer, layout.dp, layout.expert_dp
    if OPTIMIZERS[settings.optimizer].has_matrices and settings.shards_optimizer:
        tag_params_for_buffer_routing([chunk])
        owner = LayerWiseDistributedOptimizer
    if not settings.shards_optimizer:
        dense = expert = 1
    trained = [each for each in chunk.parameters() if each.requires_grad]
    full = owner.compute_full_param_layout(trained, None, dense, config, expert_data_parallel_world_size=expert)
    bytes_of, gradients = _state_bytes(chunk, shape, settings), 0
    weights_bytes = sum(each.nbytes for each in chunk.parameters() if not each.requires_grad)
    states = [0] * (layout.gpus // layout.pp)
    for key, buffer in full.layouts.items():
        padded = sum(stop - start for start, stop in buffer.bucket_indices)
        weights_bytes += key.param_dtype.itemsize * padded
        gradients += (key.grad_dtype.itemsize if key.grad_dtype is not None else GRADIENT) * padded
        shards = _shards(buffer, expert if key.is_expert_parallel else dense, bytes_of)
        ways = layout.ep if key.is_expert_parallel else layout.tp
        states = [found + shards[rank // ways % len(shards)] for rank, found in enumerate(states)]
    return Memory(weights=weights_bytes, gradients=gradients), states


def _state_bytes(chunk: DistributedDataParallel, shape: ModelShape, settings: Settings) -> Callable[[Tensor], int]:
    """Bytes of state of an element of a parameter, main copy included."""
    with_rest = {_anywhere(weight.key) for weight in weights(shape) if has_rest(weight)}
    names = {id(parameter): _anywhere(each) for each, parameter in chunk.named_parameters()}

    def bytes_of(parameter: Tensor) -> int:
        optimizer = ADAM if names[id(parameter)] in with_rest else settings.optimizer
        return settings.storage.state_bytes(optimizer, parameter.dtype.itemsize)

    return bytes_of


def _anywhere(key: str) -> str:
    """A name without the number of the layer, which a pipeline stage counts anew."""
    return re.sub(r"layers\.\d+", "layers", key)


def _shards(buffer: _ParamAndGradBuffer, shards: int, bytes_of: Callable[[Tensor], int]) -> list[int]:
    """Bytes of state in each of a buffer's shards: every bucket is divided evenly, padding included."""
    own = [0] * shards
    for parameter, (start, stop, number) in buffer.param_index_map.items():
        first, last = buffer.bucket_indices[number]
        size, each = (last - first) // shards, bytes_of(parameter)
        while start < stop:
            shard = (start - first) // size
            until = min(stop, first + (shard + 1) * size)
            own[shard] += (until - start) * each
            start = until
    return own
