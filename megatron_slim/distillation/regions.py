"""Rectangles of a model's parameters, as they stand in the tensors that all ranks hold parts of."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import Tensor

from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.checkpoint.layout import Rows
from megatron_slim.checkpoint.loading import shards_of

Index = tuple[Rows, ...]
Place = tuple[str, int | None]  # key in a torch_dist checkpoint, and the expert of a stacked tensor


@dataclass(frozen=True)
class Region:
    """A rectangle of a parameter or a buffer.

    Attributes:
        owner: this rank's parameter or buffer.
        geometry: sizes, strides and offset in its memory, of elements.
        start: of its first element in the whole tensor (of one expert).
    """

    owner: Tensor
    geometry: tuple[tuple[int, ...], tuple[int, ...], int]
    start: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extents."""
        return self.geometry[0]

    def of(self, memory: Tensor) -> Tensor:
        """The rectangle of a tensor with the owner's layout: of its content, or of its gradient."""
        sizes, strides, offset = self.geometry
        return memory.as_strided(sizes, strides, memory.storage_offset() + offset)


def regions_of(model: HiddenStatesModel) -> dict[Place, list[Region]]:
    """What this rank holds of every tensor of a torch_dist checkpoint, by the model's own account of its shards."""
    owners: dict[int, Tensor] = {each.untyped_storage().data_ptr(): each for each in model.buffers()}
    owners |= {each.untyped_storage().data_ptr(): each for each in model.parameters()}
    found: dict[Place, list[Region]] = defaultdict(list)
    for shard in shards_of(model):
        owner, stacked = owners[shard.data.untyped_storage().data_ptr()], shard.prepend_axis_num
        offset = shard.data.storage_offset() - owner.storage_offset()
        geometry = tuple(shard.data.shape), tuple(shard.data.stride()), offset
        expert = shard.global_offset[0] if stacked else None
        found[shard.key, expert].append(Region(owner, geometry, tuple(shard.global_offset[stacked:])))
    return dict(found)


def take(source: Tensor, index: Index) -> Tensor:
    """Rows, columns, ... of a tensor; a view where each is a slice."""
    for dim, rows in enumerate(index):
        if isinstance(rows, slice):
            source = source[(slice(None),) * dim + (rows,)]
        else:
            source = source.index_select(dim, rows)
    return source


def add(target: Tensor, index: Index, content: Tensor) -> None:
    """Add to rows, columns, ... of a tensor, none of which is named twice.

    >>> import torch
    >>> target = torch.zeros(3, 3)
    >>> add(target, (torch.tensor([0, 2]), torch.tensor([0, 2])), torch.ones(2, 2))
    >>> target.tolist()
    [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]
    """
    view = target[tuple(rows if isinstance(rows, slice) else slice(None) for rows in index)]
    lists = [(dim, rows) for dim, rows in enumerate(index) if not isinstance(rows, slice)]
    if not lists:
        view.add_(content)
        return
    (dim, rows), *others = lists
    if not others:
        view.index_add_(dim, rows, content)
        return
    part = view.index_select(dim, rows)
    rest: list[slice | Tensor] = [slice(None)] * len(index)
    for other, those in others:
        rest[other] = those
    add(part, tuple(rest), content)
    view.index_copy_(dim, rows, part)
