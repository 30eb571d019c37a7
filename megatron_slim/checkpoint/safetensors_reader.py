"""The safetensors format, reading: headers looked at with suspicion, tensors by position.

Layout of a file: 8 bytes with the length of the header (little endian), the header (JSON: type, shape and byte range
of every tensor), the tensors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_slim.aliases import JsonObject
from megatron_slim.checkpoint.raw_files import OpenFiles, as_tensor
from megatron_slim.errors import CheckpointError, summarise
from megatron_slim.files import parse_json

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
MAX_HEADER_BYTES = 100_000_000  # the limit of the format
MAX_NAME = 500  # characters
MAX_DIMS = 8
_METADATA = "__metadata__"
_AGAIN = "download it again"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is: file, first byte, type and shape."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of dim 0."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, files: OpenFiles, rows: npt.NDArray[np.int64] | None = None) -> Tensor:
        """Read the given rows (indices of dim 0, in the order wanted), or all."""
        if rows is None:
            return as_tensor(files.read(self.file, self.offset, self.nbytes), self.dtype, self.shape)
        found = files.gather(self.file, self.offset, rows, self.row_bytes)
        return as_tensor(found, self.dtype, (rows.size, *self.shape[1:]))


def mlx_layout(where: str) -> CheckpointError:
    """The error for what MLX has written, whose files hold other values under names of their own."""
    return CheckpointError(
        "is in MLX's layout: experts under switch_mlp, convolutions transposed, norms of Qwen3-Next shifted by 1",
        where=where,
        fix="get the checkpoint that it was converted from, in transformers' format",
    )


def read_header(file: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> dict[str, TensorEntry]:
    """Where every tensor of a file is.

    Args:
        file: a regular file.
        dtypes: the types to accept, by the format's names of them.

    Raises:
        CheckpointError: not a safetensors file, truncated, with bytes of no tensor or of two, or of other types.
    """
    header, base, size = _load_header(file)
    entries, unsupported, ranges = {}, [], []
    for name, info in header.items():
        begin, end, shape = _parse_entry(file, name, info)
        ranges.append((base + begin, base + end, name))
        if info["dtype"] not in dtypes:
            unsupported.append(f"{name} ({info['dtype']})")
            continue
        entry = TensorEntry(file, base + begin, dtypes[info["dtype"]], shape)
        if end - begin != entry.nbytes:
            raise CheckpointError(f"{name}: {end - begin} bytes for shape {list(shape)}", where=str(file), fix=_AGAIN)
        entries[name] = entry
    _refuse_gaps(file, base, size, ranges)
    if unsupported:
        fix = f"use {', '.join(dtypes)}; of quantized weights, what they were made of"
        raise CheckpointError(f"unsupported types: {summarise(unsupported)}", where=str(file), fix=fix)
    return entries


def _load_header(file: Path) -> tuple[JsonObject, int, int]:
    """The header's entries, where the tensors start, and the size of the file."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError("truncated or not a safetensors file", where=str(file), fix=_AGAIN)
            payload = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"not readable ({error.strerror})", where=str(file)) from None
    try:
        header = parse_json(payload) if payload.startswith(b"{") else None
    except ValueError as error:
        raise CheckpointError(f"its header is not JSON ({error})", where=str(file), fix=_AGAIN) from None
    if not isinstance(header, dict):
        raise CheckpointError("its header is not JSON: not a safetensors file", where=str(file), fix=_AGAIN)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{_METADATA} of its header is not an object of strings", where=str(file), fix=_AGAIN)
    if metadata.get("format") == "mlx":
        raise mlx_layout(str(file))
    return header, 8 + length, size


def _parse_entry(file: Path, name: str, info: Any) -> tuple[int, int, tuple[int, ...]]:
    """Byte range, after the header, and shape of a tensor."""
    match info:
        case {"dtype": str(), "shape": [*shape], "data_offsets": [begin, end]} if len(info) == 3:
            # bool is an int to Python. math.prod cannot wrap, but would take hours on a million large dimensions.
            whole = all(type(n) is int and 0 <= n < 2**63 for n in (begin, end, *shape))
            if whole and begin <= end and len(shape) <= MAX_DIMS and len(name) <= MAX_NAME:
                return begin, end, tuple(shape)
    raise CheckpointError(f"malformed header entry of {name[:MAX_NAME]}", where=str(file), fix=_AGAIN)


def _refuse_gaps(file: Path, start: int, size: int, ranges: list[tuple[int, int, str]]) -> None:
    """The format requires every byte after the header to belong to exactly one tensor."""
    end = start
    for begin, stop, name in sorted(ranges):
        if stop > size:
            raise CheckpointError(
                f"truncated: {name} ends at byte {stop}, the file at {size}", where=str(file), fix=_AGAIN
            )
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else f"follows {begin - end} bytes of no tensor"
            raise CheckpointError(f"damaged: {name} {what}", where=str(file), fix=_AGAIN)
        end = stop
    if end != size:
        raise CheckpointError(f"damaged: {size - end} bytes after the last tensor", where=str(file), fix=_AGAIN)
