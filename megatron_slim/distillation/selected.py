"""A model whose parameters are selections of another's: its weights come from there, its gradients go back there.

Both have the same parallel layout. A rank mostly holds what its selections are made of; where it does not, as where the
survivors are unevenly divided over the ranks of a group, whole tensors are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import megatron_slim.mcore

import numpy as np
import torch
from torch import Tensor, nn

from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.checkpoint.layout import Rows, as_rows
from megatron_slim.distillation.gathered import Gathered
from megatron_slim.distillation.regions import Index, Region, add, regions_of, take
from megatron_slim.pruning.plan import Plan
from megatron_slim.pruning.selection import Origin, Origins, Positions


@dataclass(frozen=True)
class _Selection:
    """One region of the smaller model.

    Attributes:
        own: the region.
        source: the larger model's region that has all that it is made of; None where this rank has none.
        index: what it is made of, within ``source``, or within the whole tensor.
        key: of that tensor.
        expert: of that tensor.
    """

    own: Region
    source: Region | None
    index: Index
    key: str
    expert: int | None


class SelectedParameters:
    """Parameters of one model as selections of another's, both of one pipeline stage.

    A step is `fill`, `begin`, forward and backward passes, `collect`, `release`.
    """

    def __init__(self, model: HiddenStatesModel, source: HiddenStatesModel, plan: Plan) -> None:
        """Find out what comes from where; all ranks call it together.

        Args:
            model: of the plan's target; what its parameters hold is lost.
            source: of the plan's source.
            plan: that merges nothing.
        """
        self._origins, self._sources, own = Origins(plan), regions_of(source), regions_of(model)
        origins = {place: self._origins.of(*place) for place in own}
        pairs = [(origins[place], region) for place, those in own.items() for region in those]
        alone = [self._selection(origin, region) for origin, region in pairs]
        # All ranks of a group gather a tensor, or none does.
        self._apart = _union({each.key for each in alone if each.source is None})
        self._selections = [
            self._selection(origin, region, whole=True) if origin.key in self._apart else found
            for (origin, region), found in zip(pairs, alone, strict=True)
        ]
        owners = {(each.own.owner, None if each.source is None else each.source.owner) for each in self._selections}
        assert len(owners) == len({own for own, _ in owners}), "a parameter is made of one parameter, or gathered"
        self._keys = {origin.key: key for (key, _), origin in origins.items()}
        self._whole_source = Gathered(self._sources, source.pg_collection)
        self._whole_own = Gathered(own, model.pg_collection)
        self._lent, self._filled = False, dict[Tensor, Tensor]()
        self._parameters = [each for each in model.parameters() if each.requires_grad]
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(_add_to_main_grad)

    def _selection(self, origin: Origin, own: Region, *, whole: bool = False) -> _Selection:
        extents = zip(origin.positions, own.start, own.shape, strict=True)
        wanted = [_part(positions, first, extent) for positions, first, extent in extents]
        for source in () if whole else self._sources.get((origin.key, origin.expert), ()):
            if (index := _within(wanted, source)) is not None:
                return _Selection(own, source, index, origin.key, origin.expert)
        return _Selection(own, None, tuple(map(_rows, wanted)), origin.key, origin.expert)

    @property
    def gathered(self) -> list[str]:
        """Tensors of the larger model that are gathered, of which this stage has a part; the same in a group."""
        return sorted(self._apart & self._keys.keys())

    @torch.no_grad()
    def fill(self) -> None:
        """Copy the weights of the larger model as they are now."""
        wholes = {key: self._whole_source.whole(key, _content) for key in self.gathered}
        for each in self._selections:
            source = each.source
            found = wholes[each.key][each.expert] if source is None else source.of(source.owner.data)
            _have_memory(each.own.owner, found.dtype)
            each.own.of(each.own.owner.data).copy_(take(found, each.index))
            if not isinstance(each.own.owner, nn.Parameter):
                self._filled[each.own.owner] = each.own.owner.clone()

    def begin(self, *, lend: bool) -> None:
        """Have gradients of zero in ``main_grad``, as Megatron's DDP has at the beginning of a step.

        Args:
            lend: the larger model is not trained in this step, and no other selection of it: then its own gradients,
                which are zero, lend their memory until `collect`.
        """
        self._lent = lend
        lenders = {each.own.owner: _known(each.source).owner for each in self._selections if each.source is not None}
        parameter: Any
        for parameter in self._parameters:
            source: Any = lenders.get(parameter)
            if lend and source is not None:
                memory = source.main_grad.view(-1)[: parameter.numel()].view_as(parameter)
            else:
                memory = torch.zeros_like(parameter, dtype=torch.float32 if source is None else source.main_grad.dtype)
            parameter.main_grad, parameter.grad_added_to_main_grad = memory, False

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients to those of the larger model."""
        for key in self.gathered:
            self._collect_whole(self._keys[key])
        by_owner: dict[Tensor, list[_Selection]] = {}
        for each in self._selections:
            if each.source is not None and isinstance(each.own.owner, nn.Parameter):
                by_owner.setdefault(each.own.owner, []).append(each)
        for those in by_owner.values():
            gradient = _gradient_of(those[0].own)
            if self._lent:
                gradient = gradient.clone()
                _gradient_of(_known(those[0].source)).zero_()
            for each in those:
                source = _known(each.source)
                add(source.of(_gradient_of(source)), each.index, each.own.of(gradient))

    def _collect_whole(self, key: str) -> None:
        """The same of one tensor of the smaller model whose parts go to other ranks too."""
        wholes = self._whole_own.whole(key, lambda region: region.of(_gradient_of(region)))
        for expert, whole in wholes.items():
            origin = self._origins.of(key, expert)
            for region in self._sources.get((origin.key, origin.expert), ()):
                here = [
                    _overlap(_part(positions, 0, size), first, extent)
                    for positions, size, first, extent in zip(
                        origin.positions, whole.shape, region.start, region.shape, strict=True
                    )
                ]
                if all(chosen.size for chosen, _ in here):
                    content = take(whole, tuple(_rows(chosen) for chosen, _ in here))
                    add(region.of(_gradient_of(region)), tuple(_rows(at) for _, at in here), content)

    @torch.no_grad()
    def collect_buffers(self) -> None:
        """Bring what has changed in buffers, [n], to those of the larger model."""
        for each in self._selections:
            if each.source is not None and not isinstance(each.own.owner, nn.Parameter):
                own, source = each.own.of(each.own.owner), each.source.of(each.source.owner)
                source[each.index] = own if self._lent else source[each.index] + (own - self._filled[each.own.owner])

    def release(self) -> None:
        """Give the memory of weights and gradients back."""
        parameter: Any
        for parameter in self._parameters:
            parameter.main_grad = None
            parameter.untyped_storage().resize_(0)


