"""Which optimizer updates what of a model, as a table (imports no torch)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from megatron_slim.aliases import JsonObject
from megatron_slim.architecture.axes import size
from megatron_slim.architecture.matrices import as_matrices, why_none
from megatron_slim.architecture.parts import TrainOnly, rows_by_place
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.optimizers import ADAM, OPTIMIZERS
from megatron_slim.training.train_only import TRAIN_ONLY

FROZEN = "frozen"  # in place of an optimizer


@dataclass(frozen=True)
class Line:
    """Equal matrices, or what is updated like them.

    Attributes:
        parameter: Megatron's name, layers and experts left open.
        part: label of rows or columns of it, "" for all.
        shape: of one.
        count: how many there are in the model.
        optimizer: that updates them, or `FROZEN`.
        why: in a few words.
    """

    parameter: str
    part: str
    shape: tuple[int, ...]
    count: int
    optimizer: str
    why: str

    @property
    def elements(self) -> int:
        """Of all."""
        found = self.count
        for extent in self.shape:
            found *= extent
        return found


def optimizer_lines(
    model: ModelShape, optimizer: str, *, all_matrices: bool = False, only: TrainOnly | None = None
) -> list[Line]:
    """What is updated by what, in the order of the forward pass.

    Args:
        model: sizes of the model.
        optimizer: a name of `OPTIMIZERS`.
        all_matrices: as ``--optimizer-matrices all``.
        only: as ``--train-only``; None: all is trained.
    """
    found: dict[tuple[str, str, tuple[int, ...], str], Line] = {}
    for line in _lines(model, optimizer, only, all_matrices=all_matrices):
        key = line.parameter, line.part, line.shape, line.optimizer
        count = line.count + (found[key].count if key in found else 0)
        found[key] = Line(**{**asdict(line), "count": count})
    return list(found.values())


def _lines(model: ModelShape, optimizer: str, only: TrainOnly | None, *, all_matrices: bool) -> Iterator[Line]:
    for weight, place in (each for each in rows_by_place(model) if not each[0].buffer):
        sizes, count = model.in_block(weight.block).sizes, len(weight.experts(model))
        name = re.sub(r"layers\.\d+", "layers.*", weight.key)
        if only is not None and not only.trains(place):
            yield Line(name, "", tuple(size(dim, sizes) for dim in weight.dims), count, FROZEN, f"not in {TRAIN_ONLY}")
            continue
        pieces = list(as_matrices(weight, all_matrices=all_matrices))
        if not pieces or not OPTIMIZERS[optimizer].has_matrices:
            shape = tuple(size(dim, sizes) for dim in weight.dims)
            why = "every weight" if not OPTIMIZERS[optimizer].has_matrices else why_none(weight)
            yield Line(name, "", shape, count, ADAM, why)
            continue
        for piece in pieces:
            own, (rows, columns) = ADAM if piece.why else optimizer, piece.shape(sizes)
            why = piece.why or ("tall" if rows > columns else "wide" if rows < columns else "square") + " matrix"
            yield Line(name, piece.label, (rows, columns), count, own, why)


def entries(lines: list[Line]) -> list[JsonObject]:
    """The same for JSON."""
    return [{**asdict(line), "shape": list(line.shape)} for line in lines]
