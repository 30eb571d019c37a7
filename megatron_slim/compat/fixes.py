"""Bugs of Megatron 0.19.2, repaired in place, on a CPU and on a GPU.

`device.install` calls each once that is Megatron-Core's; training those of Megatron's loop, which other tools do not
import.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch

# Buffers of a router; one that it does not need is None.
_ROUTER_COUNTERS = ("global_tokens_per_expert", "ga_steps", "local_tokens_per_expert")


def count_tokens_in_fp32() -> None:
    """Keep in fp32 what routers count, for the global load-balancing loss and for the expert bias.

    Tokens per expert and micro-batches are buffers, which Megatron turns into bf16 with the rest of the model: counts
    above 256 are then rounded, the count of micro-batches stays at 256 forever, and an expert bias moves the wrong
    way. Its own remedy for ``expert_bias`` is extended.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    maintain = TopKRouter._maintain_float32_expert_bias

    @functools.wraps(maintain)
    def with_counts(self: Any) -> None:
        maintain(self)
        for name in _ROUTER_COUNTERS:
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


def resume_with_other_expert_parallelism() -> None:
    """Let an optimizer be restored that was saved with another number of optimizers in its chain.

    Megatron has one optimizer where the expert parallel size is 1, and two above: one for experts' parameters. Tensors
    are saved by the names of parameters and do not know it, but the groups of parameters, which hold the step and the
    rates, are found by the optimizer's number and by whether they are of experts.
    """
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    load = ChainedOptimizer.load_state_dict

    @functools.wraps(load)
    def load_any(self: Any, state_dict: Any) -> None:
        load(self, _for_optimizers(self.chained_optimizers, state_dict))

    ChainedOptimizer.load_state_dict = load_any


def _for_optimizers(optimizers: list[Any], state_dict: Any) -> Any:
    """A state dict, in which what was saved and what was asked for are merged, as these optimizers read it."""
    numbered = {key: part for key, part in state_dict.items() if isinstance(key, int)}
    rest = {key: part for key, part in state_dict.items() if not isinstance(key, int)}
    if not numbered or not rest:  # saved by as many optimizers
        return state_dict
    saved, own = ([rest], numbered) if len(optimizers) > 1 else (list(numbered.values()), {0: rest})
    parts = {number: _for_optimizer(optimizer, saved, own[number]) for number, optimizer in enumerate(optimizers)}
    return parts if len(optimizers) > 1 else parts[0]


def _for_optimizer(optimizer: Any, saved: list[dict[str, Any]], own: dict[str, Any]) -> dict[str, Any]:
    """The tensors that one optimizer asked for, with the groups of all that were saved, of which it picks its own."""
    experts = any(group["is_expert_parallel"] for group in optimizer.param_groups)
    groups = [{**group, "is_expert_parallel": experts} for part in saved for group in _inner(part)["param_groups"]]
    # Without the distributed optimizer the numbers of parameters come with the tensors, group by group.
    numbers = [group["params"] for group in _inner(own).get("param_groups", [])]
    enough = itertools.islice(itertools.cycle(groups), max(len(groups), len(numbers)))
    groups = [{**group, "params": params} for group, params in itertools.zip_longest(enough, numbers)]
    inner = {**_inner(saved[0]), **_inner(own), "param_groups": groups}
    return {**saved[0], **own, "optimizer": inner} if "optimizer" in saved[0] else inner


def _inner(part: dict[str, Any]) -> dict[str, Any]:
    """Where the groups are: fp32 parameters without the distributed optimizer have nothing around them."""
    return part.get("optimizer", part)


_LOG_COUNTERS = ("advanced iterations", "skipped iterations", "nan iterations")


class _LastIteration(dict[str, Any]):
    """Megatron's sums of losses, of one iteration alone: read to be divided by the iterations since the last line."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return value.double() * max(1, self["advanced iterations"]) if torch.is_tensor(value) else value


def log_what_the_iteration_was() -> None:
    """Have a line of Megatron's log show the losses and schedules of its iteration, and tensorboard's as before.

    Megatron logs means since the last line, and since the start in the line after the first of a start: what a line
    says then depends on where a run was interrupted. Counts and times stay those since the last line.
    """
    import megatron.training.training as training

    training.training_log = _of_one_iteration(training.training_log)


def _of_one_iteration(log: Callable[..., Any]) -> Callable[..., Any]:
    sums = _LastIteration()

    @functools.wraps(log)
    def log_one(
        losses: Any, _: Any, rate: Any, iteration: int, *args: Any, is_first_iteration: bool, **more: Any
    ) -> Any:
        from megatron.training import get_args

        for name in sums.keys() - _LOG_COUNTERS:
            del sums[name]
        # Otherwise a first line that ends an interval would not begin the next.
        first = is_first_iteration and iteration % get_args().log_interval != 0
        return log(losses, sums, rate, iteration, *args, is_first_iteration=first, **more)

    return log_one
