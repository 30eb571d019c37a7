"""Bugs of Megatron with what is in fp32 in a model of 16 bits: counts of routers, and parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from megatron_slim.aliases import Function
from megatron_slim.compat.patch import BUG, Patch

if TYPE_CHECKING:
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
    from megatron.core.transformer.moe.router import TopKRouter

_SHARDED = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_PLAIN = "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params"

# Buffers of a router; one that it does not need is None.
_ROUTER_COUNTERS = ("global_tokens_per_expert", "ga_steps", "local_tokens_per_expert")


def _with_counts(maintain: Callable[..., None]) -> Callable[..., None]:
    """Megatron's own remedy for ``expert_bias``, extended."""

    @functools.wraps(maintain)
    def run(self: TopKRouter) -> None:
        maintain(self)
        for name in _ROUTER_COUNTERS:
            count = getattr(self, name)
            if count is not None and count.dtype != torch.float32:
                setattr(self, name, count.float())

    return run


ROUTER_COUNTS = Patch(
    name="counts of routers",
    kind=BUG,
    why="Tokens per expert and micro-batches are buffers, which become bf16 with the rest of the model. Counts above "
    "256 are rounded, the count of micro-batches stays at 256, and an expert bias moves the wrong way.",
    upstream="https://github.com/NVIDIA/Megatron-LM/pull/7081",
    targets=("megatron.core.transformer.moe.router:TopKRouter._maintain_float32_expert_bias",),
    changes=(_with_counts,),
)

RESTORED_PARAMETERS = Patch(
    name="fp32 is restored",
    kind=BUG,
    why="Parameters in fp32 are their own main parameters. The distributed optimizer restores them by copying into "
    "views of them, which autograd forbids for what is trained.",
    upstream="https://github.com/NVIDIA/Megatron-LM/issues/2777",
    targets=(f"{_SHARDED}._set_main_param_and_optimizer_states",),
    changes=(torch.no_grad(),),
)


def _fp32_first(build: Function) -> Function:
    @functools.wraps(build)
    def run(*args: object, **kwargs: object) -> object:
        _, groups = build(*args, **kwargs)
        for group in groups:
            group["params"].sort(key=lambda parameter: parameter.dtype != torch.float32)
        places = {
            parameter: (number, order)
            for number, group in enumerate(groups)
            for order, parameter in enumerate(group["params"])
        }
        return places, groups

    return run


ORDERED_PARAMETERS = Patch(
    name="order of fp32",
    kind=BUG,
    why="Where a group holds parameters of 16 bits and in fp32, the distributed optimizer is given those in fp32 "
    "first, but saves and restores state by places in the order of the buffers: every parameter is saved with the "
    "state of another, silently where their sizes agree.",
    upstream="https://github.com/NVIDIA/Megatron-LM/pull/5835",
    targets=(f"{_SHARDED}._build_optimizer_group_ranges",),
    changes=(_fp32_first,),
)


def _showing_all(method: Function) -> Function:
    """For the time of a call the optimizer is shown all its parameters; those in fp32 are their own main parameters."""

    @functools.wraps(method)
    def run(self: Float16OptimizerWithFloat16Params, *args: object, **kwargs: object) -> object:
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


PLAIN_OPTIMIZER = Patch(
    name="fp32 is saved",
    kind=BUG,
    why="Where a group holds parameters of 16 bits and in fp32, the optimizer that is not distributed counts those of "
    "16 bits alone when it looks for the weights that its state belongs to, for saving and for loading.",
    upstream="https://github.com/NVIDIA/Megatron-LM/pull/5929",
    targets=(f"{_PLAIN}.sharded_state_dict", f"{_PLAIN}.load_state_dict"),
    changes=(_showing_all, _showing_all),
)
