"""The safetensors format, writing: headers first, then tensors one by one in any order."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_slim.aliases import JsonObject
from megatron_slim.checkpoint.fp8 import FP8_DTYPES
from megatron_slim.checkpoint.safetensors_reader import TensorEntry

DTYPE_NAMES = {dtype: name for name, dtype in FP8_DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What the writer must know of a tensor before it sees it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Fill shards in order; a shard is larger than the limit only where one tensor is."""
    shards: list[list[TensorSpec]] = [[]]
    left = max_shard_bytes
    for spec in specs:
        if shards[-1] and spec.nbytes > left:
            shards.append([])
            left = max_shard_bytes
        shards[-1].append(spec)
        left -= spec.nbytes
    # Wider types first: every tensor then starts at a multiple of its item size, which readers that map files need.
    return [sorted(shard, key=lambda spec: -spec.dtype.itemsize) for shard in shards]


def start_shard(file: Path, shard: Sequence[TensorSpec]) -> dict[str, TensorEntry]:
    """Write a shard's header and extend the file to its full size."""
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in shard:
        offsets = [end, end + spec.nbytes]
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": offsets,
        }
        end = offsets[1]
    payload = json.dumps(header, separators=(",", ":")).encode()
    payload += b" " * (-len(payload) % 8)
    base = 8 + len(payload)
    with file.open("wb") as stream:
        stream.write(len(payload).to_bytes(8, "little") + payload)
        stream.truncate(base + end)
    return {
        spec.name: TensorEntry(file, base + header[spec.name]["data_offsets"][0], spec.dtype, spec.shape)
        for spec in shard
    }