def _add_to_main_grad(parameter: Any) -> None:
    """What Megatron's DDP does where the gradient of a parameter has come."""
    if not parameter.grad_added_to_main_grad or getattr(parameter, "zero_out_wgrad", False):
        parameter.main_grad.add_(parameter.grad)
    parameter.grad = None


def _union(mine: set[str]) -> set[str]:
    everywhere: list[set[str]] = [set()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, mine)
    return set().union(*everywhere)


def _known(region: Region | None) -> Region:
    assert region is not None
    return region


def _content(region: Region) -> Tensor:
    return region.of(region.owner.data)


def _gradient_of(region: Region) -> Tensor:
    gradient: Tensor = region.owner.main_grad  # type: ignore[attr-defined]
    return gradient


def _have_memory(owner: Tensor, dtype: torch.dtype) -> None:
    """See that a parameter or buffer has memory, and numbers of this type."""
    if owner.dtype != dtype:
        owner.data = torch.empty_like(owner, dtype=dtype)
    elif not owner.untyped_storage().nbytes():
        owner.untyped_storage().resize_(owner.numel() * owner.itemsize)


def _rows(positions: Positions) -> Rows:
    """Positions as an index of tensors on the device."""
    rows = as_rows(positions)
    return rows if isinstance(rows, slice) else rows.to(torch.cuda.current_device())


def _part(positions: Positions, first: int, extent: int) -> Positions:
    """Some of the positions; the rows that pad a vocabulary come after all that are named, in both models."""
    if first + extent <= len(positions):
        return positions[first : first + extent]
    assert np.array_equal(positions, np.arange(len(positions))), "only a vocabulary that is whole is padded"
    return np.arange(first, first + extent)


def _within(positions: Sequence[Positions], region: Region) -> Index | None:
    """The same positions counted within a region, None where some are not in it."""
    inner = [each - first for each, first in zip(positions, region.start, strict=True)]
    if any(each.min() < 0 or each.max() >= size for each, size in zip(inner, region.shape, strict=True)):
        return None
    return tuple(map(_rows, inner))


def _overlap(positions: Positions, first: int, extent: int) -> tuple[Positions, Positions]:
    """Which of the positions are among those of a region, and where in it."""
    inside = (positions >= first) & (positions < first + extent)
    return np.flatnonzero(inside), positions[inside] - first
