"""Matrices of equal shape as stacks, whatever parameters, experts and ranks they are spread over.

A stack is a list of places: which rows or columns of which parameter. Where tensor-parallel ranks have parts of its
matrices, parts are exchanged so that every rank has some of them whole, and back. Each matrix is computed once, and
alike in every layout. Shapes: N matrices, R x C as one rank has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_slim.architecture.matrices import as_matrices, hf_name, local_positions, outer_axes
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.weight import Weight
from megatron_slim.checkpoint.layout import as_rows

Index: TypeAlias = "slice | Tensor"
# Of a stack in fp32, of which some eight are there at once: on a GPU few launches, on a CPU what its cache holds.
STACK_BYTES = {"cuda": 128 << 20, "cpu": 1 << 20}


@dataclass(frozen=True)
class Row:
    """What a parameter of this rank is.

    Attributes:
        weight: its row in the architecture table; None for what is trained next to the model.
        expert: its number in the whole model.
    """

    weight: Weight | None
    expert: int | None = None


@dataclass(frozen=True)
class Ranks:
    """Who has the other parts of a matrix.

    Attributes:
        group: of processes; None where this rank has it whole.
        count: of these.
        dim: the dimension of which each has a part.
    """

    group: torch.distributed.ProcessGroup | None = None
    count: int = 1
    dim: int = 0


WHOLE = Ranks()


@dataclass(frozen=True, eq=False)
class Place:
    """One matrix in a parameter, or rows that AdamW updates.

    Attributes:
        parameter: as the optimizer has it.
        group: number of the optimizer's group.
        name: of the Hugging Face tensor.
        index: its positions on dimension ``dim``.
        dim: of the parameter.
        ranks: that have parts of it.
        is_matrix: whether it is updated as one.
    """

    parameter: Tensor
    group: int
    name: str
    index: Index
    dim: int
    ranks: Ranks
    is_matrix: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part that is here."""
        length = (
            len(range(*self.index.indices(self.parameter.shape[self.dim])))
            if isinstance(self.index, slice)
            else len(self.index)
        )
        shape = list(self.parameter.shape)
        shape[self.dim] = length
        return tuple(shape)

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a tensor of the parameter's shape: a view, or a copy where positions are scattered."""
        if isinstance(self.index, slice):
            return tensor[self.index] if self.dim == 0 else tensor[:, self.index]
        return tensor.index_select(self.dim, self.index)


def places_of(parameter: Tensor, group: int, row: Row, model: ModelShape, ranks: Ranks, *, every: bool) -> list[Place]:
    """The matrices of a parameter, and its rows that are none.

    Args:
        parameter: as the optimizer has it.
        group: number of the optimizer's group.
        row: what it is.
        model: sizes of the model.
        ranks: that have parts of it, whichever dimension the table says.
        every: update thin matrices as matrices, too.
    """
    weight = row.weight
    if weight is None:
        return [Place(parameter, group, "", slice(0, parameter.shape[0]), 0, WHOLE, is_matrix=False)]
    split = weight.tp_dim is not None and ranks.count > 1
    at = Ranks(ranks.group, ranks.count, weight.tp_dim or 0) if split else WHOLE
    sizes, found = model.in_block(weight.block).sizes, []
    for piece in as_matrices(weight, all_matrices=every):
        ways = at.count if split else 1
        positions = local_positions(weight.dims, piece.dim, sizes, weight.tp_dim, ways)[piece.label]
        index = as_rows(positions)
        index = index.to(parameter.device) if isinstance(index, Tensor) else index
        name = hf_name(weight, piece.label, row.expert)
        place = Place(parameter, group, name, index, piece.dim, at, is_matrix=not piece.why)
        assert _whole(place.shape, at) == piece.shape(sizes) or outer_axes(weight.dims[0]) == {"vocab"}, (name, place)
        found.append(place)
    return found


def _whole(shape: tuple[int, ...], ranks: Ranks) -> tuple[int, ...]:
    return tuple(extent * (ranks.count if dim == ranks.dim else 1) for dim, extent in enumerate(shape))


def stacks(places: Iterable[Place]) -> Iterator[list[Place]]:
    """Places whose parts have equal shapes, in the order in which they are first met, no stack above `STACK_BYTES`."""
    alike: dict[tuple[tuple[int, ...], int, Ranks, bool], list[Place]] = {}
    for place in places:
        alike.setdefault((place.shape, place.group, place.ranks, place.is_matrix), []).append(place)
    for (shape, *_), members in alike.items():
        size = STACK_BYTES.get(members[0].parameter.device.type, STACK_BYTES["cpu"])
        most = max(1, size // (4 * shape[0] * shape[1]))
        for start in range(0, len(members), most):
            yield members[start : start + most]


def parts(places: Sequence[Place], tensor_of: Callable[[Place], Tensor]) -> list[Tensor]:
    r"""The parts that places are of tensors: views where positions are consecutive, to be `settle`\ d elsewhere."""
    return [place.of(tensor_of(place)) for place in places]


def settle(places: Sequence[Place], tensor_of: Callable[[Place], Tensor], values: Sequence[Tensor]) -> None:
    """Write parts that were changed in place where they are not views."""
    for place, value in zip(places, values, strict=True):
        if not isinstance(place.index, slice):
            tensor_of(place).index_copy_(place.dim, place.index, value)


def through_whole(stack: Tensor, ranks: Ranks, compute: Callable[[Tensor, range], Tensor]) -> Tensor:
    """Apply a function to whole matrices of which every rank has a part.

    Rank k computes the k-th share of them.

    Args:
        stack: this rank's parts, [N, R, C].
        ranks: who has the others.
        compute: gives the same shape, of whole matrices and their numbers in the stack.

    Returns:
        This rank's parts of the results, [N, R, C].
    """
    count = len(stack)
    if ranks.count == 1:
        return compute(stack, range(count))
    share = -(-count // ranks.count)
    first = min(count, share * torch.distributed.get_rank(ranks.group))
    mine = range(first, min(count, first + share))
    padding = stack.new_zeros((share * ranks.count - count, *stack.shape[1:]))
    parts = _exchange(torch.cat([stack, padding]).view(ranks.count, share, *stack.shape[1:]), ranks)
    whole = torch.cat(parts[:, : len(mine)].unbind(), dim=1 + ranks.dim)
    found = compute(whole, mine) if len(mine) else whole
    back = parts.new_zeros(parts.shape)
    back[:, : len(mine)] = torch.stack(found.to(parts.dtype).chunk(ranks.count, dim=1 + ranks.dim))
    return _exchange(back, ranks).flatten(0, 1)[:count]


def _exchange(parts: Tensor, ranks: Ranks) -> Tensor:
    """Send part i of [ranks, ...] to rank i."""
    received = torch.empty_like(parts)
    torch.distributed.all_to_all_single(received, parts.contiguous(), group=ranks.group)
    return received
