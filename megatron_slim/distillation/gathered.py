"""Whole tensors of a model, put together of the parts that the ranks of a group hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import megatron_slim.mcore

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_slim.distillation.regions import Place, Region

_Part = tuple[int | None, tuple[int, ...], tuple[int, ...]]  # expert, start, extents


class Gathered:
    """Tensors of a model that its ranks hold parts of; all ranks of a group ask for the same ones, in the same order.

    Experts are parts of a stacked tensor, which expert and expert tensor parallelism divide; others are divided by
    tensor parallelism.
    """

    def __init__(self, regions: Mapping[Place, list[Region]], groups: ProcessGroupCollection) -> None:
        """Take note of what there is; nothing is communicated yet."""
        self._mine: dict[str, list[tuple[int | None, Region]]] = defaultdict(list)
        for (key, expert), those in regions.items():
            self._mine[key] += [(expert, each) for each in those]
        self._groups = groups
        self._parts: dict[str, list[list[_Part]]] = {}

    def whole(self, key: str, memory: Callable[[Region], Tensor]) -> dict[int | None, Tensor]:
        """A whole tensor, of a stacked one all experts by their numbers.

        Args:
            key: in a torch_dist checkpoint; this rank holds a part of it.
            memory: content of a region.
        """
        mine = self._mine[key]
        group = self._groups.tp if mine[0][0] is None else self._groups.tp_ep
        if key not in self._parts:
            self._parts[key] = _exchanged([(expert, each.start, each.shape) for expert, each in mine], group)
        flat = torch.cat([memory(region).reshape(-1) for _, region in mine])
        received = [torch.empty_like(flat) for _ in self._parts[key]]
        torch.distributed.all_gather(received, flat, group=group)
        return _assembled(self._parts[key], received)


def _exchanged(parts: list[_Part], group: torch.distributed.ProcessGroup) -> list[list[_Part]]:
    """What each rank of a group has."""
    everywhere: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everywhere, parts, group=group)
    return everywhere


def _assembled(parts: list[list[_Part]], received: list[Tensor]) -> dict[int | None, Tensor]:
    extents: dict[int | None, tuple[int, ...]] = {}
    for expert, start, shape in (each for those in parts for each in those):
        ends = tuple(first + extent for first, extent in zip(start, shape, strict=True))
        extents[expert] = tuple(map(max, ends, extents.get(expert, ends)))
    found = {expert: received[0].new_empty(shape) for expert, shape in extents.items()}
    for those, flat in zip(parts, received, strict=True):
        sizes = [torch.Size(shape).numel() for _, _, shape in those]
        for (expert, start, shape), content in zip(those, flat.split(sizes), strict=True):
            at = tuple(slice(first, first + extent) for first, extent in zip(start, shape, strict=True))
            found[expert][at] = content.view(shape)
    return found
