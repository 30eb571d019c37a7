"""Groups of parameters of several optimizers, saved so that they do not depend on which of them has what.

Megatron has an optimizer of its own for the matrices of experts where the expert parallel size is above 1. It saves
groups, which hold the step and the rates, by the number of the optimizer: with another number it fails as it loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_slim.aliases import ParamGroup, StateDict

if TYPE_CHECKING:
    from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer

GROUPS = "groups"
# What a group is known by, apart from rates, which may be given anew, and from whether it is of experts.
_KNOWN_BY = ("optimizer", "wd_mult", "pre_wd_mult", "lr_mult", "pre_lr_mult", "is_decoupled_lr")


def save_groups_in_one_list(optimizer: ChainedOptimizer) -> None:
    """Have a chain of optimizers save all its groups in one list, and find its own in such a list.

    Args:
        optimizer: Megatron's ``ChainedOptimizer``, whose methods are replaced.
    """
    if len(optimizer.chained_optimizers) < 2:  # of a student of which some parts are trained: saved as it is
        return
    save, load = optimizer.sharded_state_dict, optimizer.load_state_dict

    def sharded_state_dict(model: object, is_loading: bool = False, **kwargs: object) -> StateDict:
        found = save(model, is_loading, **kwargs)
        inner = [_inner(part) for part in found.values()]
        # Buffers of the distributed optimizer, which belong to a layout, come with their groups as one object.
        groups = [group for part in inner if isinstance(part, dict) for group in part.pop("param_groups")]
        if not is_loading:
            found[GROUPS] = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        return found

    def load_state_dict(state: StateDict) -> None:
        if GROUPS in state:
            state = _by_optimizer(optimizer.chained_optimizers, state)
        load(state)

    optimizer.sharded_state_dict, optimizer.load_state_dict = sharded_state_dict, load_state_dict


def _by_optimizer(optimizers: Sequence[MegatronOptimizer], state: StateDict) -> StateDict:
    """A loaded state as Megatron's optimizers read it: each with the groups that are its own."""
    saved = {_name(group): group for group in state[GROUPS]}
    parts = {}
    for number, optimizer in enumerate(optimizers):
        part, groups = state.get(number, {}), []
        parts[number], inner = part, _inner(part)
        if "param_groups" in inner:  # of buffers
            continue
        for own in optimizer.optimizer.state_dict()["param_groups"]:
            kept = {"params": own["params"], "is_expert_parallel": own["is_expert_parallel"]}
            groups.append({**saved.get(_name(own), {}), **kept})
        inner["param_groups"] = groups
        inner.setdefault("state", {})
    return parts


def _name(group: ParamGroup) -> tuple[object, ...]:
    return tuple(group.get(key) for key in _KNOWN_BY)


def _inner(part: StateDict) -> StateDict:
    """Where the groups are: fp32 parameters have nothing around them."""
    found: StateDict = part.get("optimizer", part)
    return found
