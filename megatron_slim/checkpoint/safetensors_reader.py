"""The safetensors format, reading: headers looked at with suspicion, tensors by position.

Layout of a file: 8 bytes with the length of the header (little endian), the header (JSON: type, shape and byte range
of every tensor), the tensors.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_slim.errors import CheckpointError, summarise

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
MAX_HEADER_BYTES = 100_000_000  # the limit of the format


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: file, first byte, type and shape."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of dim 0."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Where every tensor of a file lies.

    Raises:
        CheckpointError: not a safetensors file, truncated, or with types that are not supported.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError("truncated or not a safetensors file", where=str(file), fix="download it again")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError):
            header = None
    if not isinstance(header, dict):
        raise CheckpointError("its header is not JSON: not a safetensors file", where=str(file))
    header.pop("__metadata__", None)
    entries, unsupported, ranges = {}, [], []
    for name, info in header.items():
        entry, stop = _parse_entry(file, 8 + length, name, info)
        ranges.append((8 + length + info["data_offsets"][0], stop, name))
        if entry is None:
            unsupported.append(f"{name} ({info.get('dtype')})")
            continue
        if stop > size:
            raise CheckpointError(
                f"truncated: {name} ends at byte {stop}, the file at {size}", where=str(file), fix="download it again"
            )
        entries[name] = entry
    if unsupported:
        kinds = ", ".join(DTYPES)
        raise CheckpointError(f"unsupported types: {summarise(unsupported)}", where=str(file), fix=f"use {kinds}")
    _refuse_gaps(file, 8 + length, size, ranges)
    return entries


def _refuse_gaps(file: Path, start: int, size: int, ranges: list[tuple[int, int, str]]) -> None:
    """The format wants every byte after the header to belong to exactly one tensor."""
    end = start
    for begin, stop, name in sorted(ranges):
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else f"follows {begin - end} bytes of no tensor"
            raise CheckpointError(f"damaged: {name} {what}", where=str(file), fix="download it again")
        end = stop
    if end != size:
        raise CheckpointError(
            f"damaged: {size - end} bytes after the last tensor", where=str(file), fix="download it again"
        )


def _parse_entry(file: Path, base: int, name: str, info: Any) -> tuple[TensorEntry | None, int]:
    """One tensor of a header and the file offset of its end; None for a type that is not supported."""
    try:
        begin, end = info["data_offsets"]
        shape = tuple(info["shape"])
        whole = all(type(n) is int and n >= 0 for n in (begin, end, *shape))
        dtype = DTYPES.get(info["dtype"])
    except (KeyError, TypeError, ValueError):
        whole, dtype = False, None
    if not whole:
        raise CheckpointError(f"malformed header entry of {name}", where=str(file))
    if dtype is None:
        return None, base + end
    entry = TensorEntry(file, base + begin, dtype, shape)
    if end - begin != entry.nbytes:
        raise CheckpointError(f"{name}: {end - begin} bytes for shape {list(shape)}", where=str(file))
    return entry, base + end


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())


def pread_into(file: Path, offset: int, view: memoryview) -> None:
    """Fill ``view`` from a file: read, not mapped, so that memory use is what is asked for and no more."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
            if count == 0:
                raise CheckpointError("the file ends inside a tensor", where=str(file), fix="download it again")
            done += count
    finally:
        os.close(descriptor)
