"""The fingerprint that ties statistics and plans to a checkpoint."""

from __future__ import annotations

import hashlib
import json

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import ROUTER, hf_tensors, names_of, weights
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.raw_files import as_bytes


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 that distinguishes checkpoints without reading all of them.

    It covers the sizes, the name, shape and type of every tensor, and values: all of vectors and routers, which are a
    thousandth of the bytes, and the first row of every other matrix (of an expert, of one of its matrices). Students of
    one teacher may have the same vectors and routers, and so have runs that train experts alone. A checkpoint has one
    fingerprint, in either format.
    """
    return _digest(checkpoint, _rows_looked_at(checkpoint.shape))


def fingerprint_like(checkpoint: Checkpoint, recorded: str | None) -> str:
    """The fingerprint of a checkpoint to compare with one in a file, which may be of a time before rows were in it.

    Args:
        checkpoint: that the file is to be of.
        recorded: what the file says.
    """
    found = fingerprint(checkpoint)
    return recorded if recorded not in (None, found) and recorded == _digest(checkpoint, frozenset()) else found


def _rows_looked_at(shape: ModelShape) -> frozenset[str]:
    """Names of the tensors whose first row is covered: an expert's is the one that Megatron has as it is."""
    found: set[str] = set()
    for weight in weights(shape):
        if not weight.stacked or len(weight.sources) == 1:
            found |= {tensor.name for tensor, _ in weight.hf_tensors(shape)}
    return frozenset(found)


def _digest(checkpoint: Checkpoint, first_rows: frozenset[str]) -> str:
    shape = checkpoint.shape
    digest = hashlib.sha256(json.dumps(shape.to_dict(), sort_keys=True).encode())
    routers = {name for key, name in names_of(shape).items() if key.endswith(ROUTER)}
    for name, tensor in sorted(hf_tensors(shape).items()):
        extents = tensor.shape(shape)
        digest.update(f"{name} {list(extents)} {checkpoint.dtypes[name]}\n".encode())
        if len(extents) == 1 or name in routers:
            digest.update(as_bytes(checkpoint.read(name).contiguous()))
        elif name in first_rows:
            digest.update(as_bytes(checkpoint.read_rows(name, [0]).contiguous()))
    return digest.hexdigest()
