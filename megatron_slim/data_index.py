"""The index of a Megatron data set (.idx): all that its own reader takes on trust, or asserts, is looked at."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_slim.aliases import Array, DType
from megatron_slim.errors import DataError

# Head of an .idx file: magic, version, code of the ids' type, number of sequences and of document boundaries. Then
# come the sequences' lengths (int32) and byte offsets (int64), the boundaries (int64), and in a multimodal data set the
# sequences' modes (int8, 0 is text).
HEADER, _MAGIC = struct.Struct("<9sQBQQ"), b"MMIDIDX\x00\x00"
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_MERGE = "write the index again: merge data sets with IndexedDatasetBuilder.add_index, end each document"
_TEXT = "take the text alone"


def read_index(path: Path) -> tuple[DType, int]:
    """Type of the ids and number of tokens of a data set.

    Raises:
        DataError: not an index, not of text, or its sequences and documents do not follow one another.
    """
    with path.open("rb") as stream:
        head = stream.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(_MAGIC):
        raise DataError("not a Megatron index", where=str(path))
    _, version, code, sequences, boundaries = HEADER.unpack(head)
    size = HEADER.size + 12 * sequences + 8 * boundaries
    multimodal = sequences > 0 and path.stat().st_size == size + sequences
    if version != 1 or code not in _DTYPES or not (multimodal or path.stat().st_size == size):
        raise DataError("a torn Megatron index, or of an unknown version", where=str(path))
    dtype = np.dtype(_DTYPES[code])
    if dtype.kind not in "iu":
        raise DataError(f"holds {dtype} values, not token ids", where=str(path))
    _check_documents(path, _column(path, np.int64, size - 8 * boundaries, boundaries), sequences)
    if multimodal and (modes := _column(path, np.int8, size, sequences)).any():
        number = int(modes.astype(bool).argmax())
        raise DataError(f"sequence {number} is of mode {modes[number]}, not text", where=str(path), fix=_TEXT)
    lengths = _column(path, np.int32, HEADER.size, sequences).astype(np.int64)
    pointers = _column(path, np.int64, HEADER.size + 4 * sequences, sequences)
    ends = np.cumsum(lengths)
    if (lengths < 0).any() or not np.array_equal(pointers, (ends - lengths) * dtype.itemsize):
        raise DataError("its documents do not follow one another", where=str(path))
    return dtype, int(lengths.sum())


def _column(path: Path, dtype: npt.DTypeLike, offset: int, count: int) -> Array:
    """Numbers of an index, memory-mapped; none cannot be."""
    return np.memmap(path, dtype, "r", offset, (count,)) if count else np.empty(0, dtype)


def _check_documents(path: Path, boundaries: npt.NDArray[np.int64], sequences: int) -> None:
    """See that the documents are all of the sequences, one after the other: Megatron's reader asserts their end."""
    if len(boundaries) == 0:
        raise DataError("has no document boundaries", where=str(path), fix=_MERGE)
    first, last = int(boundaries[0]), int(boundaries[-1])
    if (first, last) != (0, sequences):
        raise DataError(
            f"its documents are sequences {first} to {last}, there are {sequences}", where=str(path), fix=_MERGE
        )
    if len(falling := np.flatnonzero(boundaries[1:] < boundaries[:-1])):
        before, after = boundaries[falling[0] : falling[0] + 2]
        raise DataError(f"its document boundaries fall from {before} to {after}", where=str(path), fix=_MERGE)
