"""The units in which a checkpoint is streamed: a parameter, one expert of one, or some rows of a large one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from megatron_slim.aliases import JsonObject
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import weights
from megatron_slim.architecture.weight import HFTensor, Weight
from megatron_slim.checkpoint.carried import CarriedTensors
from megatron_slim.checkpoint.finite import cast
from megatron_slim.checkpoint.layout import is_copy
from megatron_slim.checkpoint.raw_files import as_bytes

UNIT_BYTES = 8 << 20


class Checkpoint(Protocol):
    """What gives Hugging Face tensors by name: a checkpoint on disk in either format, or one made as it is read.

    Names are those of one tensor per expert, whatever form the files have.
    """

    path: Path
    config_path: Path
    config: JsonObject
    shape: ModelShape
    names: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def fused_blocks(self) -> frozenset[str]:
        """The blocks whose experts Hugging Face files of it hold fused."""

    @property
    def copies(self) -> frozenset[str]:
        """Names in MTP blocks of tensors that Hugging Face files of it have twice (`copies`)."""

    @property
    def carried(self) -> CarriedTensors:
        """Tensors of the larger model that holds this one, which are written with it."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person who has it written again should know."""

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Type of every tensor."""

    def reading_once(self) -> AbstractContextManager[None]:
        """Reads within leave the page cache as it is."""

    def read(self, name: str) -> Tensor:
        """One whole tensor."""

    def read_rows(self, name: str, dim0_index: Any = None, dim1_index: Any = None) -> Tensor:
        """Rows and columns of one tensor, in the order given; None for all."""


@dataclass(frozen=True)
class Unit:
    """What is read, written and verified in one go.

    Attributes:
        weight: row of the architecture table.
        expert: of a stacked parameter, the one expert that this unit holds.
        rows: of a parameter that is copied as it is, the rows (dim 0) that this unit holds; None for all.
        nbytes: its size.
    """

    weight: Weight
    expert: int | None
    rows: slice | None
    nbytes: int

    @property
    def tensors(self) -> Iterator[tuple[str, HFTensor]]:
        """Its Hugging Face tensors by name."""
        for tensor in self.weight.sources:
            yield tensor.name if self.expert is None else tensor.name.format(expert=self.expert), tensor

    def rows_of(self, name: str) -> slice | None:
        """The rows (dim 0) of one of its tensors that it holds; None for all."""
        return self.rows

    def read(self, source: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Read it, cast to ``dtype`` if one is given.

        Raises:
            CheckpointError: a value is too large for ``dtype``.
        """
        index = None if self.rows is None else np.arange(self.rows.start, self.rows.stop)
        found = {name: source.read_rows(name, index) for name, _ in self.tensors}
        return found if dtype is None else {name: cast(each, dtype, name, source.path) for name, each in found.items()}

    def digest(self, tensors: Mapping[str, Tensor]) -> str:
        """Hash of names, types, shapes and bytes; the same in every format of checkpoint."""
        found = []
        for name, tensor in tensors.items():
            rows = self.rows_of(name)
            first = 0 if rows is None else rows.start
            content = xxhash.xxh3_128_hexdigest(as_bytes(tensor.contiguous()))
            found.append(f"{name} {first} {list(tensor.shape)} {tensor.dtype} {content}\n")
        return "".join(found)


def units(
    shape: ModelShape, dtypes: Mapping[str, torch.dtype], *, row_multiple: int = 1, trained_only: bool = False
) -> Iterator[Unit]:
    """All units of a model, in the order of the table.

    Args:
        shape: the model.
        dtypes: type of every tensor.
        row_multiple: of a divided parameter all units but the last have a multiple of rows.
        trained_only: only what an optimizer has state of.
    """
    for weight in weights(shape):
        if trained_only and weight.buffer:
            continue
        itemsize = max(dtypes[name].itemsize for name in _names(weight))
        if weight.stacked:
            experts = weight.experts(shape)
            nbytes = weight.numel(shape) // len(experts) * itemsize
            yield from (Unit(weight, expert, None, nbytes) for expert in experts)
            continue
        nbytes = weight.numel(shape) * itemsize
        if nbytes <= UNIT_BYTES or weight.split or not is_copy(weight):
            yield Unit(weight, None, None, nbytes)
            continue
        extent = weight.shape(shape)[0]
        row_bytes = nbytes // extent
        step = max(1, UNIT_BYTES // row_bytes // row_multiple) * row_multiple
        for start in range(0, extent, step):
            rows = slice(start, min(start + step, extent))
            yield Unit(weight, None, rows, (rows.stop - rows.start) * row_bytes)


def _names(weight: Weight) -> Iterator[str]:
    """Names of its tensors; of a stacked parameter, of the first expert's."""
    return (tensor.name.format(expert=0) if weight.stacked else tensor.name for tensor in weight.sources)
