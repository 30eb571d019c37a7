"""On a CPU: what Megatron has kernels for on a GPU, and what it need not do."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, autograd
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_slim.aliases import Context, Function
from megatron_slim.compat.patch import NOT_REPORTED, SPEED, Patch
from megatron_slim.products import linear
from megatron_slim.weight_gradient import weight_gradient

_LAYERS = "megatron.core.tensor_parallel.layers"
_BUFFERS = "megatron.core.distributed.param_and_grad_buffer"


class _Linear(autograd.Function):
    """Inputs [n, k] times the transpose of a weight [m, k]."""

    @staticmethod
    def forward(ctx: Context, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return linear(inputs, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, d_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        of_inputs = linear(d_outputs, weight.t()) if ctx.needs_input_grad[0] else None
        return of_inputs, weight_gradient(weight, d_outputs, inputs)


def _unless_shared(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Where several ranks share a layer, Megatron's own stays: it overlaps products and communication."""

    @functools.wraps(theirs)
    def run(input: Tensor, weight: Tensor, *, bias: Tensor | None, **how: Any) -> Tensor:
        shared = how["allreduce_dgrad"] or how["sequence_parallel"] or how.get("gtp_remat_size", 1) > 1
        if bias is not None or shared or how.get("grad_output_buffer") is not None:
            return theirs(input, weight, bias=bias, **how)
        rows: Tensor = _Linear.apply(input.flatten(0, -2), weight)
        return rows.view(*input.shape[:-1], len(weight))

    return run


LINEAR_LAYERS = Patch(
    name="linear layers",
    kind=SPEED,
    why="Products in fp32 do not use AVX-512 on processors that Intel did not make, and the gradient of a weight is "
    "added to main_grad in a step of its own.",
    upstream=NOT_REPORTED,
    targets=(
        f"{_LAYERS}:linear_with_frozen_weight",
        f"{_LAYERS}:linear_with_grad_accumulation_and_async_allreduce",
    ),
    changes=(_unless_shared, _unless_shared),
)


def _unless_sorted(sort: Function) -> Function:
    def run(
        rows: Tensor, sizes: Tensor, order: Tensor, probs: Tensor | None = None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None]:
        if bool((order[1:] > order[:-1]).all()):
            return rows, probs
        found: tuple[Tensor, Tensor | None] = sort(rows, sizes, order, probs=probs, **kwargs)
        return found

    return run


SORTED_CHUNKS = Patch(
    name="sorted tokens",
    kind=SPEED,
    why="After the all-to-all the dispatcher sorts what came from all ranks by expert, and copies all of it where it "
    "came from one rank alone and is sorted.",
    upstream=NOT_REPORTED,
    targets=("megatron.core.transformer.moe.token_dispatcher:sort_chunks_by_idxs",),
    changes=(_unless_sorted,),
)


class _Done:
    """A collective that has ended."""

    def wait(self) -> None:
        pass


def _coalescing_unless_alone(together: Function) -> Function:
    @contextlib.contextmanager
    def coalesce(group: ProcessGroup, *args: object, **kwargs: object) -> Iterator[object]:
        if group.size() == 1:
            yield _Done()
        else:
            with together(group, *args, **kwargs) as handle:
                yield handle

    return coalesce


def _unless_alone(collective: Function) -> Function:
    def run(output: Tensor, own: Tensor, *args: object, group: ProcessGroup, **kwargs: object) -> object:
        if group.size() > 1:
            return collective(output, own, *args, group=group, **kwargs)
        if output.data_ptr() != own.data_ptr():
            output.copy_(own)
        return None

    return run


BUFFERS_OF_ONE_RANK = Patch(
    name="buffers of one rank",
    kind=SPEED,
    why="In a group of one rank its part of a buffer of gradients or parameters is the buffer, and gloo copies it "
    "twice to send it to itself.",
    upstream=NOT_REPORTED,
    targets=(
        f"{_BUFFERS}:_coalescing_manager",
        f"{_BUFFERS}:dist_reduce_scatter_func",
        f"{_BUFFERS}:dist_all_gather_func",
    ),
    changes=(_coalescing_unless_alone, _unless_alone, _unless_alone),
)
PATCHES = (LINEAR_LAYERS, SORTED_CHUNKS, BUFFERS_OF_ONE_RANK)
