"""Parts of a model by the names that a person has for them, and which of them are trained (imports no torch).

Every row of the architecture table is in one part. Of a transformer block the kinds of sublayers say which
(`SublayerKind.parts`); vectors of channels are norms, wherever they are. An MTP block is a part as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from megatron_slim.architecture.kinds import KINDS, SUBLAYERS
from megatron_slim.architecture.matrices import CHANNELS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import rows_of, weights
from megatron_slim.architecture.weight import Weight

EMBEDDING, OUTPUT, NORMS, MTP_PART = "embedding", "output", "norms", "mtp"
ROUTER, EXPERTS = "router", "experts"
BLOCKS = "blocks"  # all parts of transformer blocks
_PROJECTIONS = "projections"


def part_name(kind: str, name: str) -> str:
    """What people call a part of a sublayer: that of attention by its kind, others by what they are.

    >>> part_name("linear_attention", "projections"), part_name("moe", "shared_experts")
    ('delta-net', 'shared-experts')
    """
    return KINDS[kind].part if name == _PROJECTIONS else name.replace("_", "-")


# In the order of the forward pass.
IN_BLOCKS = (NORMS, *(kind.part for kind in KINDS.values()), ROUTER, EXPERTS, "shared-experts", "mlp")
PARTS = (EMBEDDING, *IN_BLOCKS, OUTPUT, MTP_PART)


def is_norm(row: Weight) -> bool:
    """Whether a row is a vector with a number for every channel."""
    return len(row.dims) == 1 and row.dims[0] in CHANNELS


@cache
def parts_of_kind(shape: ModelShape, kind: str) -> Mapping[str, str]:
    """The part of every row of a kind of sublayer, by its key."""
    rows = rows_of(shape, kind)
    named = {row.key: part_name(kind, name) for name, of in SUBLAYERS[kind].parts(rows).items() for row in of}
    return {row.key: NORMS if is_norm(row) else named[row.key] for row in rows}


@dataclass(frozen=True)
class Place:
    """Where a row is.

    Attributes:
        part: one of `PARTS`.
        layer: of the trunk, from 0; None outside of its blocks.
    """

    part: str
    layer: int | None = None


def rows_by_place(shape: ModelShape) -> Iterator[tuple[Weight, Place]]:
    """Every row of a model, its name complete, and where it is; in the order of the forward pass."""
    for row in weights(shape):
        if row.key.startswith("mtp."):
            yield row, Place(MTP_PART)
        elif match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", row.key):
            layer = int(match[1])
            part = next(found[match[2]] for found in _of_layer(shape, layer) if match[2] in found)
            yield row, Place(part, layer)
        elif is_norm(row):
            yield row, Place(NORMS)
        else:
            yield row, Place(EMBEDDING if row in shape.family.first_rows else OUTPUT)


def _of_layer(shape: ModelShape, layer: int) -> list[Mapping[str, str]]:
    return [parts_of_kind(shape, kind) for kind in shape.sublayers[layer]]


@dataclass(frozen=True)
class Chosen:
    """A part, or a part of some layers.

    Attributes:
        part: one of `PARTS`, or `BLOCKS`.
        first: layer from which on, counted from 0; None: all, and what is outside of the blocks.
        last: layer up to which.
    """

    part: str
    first: int | None = None
    last: int | None = None

    @property
    def name(self) -> str:
        """As it is typed."""
        if self.first is None:
            return self.part
        return f"{self.part}@{self.first}" + ("" if self.last == self.first else f"-{self.last}")

    def holds(self, place: Place) -> bool:
        """Whether it has what is at a place."""
        if self.part != place.part and not (self.part == BLOCKS and place.layer is not None):
            return False
        if self.first is None or self.last is None:
            return True
        return place.layer is not None and self.first <= place.layer <= self.last


@dataclass(frozen=True)
class TrainOnly:
    """Which parts are trained; all else is frozen."""

    chosen: tuple[Chosen, ...]

    @staticmethod
    def of(text: str) -> TrainOnly:
        """Read what `name` writes.

        >>> TrainOnly.of("router,experts@12-23").name
        'experts@12-23,router'

        Raises:
            ValueError: says what is wrong with it.
        """
        found = [_chosen(word.strip()) for word in text.split(",")]
        found.sort(key=lambda each: (each.part, -1 if each.first is None else each.first, each.last or 0))
        return TrainOnly(tuple(dict.fromkeys(found)))

    @property
    def name(self) -> str:
        """The same for the same parts, in whatever order they were given."""
        return ",".join(each.name for each in self.chosen)

    def trains(self, place: Place) -> bool:
        """Whether what is at a place is trained."""
        return any(each.holds(place) for each in self.chosen)

    def parts_of_layer(self, layer: int) -> frozenset[str]:
        """Parts of a layer that are trained, if it has them."""
        return frozenset(part for part in IN_BLOCKS if self.trains(Place(part, layer)))

    def trained_keys(self, shape: ModelShape) -> frozenset[str]:
        """Keys of the trained rows."""
        return frozenset(row.key for row, place in rows_by_place(shape) if not row.buffer and self.trains(place))

    def violations(self, shape: ModelShape) -> list[str]:
        """What it names that a model does not have, in sentences."""
        places = {place for row, place in rows_by_place(shape) if not row.buffer}
        known = ", ".join(part for part in PARTS if any(place.part == part for place in places))
        found = []
        for each in self.chosen:
            if each.last is not None and each.last >= shape.num_layers:
                found.append(f"{each.name}: the last of {shape.num_layers} layers is {shape.num_layers - 1}")
            elif not any(each.holds(place) for place in places):
                found.append(f"{each.name}: the model has none (it has {known})")
        return found


def _chosen(word: str) -> Chosen:
    part, at, layers = word.partition("@")
    if part not in (*PARTS, BLOCKS):
        raise ValueError(f"{part!r} is not a part of a model: {', '.join(PARTS)}, or {BLOCKS} for all of its blocks")
    if not at:
        return Chosen(part)
    if part not in (*IN_BLOCKS, BLOCKS):
        raise ValueError(f"{word!r}: {part} is not in the layers, which @ names")
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", layers)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise ValueError(f"{word!r}: give layers as {part}@12-23 or {part}@12, counted from 0")
    return Chosen(part, int(match[1]), int(match[2] or match[1]))


def reaches(shape: ModelShape, only: TrainOnly) -> int:
    """The first layer that has something trained, or has it before it; past the last one if no layer has.

    What the gradient must not go through is before it.
    """
    if only.trains(Place(EMBEDDING)):
        return 0
    for layer in range(shape.num_layers):
        parts = {part for found in _of_layer(shape, layer) for part in found.values()}
        if parts & only.parts_of_layer(layer):
            return layer
    return shape.num_layers
