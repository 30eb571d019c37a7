"""What this machine computes with, and a process of Megatron's that needs no launcher."""

from __future__ import annotations

import torch


def backend() -> str:
    """The `torch.distributed` backend of this machine: nccl or gloo."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def default_dtype() -> torch.dtype:
    """What tools compute in by default: bf16 on a GPU, where the large models are; fp32 on a CPU."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def init_single_process(seed: int = 1234) -> None:
    """Start a process group of one, Megatron's parallel state on it, and its random generators.

    For tools that run in one process; does nothing where a parallel state exists already.
    """
    import megatron_slim.mcore

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(0)
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend(), store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(seed)
