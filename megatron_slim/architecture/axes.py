"""Named axes: a tensor dimension as a tree of axes, and the row positions that it implies.

A checkpoint dimension is seldom one axis. The output rows of Qwen3-Next's ``q_proj`` are, per query head, a
query and then a gate: ``product("kv_group", "query_per_group", concat(label("query", "head_dim"),
label("gate", "head_dim")))``. From such a tree alone follow the size of the dimension, the rows that survive when an
axis is pruned, and, given two trees with the same labels, the permutation between two layouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Sizes: TypeAlias = Mapping[str, int]
Kept: TypeAlias = Mapping[str, npt.NDArray[np.int64]]
Dim: TypeAlias = "str | Product | Concat | Label"


@dataclass(frozen=True)
class Product:
    """Nested axes, slowest first: position = ((i0 * n1) + i1) * n2 + i2 ..."""

    parts: tuple[Dim, ...]


@dataclass(frozen=True)
class Concat:
    """Parts one after the other."""

    parts: tuple[Dim, ...]


@dataclass(frozen=True)
class Label:
    """A named piece of a dimension: what two layouts of the same rows agree on."""

    name: str
    part: Dim


def product(*parts: Dim) -> Product:
    """Nested axes, slowest first."""
    return Product(parts)


def concat(*parts: Dim) -> Concat:
    """Parts one after the other."""
    return Concat(parts)


def label(name: str, *parts: Dim) -> Label:
    """A named piece; several parts are a product."""
    return Label(name, parts[0] if len(parts) == 1 else Product(parts))


def size(dim: Dim, sizes: Sizes) -> int:
    """Number of positions of a dimension.

    >>> size(product("head", concat("dim", "dim")), {"head": 4, "dim": 8})
    64
    """
    match dim:
        case str():
            return sizes[dim]
        case Product(parts):
            total = 1
            for part in parts:
                total *= size(part, sizes)
            return total
        case Concat(parts):
            return sum(size(part, sizes) for part in parts)
        case Label(_, part):
            return size(part, sizes)


def axes_of(dim: Dim) -> Iterator[str]:
    """Every axis name in a dimension, in order, repeats included."""
    match dim:
        case str():
            yield dim
        case Product(parts) | Concat(parts):
            for part in parts:
                yield from axes_of(part)
        case Label(_, part):
            yield from axes_of(part)


def kept_positions(dim: Dim, sizes: Sizes, kept: Kept) -> npt.NDArray[np.int64]:
    """Positions of a dimension that survive when only ``kept[axis]`` of the named axes survive.

    >>> kept_positions(concat("hidden", "hidden"), {"hidden": 4}, {"hidden": np.array([1, 3])}).tolist()
    [1, 3, 5, 7]

    What survives of an axis may differ with the position on the axis that it is nested in, the first of a product: then
    it is a matrix with a row for each.

    >>> heads = {"query_per_group": np.array([[0], [2]])}
    >>> kept_positions(product("kv_group", "query_per_group"), {"kv_group": 2, "query_per_group": 3}, heads).tolist()
    [0, 5]
    """
    match dim:
        case str():
            return kept.get(dim, np.arange(sizes[dim]))
        case Product((str() as first, *rest)) if differing := [axis for axis in axes_of(dim) if _differs(axis, kept)]:
            nested, found = Product(tuple(rest)), []
            for outer in kept.get(first, np.arange(sizes[first])):
                here = {**kept, **{axis: kept[axis][outer] for axis in differing}}
                found.append(kept_positions(nested, sizes, here) + outer * size(nested, sizes))
            return np.concatenate(found)
        case Product(parts):
            positions = np.zeros(1, dtype=np.int64)
            for part in parts:
                inner = kept_positions(part, sizes, kept)
                positions = (positions[:, None] * size(part, sizes) + inner[None, :]).reshape(-1)
            return positions
        case Concat(parts):
            offset, pieces = 0, []
            for part in parts:
                pieces.append(kept_positions(part, sizes, kept) + offset)
                offset += size(part, sizes)
            return np.concatenate(pieces)
        case Label(_, part):
            return kept_positions(part, sizes, kept)


def _differs(axis: str, kept: Kept) -> bool:
    """Whether the survivors of an axis differ with the position on the axis around it."""
    return axis in kept and kept[axis].ndim == 2


def labelled_positions(dim: Dim, sizes: Sizes) -> dict[str, npt.NDArray[np.int64]]:
    """For every label of a dimension, the positions of its elements in the label's own (row-major) order.

    A label under a product is spread over that product's other axes, which count as its slowest axes:

    >>> tree = product("head", concat(label("query", "dim"), label("gate", "dim")))
    >>> labelled_positions(tree, {"head": 2, "dim": 2})["gate"].tolist()
    [2, 3, 6, 7]
    """
    match dim:
        case str() | Product() if not _has_labels(dim):
            return {"": np.arange(size(dim, sizes))}
        case Label(name, part):
            return {name: np.arange(size(part, sizes))}
        case Concat(parts):
            offset, found = 0, {}
            for part in parts:
                for name, positions in labelled_positions(part, sizes).items():
                    assert name not in found, f"label {name!r} occurs twice"
                    found[name] = positions + offset
                offset += size(part, sizes)
            return found
        case Product(parts):
            *outer, last = parts
            assert not any(_has_labels(part) for part in outer), "labels stand in the last part of a product"
            blocks = np.arange(size(Product(tuple(outer)), sizes)) * size(last, sizes)
            inner = labelled_positions(last, sizes)
            return {name: (blocks[:, None] + positions).reshape(-1) for name, positions in inner.items()}
        case _:
            raise AssertionError(dim)


def _has_labels(dim: Dim) -> bool:
    match dim:
        case str():
            return False
        case Label():
            return True
        case Product(parts) | Concat(parts):
            return any(_has_labels(part) for part in parts)
