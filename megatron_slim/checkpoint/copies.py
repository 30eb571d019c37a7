"""Tensors that a file has twice: in MTP blocks of some families, the trunk's embedding and output layer once more.

Megatron's MTP block has the trunk's own. So a copy is compared and not read: where it differed, the model would be
another one. It is written where the source had it, from what the trunk has then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import copies_of
from megatron_slim.checkpoint.raw_files import OpenFiles, as_bytes
from megatron_slim.checkpoint.safetensors_reader import TensorEntry
from megatron_slim.checkpoint.safetensors_writer import TensorSpec
from megatron_slim.errors import CheckpointError

ROWS_AT_ONCE = 64  # that are compared on opening: a copy that was trained on its own differs in every row


@dataclass(frozen=True)
class Copies:
    """The copies in the files of a checkpoint.

    Attributes:
        path: the checkpoint, for errors.
        names: their names in MTP blocks, without the block's prefix.
        entries: by the name of the tensor that it copies, the name and place of each.
    """

    path: Path
    names: frozenset[str] = frozenset()
    entries: Mapping[str, tuple[str, TensorEntry]] = field(default_factory=dict)

    def compare(self, name: str, tensor: torch.Tensor, rows: npt.NDArray[np.int64] | None, files: OpenFiles) -> None:
        """See that the copy of a tensor, if there is one, has the same bytes.

        Args:
            name: of what was read.
            tensor: what was read, all columns.
            rows: which rows it is; None for all.
            files: to read from.

        Raises:
            CheckpointError: it has others.
        """
        if name in self.entries:
            copy, entry = self.entries[name]
            if as_bytes(entry.read(files, rows)) != as_bytes(tensor.contiguous()):
                raise _no_copy(copy, name, self.path)


def _no_copy(copy: str, name: str, path: Path) -> CheckpointError:
    return CheckpointError(
        f"{copy} is not a copy of {name}, which Megatron's MTP block has instead",
        where=str(path),
        fix="leave MTP out with --without-mtp (a teacher's with --teacher-without-mtp)",
    )


def copies_apart(
    entries: Mapping[str, TensorEntry], shape: ModelShape, path: Path
) -> tuple[dict[str, TensorEntry], Copies]:
    """The tensors in the files of a checkpoint without the copies among them, and these.

    Raises:
        CheckpointError: a copy has another shape or type, or other values in its first rows.
    """
    rest, found, names, files = dict(entries), {}, set(), OpenFiles()
    for copy, (short, original) in copies_of(shape).items():
        if copy not in entries or original not in entries:
            continue
        entry, of = rest.pop(copy), entries[original]
        rows = np.arange(min(ROWS_AT_ONCE, entry.shape[0]))
        if (entry.shape, entry.dtype) != (of.shape, of.dtype) or as_bytes(entry.read(files, rows)) != as_bytes(
            of.read(files, rows)
        ):
            raise _no_copy(copy, original, path)
        names.add(short)
        found[original] = (copy, entry)
    return rest, Copies(path, frozenset(names), found)


def names_of_copies(shape: ModelShape, names: Collection[str]) -> dict[str, str]:
    """By the name of the tensor that it copies, the name of each copy of a model that is to have those of ``names``."""
    return {original: copy for copy, (short, original) in copies_of(shape).items() if short in names}


def with_copies(specs: list[TensorSpec], copies: Mapping[str, str]) -> Iterator[TensorSpec]:
    """Specs of the tensors in a checkpoint's files, copies last."""
    yield from specs
    of = {spec.name: spec for spec in specs}
    for original, copy in copies.items():
        yield TensorSpec(copy, of[original].shape, of[original].dtype)
