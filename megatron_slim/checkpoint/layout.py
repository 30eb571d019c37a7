"""Megatron's row layouts and Hugging Face's, one as a permutation of the other, bit for bit.

Both layouts of a parameter are dimension trees of the architecture table; rows with the same label are the same rows.
Nothing here depends on the name of a tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_slim.architecture.axes import Dim, labelled_positions, size
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.weight import Weight

Rows: TypeAlias = "slice | Tensor"


@dataclass(frozen=True)
class _RowMap:
    """``megatron[target] = source[rows]`` for one label of one source tensor."""

    source: int
    rows: Rows
    target: Rows


def as_rows(positions: npt.NDArray[np.int64]) -> Rows:
    """A slice where the positions are consecutive: a plain copy instead of a gather."""
    first = int(positions[0])
    if positions.size == positions[-1] - first + 1 and bool(np.all(np.diff(positions) == 1)):
        return slice(first, first + positions.size)
    return torch.from_numpy(positions)


def _row_maps(weight: Weight, model: ModelShape) -> tuple[_RowMap, ...]:
    for source in weight.sources:
        assert source.dims[1:] == weight.dims[1:], f"{source.name}: layouts differ in the first dimension only"
    sources = tuple(source.dims[0] for source in weight.sources)
    return _dim_maps(weight.dims[0], sources, model.in_block(weight.block))


@functools.lru_cache(maxsize=256)
def _dim_maps(target: Dim, sources: tuple[Dim, ...], model: ModelShape) -> tuple[_RowMap, ...]:
    """The same for every layer and expert of a model, hence remembered."""
    target_at = labelled_positions(target, model.sizes)
    maps = []
    for index, source in enumerate(sources):
        for name, rows in labelled_positions(source, model.sizes).items():
            maps.append(_RowMap(index, as_rows(rows), as_rows(target_at.pop(name))))
    assert not target_at, f"no source holds {sorted(target_at)}"
    return tuple(maps)


def rows_in_megatron(weight: Weight, model: ModelShape, source: int) -> npt.NDArray[np.int64]:
    """For every row of one of a parameter's Hugging Face tensors, the Megatron row (of one expert) that it is."""
    sizes = model.in_block(weight.block).sizes
    found = np.empty(size(weight.sources[source].dims[0], sizes), dtype=np.int64)
    everything = torch.arange(size(weight.dims[0], sizes))
    for row_map in _row_maps(weight, model):
        if row_map.source == source:
            found[row_map.rows] = everything[row_map.target]
    return found


def is_copy(weight: Weight) -> bool:
    """Whether a parameter is one tensor with the same layout in both formats."""
    return not weight.stacked and len(weight.sources) == 1 and weight.sources[0].dims == weight.dims


def _fill(maps: tuple[_RowMap, ...], tensors: list[Tensor], out: Tensor) -> None:
    for row_map in maps:
        if isinstance(row_map.target, slice) and isinstance(row_map.rows, Tensor):  # straight into its place
            torch.index_select(tensors[row_map.source], 0, row_map.rows, out=out[row_map.target])
        else:
            out[row_map.target] = tensors[row_map.source][row_map.rows]


def _experts(weight: Weight, model: ModelShape, expert: int | None) -> Iterable[int | None]:
    return weight.experts(model) if expert is None or not weight.stacked else (expert,)


def to_megatron(
    weight: Weight, model: ModelShape, read: Callable[[str], Tensor], *, expert: int | None = None
) -> Tensor:
    """Assemble a whole Megatron parameter (tensor parallel size 1, experts stacked on dim 0).

    Args:
        weight: a row of the architecture table.
        model: sizes of the model.
        read: gives a Hugging Face tensor by name; called once per tensor, in order.
        expert: of a stacked parameter, this expert alone, without the leading dimension.

    Returns:
        A tensor of ``weight.shape(model)``; the tensor that ``read`` gave where the layouts are the same.
    """
    if is_copy(weight):
        return read(weight.sources[0].name)
    assert expert is None or weight.stacked
    maps = _row_maps(weight, model)
    shape = weight.shape(model) if expert is None else weight.shape(model)[1:]
    out: Tensor | None = None
    for index in _experts(weight, model, expert):
        tensors = [read(source.name.format(expert=index)) for source in weight.sources]
        if out is None:
            out = torch.empty(shape, dtype=tensors[0].dtype)
        assert all(tensor.dtype == out.dtype for tensor in tensors), f"{weight.key}: mixed dtypes"
        _fill(maps, tensors, out[index] if weight.stacked and expert is None else out)
    assert out is not None
    return out


def from_megatron(weight: Weight, model: ModelShape, tensor: Tensor, *, expert: int | None = None) -> dict[str, Tensor]:
    """Take a whole Megatron parameter apart into its Hugging Face tensors, each contiguous.

    The inverse of `to_megatron`, byte for byte; ``expert`` as there.
    """
    shape = weight.shape(model) if expert is None else weight.shape(model)[1:]
    assert tuple(tensor.shape) == shape, (weight.key, tuple(tensor.shape), shape)
    if is_copy(weight):
        return {weight.sources[0].name: tensor.contiguous()}
    places = [as_rows(rows_in_megatron(weight, model, index)) for index in range(len(weight.sources))]
    found: dict[str, Tensor] = {}
    for index in _experts(weight, model, expert):
        part = tensor[index] if weight.stacked and expert is None else tensor
        for source, rows in zip(weight.sources, places, strict=True):
            content = part[rows] if isinstance(rows, slice) else torch.index_select(part, 0, rows)
            found[source.name.format(expert=index)] = content.contiguous()
    return found


def runs_of_sources(weight: Weight, model: ModelShape) -> list[slice] | None:
    """For each Hugging Face tensor, the run of the parameter's rows (of one expert's) that it is; None if some are not.

    True of a copy, and of [gate; up].
    """
    maps = _row_maps(weight, model)
    runs = [row_map.target for row_map in maps if isinstance(row_map.target, slice)]
    sizes = model.in_block(weight.block).sizes
    whole = [slice(0, size(source.dims[0], sizes)) for source in weight.sources]
    return runs if len(runs) == len(maps) and [row_map.rows for row_map in maps] == whole else None


def split_keys(weight: Weight, model: ModelShape) -> list[tuple[str, slice]]:
    """Names under which a torch_dist checkpoint holds a parameter, and the rows (dim 0) of each.

    One name for a parameter stored whole, one per label for a ``split`` one.
    """
    if not weight.split:
        return [(weight.key, slice(None))]
    labels = {
        name: as_rows(at) for name, at in labelled_positions(weight.dims[0], model.in_block(weight.block).sizes).items()
    }
    assert all(isinstance(rows, slice) for rows in labels.values()), f"{weight.key}: labels are not runs of rows"
    return [(f"{weight.key}.{name}", rows) for name, rows in labels.items() if isinstance(rows, slice)]


def stored_shapes(weight: Weight, model: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor under which a torch_dist checkpoint holds a parameter."""
    shape = weight.shape(model)
    for key, rows in split_keys(weight, model):
        yield key, (len(range(*rows.indices(shape[0]))), *shape[1:])


def fits(weight: Weight, found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a parameter of one shape can be what has another; it may have more rows of a vocabulary, as padding."""
    if weight.dims[0] == "vocab":
        return len(found) == len(wanted) and found[0] >= wanted[0] and found[1:] == wanted[1:]
    return found == wanted
