"""Faults of Megatron-Core 0.19.2, repaired in place, on a CPU and on a GPU; `device.install` calls each once."""

from __future__ import annotations

import functools
from typing import Any

import torch

# Buffers of a router; one that it does not need is None.
_COUNTERS = ("global_tokens_per_expert", "ga_steps", "local_tokens_per_expert")


def count_tokens_in_fp32() -> None:
    """Keep in fp32 what routers count, for the global load-balancing loss and for the expert bias.

    Tokens per expert and micro-batches are buffers, which Megatron turns into bf16 with the rest of the model: counts
    above 256 are then rounded, the count of micro-batches stays at 256 for ever, and an expert bias moves the wrong
    way. Its own remedy for ``expert_bias`` is extended.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    maintain = TopKRouter._maintain_float32_expert_bias

    @functools.wraps(maintain)
    def with_counts(self: Any) -> None:
        maintain(self)
        for name in _COUNTERS:
            count = getattr(self, name)
            if count is not None and count.dtype != torch.float32:
                setattr(self, name, count.float())

    TopKRouter._maintain_float32_expert_bias = with_counts


def restore_fp32_parameters() -> None:
    """Let the distributed optimizer restore parameters that are in fp32, which are their own main parameters.

    It copies into views of them, which autograd forbids for what is trained.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    restore = torch.no_grad()(DistributedOptimizer._set_main_param_and_optimizer_states)
    DistributedOptimizer._set_main_param_and_optimizer_states = restore
