"""The fingerprint that ties statistics and plans to a checkpoint."""

from __future__ import annotations

import hashlib
import json

from megatron_slim.architecture.table import ROUTER, hf_tensors, names_of
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.raw_files import as_bytes


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 that distinguishes checkpoints without reading all of them.

    It covers the sizes, the name, shape and type of every tensor, and the values of all vectors and routers, which
    training moves first and which are a thousandth of the bytes. A checkpoint has one fingerprint, in either format.
    """
    shape = checkpoint.shape
    digest = hashlib.sha256(json.dumps(shape.to_dict(), sort_keys=True).encode())
    routers = {name for key, name in names_of(shape).items() if key.endswith(ROUTER)}
    for name, tensor in sorted(hf_tensors(shape).items()):
        extents = tensor.shape(shape)
        digest.update(f"{name} {list(extents)} {checkpoint.dtypes[name]}\n".encode())
        if len(extents) == 1 or name in routers:
            digest.update(as_bytes(checkpoint.read(name).contiguous()))
    return digest.hexdigest()
