"""Where Megatron takes a GPU for granted, on a machine without one."""

from __future__ import annotations

import contextlib
import functools
import logging
from types import SimpleNamespace

import torch

from megatron_slim.aliases import Function
from megatron_slim.compat.patch import CPU, NOT_REPORTED, Patch, instead

_RANDOM = "megatron.core.tensor_parallel.random"


def _get_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


RANDOM_STATES = Patch(
    name="random states",
    kind=CPU,
    why="Megatron sets states of CUDA's generators when CUDA starts, which here it never does: none is set.",
    upstream=NOT_REPORTED,
    targets=(f"{_RANDOM}:_get_cuda_rng_state", f"{_RANDOM}:_set_cuda_rng_state"),
    changes=(instead(_get_state), instead(_set_state)),
)


def _refill_storage(emptied: torch.Tensor, recomputed: torch.Tensor) -> None:
    """Give a tensor whose memory was released its content again, for all who hold it or a view of it."""
    storage, source = emptied.untyped_storage(), recomputed.untyped_storage()
    storage.resize_(source.nbytes())
    storage.copy_(source)


SHARED_STORAGE = Patch(
    name="refilled storage",
    kind=CPU,
    why="Recomputation that discards outputs compiles a C++ extension for one call.",
    upstream=NOT_REPORTED,
    targets=(f"{_RANDOM}:_get_share_storage",),
    changes=(instead(lambda: _refill_storage),),
)


def _in_no_context(**_: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


NO_FP8 = Patch(
    name="FP8 in recomputation",
    kind=CPU,
    why="Recomputation that discards outputs asks Transformer Engine about FP8, which is not installed.",
    upstream=NOT_REPORTED,
    targets=(
        f"{_RANDOM}:FP8GlobalStateManager",
        f"{_RANDOM}:activation_recompute_forward",
        f"{_RANDOM}:fp8_autocast",
    ),
    changes=(
        instead(SimpleNamespace(is_fp8_enabled=lambda: False)),
        instead(_in_no_context),
        instead(_in_no_context),
    ),
    optional=True,
)


def _moved(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


TOKEN_COUNTS = Patch(
    name="token counts",
    kind=CPU,
    why="The dispatcher of tokens wants arrays of counts, and makes them of tensors on a GPU alone.",
    upstream=NOT_REPORTED,
    targets=("megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",),
    changes=(instead(_moved),),
)


def _allowing_no_cuda(initialise: Function) -> Function:
    return functools.partial(initialise, allow_no_cuda=True)


NO_CUDA = Patch(
    name="initialisation",
    kind=CPU,
    why="Megatron's loop ends at once where there is no CUDA: it does not pass on that this is meant.",
    upstream=f"megatron/training/initialize.py; {NOT_REPORTED}",
    targets=(
        "megatron.training.initialize:initialize_megatron",
        "megatron.training.training:initialize_megatron",
    ),
    changes=(_allowing_no_cuda, _allowing_no_cuda),
)
PATCHES = (RANDOM_STATES, SHARED_STORAGE, NO_FP8, TOKEN_COUNTS, NO_CUDA)


def prepare() -> None:
    """Make the changes of this module, on a machine without CUDA."""
    for patch in PATCHES:
        patch.apply()
    # Drawing from the one generator there is changes the CPU's state by design.
    logging.getLogger(_RANDOM).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
