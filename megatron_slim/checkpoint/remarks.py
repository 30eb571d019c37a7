"""What a model does not take from a checkpoint as it is, in a line each: weights that are rounded, rows of padding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.distributed import DistCheckpoint
from megatron_slim.checkpoint.dtype_names import dtype_name
from megatron_slim.checkpoint.precision import float32_weights
from megatron_slim.errors import summarise


def remarks(checkpoint: Checkpoint, dtype: torch.dtype | None, what: str, rows: int | None = None) -> Iterator[str]:
    """Lines for the person who watches, none where everything is taken as it is.

    Args:
        checkpoint: of the model.
        dtype: the model's; None keeps that of every weight.
        what: the lines begin with.
        rows: of the model's embedding and output layer; None, those of the vocabulary.
    """
    if dtype is not None:
        yield from _rounding(checkpoint, dtype, what)
    if isinstance(checkpoint, DistCheckpoint):
        yield from padding(checkpoint, what, rows)


def padding(checkpoint: DistCheckpoint, what: str, rows: int | None = None) -> Iterator[str]:
    """A line where embedding or output layer are of other sizes than the model's; arguments as `remarks`."""
    vocabulary = checkpoint.shape.vocab_size
    wanted = vocabulary if rows is None else rows
    if found := [f"{key} has {stored} rows" for key, stored in checkpoint.vocab_rows.items() if stored != wanted]:
        took = f"{wanted} are wanted, and rows from {vocabulary} (vocab_size) on are padding"
        yield f"{what}: {', '.join(found)} in {checkpoint.path}; {took}"


def _rounding(checkpoint: Checkpoint, dtype: torch.dtype, what: str) -> Iterator[str]:
    kept = float32_weights(checkpoint, dtype)
    exact = {tensor.name for weight in kept for tensor, _ in weight.hf_tensors(checkpoint.shape)}
    names: dict[torch.dtype, list[str]] = {}
    for name, own in checkpoint.dtypes.items():
        if name not in exact and torch.promote_types(own, dtype) != dtype:
            names.setdefault(own, []).append(name)
    total, found = len(checkpoint.dtypes), []
    for own, rounded in names.items():
        which = f" ({summarise(rounded)})" if len(rounded) < total else ""
        found.append(f"{len(rounded)} of {total} tensors from {dtype_name(own)}{which}")
    if found:
        yield f"{what}: rounds to {dtype_name(dtype)} {' and '.join(found)}, of {checkpoint.path}"
