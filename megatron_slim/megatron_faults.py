"""Faults of Megatron-Core 0.19.2, repaired in place, on a CPU and on a GPU; `device.install` calls each once."""

from __future__ import annotations

import functools
from collections.abc import Callable
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


def order_fp32_parameters() -> None:
    """Let the distributed optimizer find its state again where a group holds parameters of 16 bits and in fp32.

    The optimizer is given those in fp32 first, but the places by which state is saved and restored are counted in the
    order of the buffers: every parameter is saved with the state of another, silently where their sizes agree.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    build = DistributedOptimizer._build_optimizer_group_ranges

    @functools.wraps(build)
    def fp32_first(*args: Any, **kwargs: Any) -> Any:
        _, groups = build(*args, **kwargs)
        for group in groups:
            group["params"].sort(key=lambda parameter: parameter.dtype != torch.float32)
        places = {
            parameter: (number, order)
            for number, group in enumerate(groups)
            for order, parameter in enumerate(group["params"])
        }
        return places, groups

    DistributedOptimizer._build_optimizer_group_ranges = staticmethod(fp32_first)


def save_fp32_parameters() -> None:
    """Let the optimizer that is not distributed save and load groups of parameters of 16 bits and in fp32.

    It counts those of 16 bits alone where it looks for the weights that its state belongs to. For the time of saving
    and loading it is shown all its parameters; those in fp32 are their own main parameters.
    """
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params as Plain

    def showing_all(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.is_stub_optimizer:
                return method(self, *args, **kwargs)
            own = self.float16_groups, self.fp32_from_float16_groups
            models = {id(main): model for pair in zip(*own, strict=True) for model, main in zip(*pair, strict=True)}
            mains = [group["params"] for group in self.optimizer.param_groups]
            self.float16_groups = [[models.get(id(main), main) for main in group] for group in mains]
            self.fp32_from_float16_groups = mains
            try:
                return method(self, *args, **kwargs)
            finally:
                self.float16_groups, self.fp32_from_float16_groups = own

        return run

    Plain.sharded_state_dict = showing_all(Plain.sharded_state_dict)
    Plain.load_state_dict = showing_all(Plain.load_state_dict)
