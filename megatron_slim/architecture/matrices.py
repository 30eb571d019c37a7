"""The matrices that a parameter is made of, for optimizers that treat a matrix as a whole (imports no torch).

A Megatron parameter may hold several: queries, gates, keys and values, or the two halves of a gated network. What they
are is known by the labels of its dimensions. An update of the whole parameter would mix what belongs to different
matrices, and rows that tensor parallelism puts on one rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt

from megatron_slim.architecture.axes import (
    Concat,
    Dim,
    Label,
    Product,
    Sizes,
    axes_of,
    labelled_positions,
    size,
)
from megatron_slim.architecture.feed_forward import EXPERTS
from megatron_slim.architecture.kinds import AXES
from megatron_slim.architecture.prunable import HIDDEN, Neurons
from megatron_slim.architecture.weight import Weight

# Axes of which a position is a channel: a matrix has them on both sides. Others count heads, experts or tokens.
CHANNELS = frozenset(
    {HIDDEN.axis, "head_dim", "gdn_key_dim", "gdn_value_dim"}
    | {axis.axis for axis in AXES.values() if isinstance(axis, Neurons)}
)
_THIN = {
    EXPERTS.axis: "scores of experts, which route",
    "one": "a single row, whose length means something",
    "vocab": "a row for every token",
    "conv_kernel": "a convolution of single channels",
}


@dataclass(frozen=True)
class Piece:
    """One matrix in a parameter.

    Attributes:
        label: of its rows or columns, "" where the parameter is one matrix.
        rows: its dimension.
        columns: likewise.
        dim: of the parameter that ``label`` is one of; 0 where it has none.
        why: it is not updated as a matrix; "" where it is.
    """

    label: str
    rows: Dim
    columns: Dim
    dim: int
    why: str

    def shape(self, sizes: Sizes) -> tuple[int, int]:
        """Rows and columns in a model of these sizes, whatever its layout."""
        return size(self.rows, sizes), size(self.columns, sizes)


@cache
def pieces_of(dims: tuple[Dim, ...]) -> tuple[Piece, ...]:
    """The matrices of a parameter of these dimensions; none of one that has not two of them.

    >>> from megatron_slim.architecture.axes import concat, label
    >>> dims = concat(label("gate", "ffn"), label("up", "ffn")), "hidden"
    >>> [(piece.label, piece.shape({"ffn": 6, "hidden": 4})) for piece in pieces_of(dims)]
    [('gate', (6, 4)), ('up', (6, 4))]
    """
    if len(dims) != 2:
        return ()
    parts = [_labelled(dim) for dim in dims]
    dim = int(list(parts[0]) == [""])
    assert list(parts[1 - dim]) == [""], "labels are those of one dimension"
    found = []
    for name, part in parts[dim].items():
        rows, columns = (part, dims[1]) if dim == 0 else (dims[0], part)
        found.append(Piece(name, rows, columns, dim if name else 0, _why_thin(rows, columns)))
    return tuple(found)


def _labelled(dim: Dim) -> dict[str, Dim]:
    """The part of a dimension that a label names, with the axes that it is spread over."""
    match dim:
        case Label(name, part):
            return {name: part}
        case Concat(parts):
            return {name: found for part in parts for name, found in _labelled(part).items()}
        case Product((*outer, last)) if list(inner := _labelled(last)) != [""]:
            return {name: Product((*outer, part)) for name, part in inner.items()}
        case _:
            return {"": dim}


def _why_thin(rows: Dim, columns: Dim) -> str:
    """Why something is not updated as a matrix."""
    for side in (rows, columns):
        axes = list(axes_of(side))
        if not CHANNELS.intersection(axes):
            return next((_THIN[axis] for axis in axes if axis in _THIN), "one row for every head")
    return ""


def why_none(weight: Weight) -> str:
    """Why a parameter without any `pieces_of` is not updated as a matrix."""
    axes = [axis for dim in weight.dims for axis in axes_of(dim)]
    return next((_THIN[axis] for axis in axes if axis == "conv_kernel"), "a vector")


def local_positions(
    dims: tuple[Dim, ...], dim: int, sizes: Sizes, tp_dim: int | None, ways: int
) -> dict[str, npt.NDArray[np.int64]]:
    """For every label of a dimension, its positions in the part of a parameter that one tensor-parallel rank holds.

    Every rank has the same share of each label, in the same places.

    Args:
        dims: of the parameter.
        dim: the dimension, 0 or 1.
        sizes: of the axes in the whole model.
        tp_dim: the dimension that is sharded, None if none.
        ways: number of ranks; it divides the first axis of every part.
    """
    own = dict(sizes)
    if tp_dim == dim:
        own |= {axis: sizes[axis] // ways for axis in outer_axes(dims[dim])}
    return labelled_positions(dims[dim], own)


def outer_axes(dim: Dim) -> set[str]:
    """The first axis of every part of a dimension: what tensor parallelism shards."""
    match dim:
        case Concat(parts):
            return {axis for part in parts for axis in outer_axes(part)}
        case _:
            return {next(axes_of(dim))}


def hf_name(weight: Weight, label: str, expert: int | None) -> str:
    """The Hugging Face tensor that holds the rows of a label."""
    for source in weight.sources:
        labels = set(_labelled(source.dims[0]))
        if len(weight.sources) == 1 or label in labels:
            return source.name if expert is None else source.name.format(expert=expert)
    raise AssertionError(f"{weight.key} has no {label}")


def has_rest(weight: Weight) -> bool:
    """Whether some of a parameter, or all, is not updated as a matrix."""
    pieces = pieces_of(weight.dims)
    return not pieces or any(piece.why for piece in pieces)


def polar_flops(weight: Weight, sizes: Sizes) -> int:
    """Operations of one step of a polar iteration for every matrix in a parameter; of one expert."""
    found = 0
    for piece in pieces_of(weight.dims):
        short, long = sorted(piece.shape(sizes))
        found += 0 if piece.why else 4 * short * short * long + 2 * short**3
    return found


def as_matrices(weight: Weight, *, all_matrices: bool) -> Iterator[Piece]:
    """`pieces_of` a parameter, as they are updated.

    Args:
        weight: a row of the architecture table.
        all_matrices: whether thin ones are updated as matrices, too, but for what has a row for every token.
    """
    for piece in pieces_of(weight.dims):
        keeps = all_matrices and weight.dims[0] != "vocab"
        yield replace(piece, why="") if keeps else piece
