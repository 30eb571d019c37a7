"""Bugs of Megatron that show when a run saves or resumes: padding of buckets, rates, experts, empty optimizers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_slim.aliases import Function, ParamGroup, StateDict
from megatron_slim.compat.patch import BUG, NOT_REPORTED, Patch

if TYPE_CHECKING:
    from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer

_OPTIMIZER = "megatron.core.optimizer.optimizer"
_SHARDED = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"


def _with_padding(compute: Function) -> Function:
    @functools.wraps(compute)
    def run(*args: object, **kwargs: object) -> object:
        layout = compute(*args, **kwargs)
        layout.per_bucket_numel_unpadded = [end - start for start, end in layout.bucket_indices]
        return layout

    return run


BUCKET_PADDING = Patch(
    name="padding of buckets",
    kind=BUG,
    why="The optimizer's buckets are saved without the padding at their end, but the offsets by which parameters are "
    "then found count it. With several buckets (a pipeline stage with a shared embedding has two) what is saved is "
    "shifted by up to 127 elements, or, in the other format, refused as out of bounds.",
    upstream="https://github.com/NVIDIA/Megatron-LM/pull/5898",
    targets=(f"{_SHARDED}._compute_per_buffer_param_layout",),
    changes=(_with_padding,),
)

_RATES = ("max_lr", "min_lr")


def _override(saved: list[ParamGroup], own: list[ParamGroup]) -> None:
    """Give saved groups the rates of those here, which are the same but for these."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys
    from megatron.training import get_args

    others = [key for key in param_group_identifier_keys if key not in _RATES]

    def name(group: ParamGroup) -> tuple[object, ...]:
        return tuple(group.get(key, group.get(f"pre_{key}")) for key in others)

    given = {name(group): {key: group.get(key) for key in _RATES} for group in own}
    if get_args().override_opt_param_scheduler and len(given) == len(own):
        for group in saved:
            group.update(given.get(name(group), {}))


def _loading_overridden(load: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(load)
    def run(self: MegatronOptimizer, state_dict: StateDict) -> None:
        if "optimizer" in state_dict:
            _override(state_dict["optimizer"]["param_groups"], self.optimizer.param_groups)
        load(self, state_dict)

    return run


def _pairing_overridden(pair: Function) -> Function:
    @functools.wraps(pair)
    def run(current: list[ParamGroup], saved: list[ParamGroup]) -> object:
        _override(saved, current)
        return pair(current, saved)

    return run


OTHER_RATES = Patch(
    name="other learning rates",
    kind=BUG,
    why="A saved group of parameters is found by its learning rates, among others: with new ones none is found, and "
    "--override-opt_param-scheduler, which is for that, does not help.",
    upstream="https://github.com/NVIDIA/Megatron-LM/pull/4705",
    targets=(f"{_SHARDED}.load_state_dict", f"{_OPTIMIZER}:MegatronOptimizer._filter_and_reorder_param_groups"),
    changes=(_loading_overridden, _pairing_overridden),
)


def _loading_any(load: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(load)
    def run(self: MegatronOptimizer, state_dict: StateDict) -> None:
        load(self, _for_optimizers(self.chained_optimizers, state_dict))

    return run


def _for_optimizers(optimizers: list[MegatronOptimizer], state_dict: StateDict) -> StateDict:
    """A state dict, in which what was saved and what was asked for are merged, as these optimizers read it."""
    numbered = {key: part for key, part in state_dict.items() if isinstance(key, int)}
    rest = {key: part for key, part in state_dict.items() if not isinstance(key, int)}
    if not numbered or not rest:  # saved by as many optimizers
        return state_dict
    saved, own = ([rest], numbered) if len(optimizers) > 1 else (list(numbered.values()), {0: rest})
    parts = {number: _for_optimizer(optimizer, saved, own[number]) for number, optimizer in enumerate(optimizers)}
    return parts if len(optimizers) > 1 else parts[0]


def _for_optimizer(optimizer: MegatronOptimizer, saved: list[ParamGroup], own: StateDict) -> StateDict:
    """The tensors that one optimizer asked for, with the groups of all that were saved, of which it picks its own."""
    experts = any(group["is_expert_parallel"] for group in optimizer.param_groups)
    groups = [{**group, "is_expert_parallel": experts} for part in saved for group in _inner(part)["param_groups"]]
    # Without the distributed optimizer the numbers of parameters come with the tensors, group by group.
    numbers = [group["params"] for group in _inner(own).get("param_groups", [])]
    enough = itertools.islice(itertools.cycle(groups), max(len(groups), len(numbers)))
    groups = [{**group, "params": params} for group, params in itertools.zip_longest(enough, numbers)]
    inner = {**_inner(saved[0]), **_inner(own), "param_groups": groups}
    return {**saved[0], **own, "optimizer": inner} if "optimizer" in saved[0] else inner


def _inner(part: StateDict) -> StateDict:
    """Where the groups are: fp32 parameters without the distributed optimizer have nothing around them."""
    return part.get("optimizer", part)


OTHER_EXPERT_PARALLELISM = Patch(
    name="other expert parallelism",
    kind=BUG,
    why="Megatron has one optimizer where the expert parallel size is 1, and two above: one for the parameters of "
    "experts. Tensors are saved by the names of parameters and do not know it, but the groups of parameters, which "
    "hold the step and the rates, are found by the optimizer's number and by whether they are of experts.",
    upstream="https://github.com/NVIDIA/Megatron-LM/issues/1517",
    targets=(f"{_OPTIMIZER}:ChainedOptimizer.load_state_dict",),
    changes=(_loading_any,),
)


def _of_something(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def run(self: ChainedOptimizer, chained_optimizers: list[MegatronOptimizer]) -> None:
        # The same ones on all ranks: they agree on the groups of parameters.
        some = [each for each in chained_optimizers if not getattr(each, "is_stub_optimizer", False)]
        init(self, some or chained_optimizers)

    return run


EMPTY_OPTIMIZERS = Patch(
    name="empty optimizers",
    kind=BUG,
    why="Where the expert parallel size is above 1, Megatron has an optimizer for experts and one for the rest. If "
    "experts alone are trained, or all else, one of them has no groups, and saving reads its groups.",
    upstream=NOT_REPORTED,
    targets=(f"{_OPTIMIZER}:ChainedOptimizer.__init__",),
    changes=(_of_something,),
)
