"""Repairs of single faults of Megatron 0.19.2, one function each, needed on any machine.

`device.install` calls those of Megatron-Core, training those of Megatron's loop, which other tools do not import.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch


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


_COUNTERS = ("advanced iterations", "skipped iterations", "nan iterations")


class _LastIteration(dict[str, Any]):
    """Megatron's sums of losses, of one iteration alone: read to be divided by the iterations since the last line."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return value.double() * max(1, self["advanced iterations"]) if torch.is_tensor(value) else value


def log_what_the_iteration_was() -> None:
    """Have a line of Megatron's log tell the losses and schedules of its iteration, and tensorboard's as before.

    Megatron tells means since the last line, and since the start in the line after the first of a start: what a line
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

        for name in sums.keys() - _COUNTERS:
            del sums[name]
        # Otherwise a first line that ends an interval would not begin the next.
        first = is_first_iteration and iteration % get_args().log_interval != 0
        return log(losses, sums, rate, iteration, *args, is_first_iteration=first, **more)

    return log_one
