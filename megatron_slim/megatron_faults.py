"""Repairs of single faults of Megatron 0.19.2, one function each; `device.install` calls them all.

They are needed on any machine. What only a CPU needs is in `device.py`.
"""

from __future__ import annotations

import functools
from typing import Any


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
    parts = {
        number: {**saved[0], **own[number], "optimizer": _all_groups(saved, optimizer)}
        for number, optimizer in enumerate(optimizers)
    }
    return parts if len(optimizers) > 1 else parts[0]


def _all_groups(saved: list[dict[str, Any]], optimizer: Any) -> dict[str, Any]:
    """Groups of parameters of all saved optimizers, as if they were of this one, which picks those that it has."""
    experts = {"is_expert_parallel": any(group["is_expert_parallel"] for group in optimizer.param_groups)}
    groups = [{**group, **experts} for part in saved for group in part["optimizer"]["param_groups"]]
    return {**saved[0]["optimizer"], "param_groups": groups}
