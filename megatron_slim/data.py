"""Token data: Megatron's .bin/.idx and plain .npy matrices, read as [samples, sequence]."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_slim.errors import DataError

Tokens = npt.NDArray[np.int64]

# Head of an .idx file: magic, version, code of the ids' type, number of sequences and of document boundaries. Then
# come the sequences' lengths (int32) and byte offsets (int64), and the boundaries (int64).
_HEADER, _MAGIC = struct.Struct("<9sQBQQ"), b"MMIDIDX\x00\x00"
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}


def read_samples(
    path: Path, *, seq_length: int | None, num_samples: int | None, vocab_size: int | None = None, seed: int = 0
) -> Tokens:
    """Read token ids for calibration or evaluation.

    A Megatron data set is one stream, its documents one after the other, cut into non-overlapping windows of
    ``seq_length`` tokens; what is left over at the end is not used. A ``.npy`` matrix is used as it is.

    Args:
        path: prefix of a Megatron .bin/.idx pair (either file name is accepted too), or a ``.npy`` file.
        seq_length: tokens per sample; for a matrix None or its width.
        num_samples: number of samples; fewer than there are draws at random without replacement, kept in the order of
            the data. None takes all.
        vocab_size: ids must be smaller than this; None leaves them unchecked.
        seed: of the random draw.

    Returns:
        Token ids, int64 [samples, sequence].

    Raises:
        DataError: nothing there, not integer token ids, too few samples, or ids outside the vocabulary.
    """
    for name, value in (("seq_length", seq_length), ("num_samples", num_samples)):
        if value is not None and value < 1:
            raise DataError(f"{name} {value} is not a positive number")
    path = Path(path)
    if path.suffix == ".npy":
        matrix = _open_matrix(path, seq_length)
    else:
        matrix = _open_windows(data_prefix(path, or_matrix=True), seq_length)
    chosen = _draw(len(matrix), num_samples, seed, path)
    samples = np.array(matrix[chosen])
    _check_ids(samples, chosen, vocab_size, path)
    return samples.astype(np.int64)


def data_prefix(path: Path, *, or_matrix: bool = False) -> Path:
    """The prefix of a Megatron data set, given the prefix or one of its two files.

    Args:
        path: as a user gave it.
        or_matrix: whether a ``.npy`` matrix would do as well, which a refusal then says.

    Raises:
        DataError: one or both of the files are missing.
    """
    name = str(path)
    prefix = name[: -len(".bin")] if name.endswith((".bin", ".idx")) else name
    missing = [prefix + suffix for suffix in (".bin", ".idx") if not Path(prefix + suffix).is_file()]
    if not missing:
        return Path(prefix)
    if Path(name).is_dir():
        raise DataError("a directory, not a data set", where=name, fix="name the prefix of a .bin/.idx pair in it")
    if len(missing) == 1:
        raise DataError("its other half is missing", where=missing[0], fix="run tools/preprocess_data.py again")
    if Path(name).exists():
        raise DataError(
            "neither a Megatron .bin/.idx prefix nor a .npy matrix of token ids"
            if or_matrix
            else "not the prefix of a Megatron .bin/.idx pair",
            where=name,
            fix="tokenize text with tools/preprocess_data.py",
        )
    fix = "give the prefix of a .bin/.idx pair" + (", or a .npy matrix" if or_matrix else "")
    raise DataError("no such data", where=name, fix=fix)


def _open_matrix(path: Path, seq_length: int | None) -> npt.NDArray[Any]:
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError("no such file", where=str(path)) from None
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"not readable as a .npy matrix ({error})", where=str(path)) from None
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind not in "iu" or matrix.size == 0:
        found = f"{matrix.dtype} {list(matrix.shape)}" if isinstance(matrix, np.ndarray) else "an archive"
        raise DataError(f"is {found}, not an integer matrix [samples, sequence]", where=str(path))
    if seq_length not in (None, matrix.shape[1]):
        raise DataError(
            f"its samples have {matrix.shape[1]} tokens, seq_length is {seq_length}",
            where=str(path),
            fix="leave the sequence length out: a matrix is used as it is",
        )
    return matrix


def _open_windows(prefix: Path, seq_length: int | None) -> npt.NDArray[Any]:
    if seq_length is None:
        raise DataError("a Megatron data set needs a sequence length", where=str(prefix), fix="give --seq-length")
    stream = read_stream(prefix)
    windows = len(stream) // seq_length
    if windows == 0:
        raise DataError(f"holds {len(stream)} tokens, fewer than one sample of {seq_length}", where=f"{prefix}.bin")
    return stream[: windows * seq_length].reshape(windows, seq_length)


def read_stream(prefix: Path) -> npt.NDArray[Any]:
    """All documents of a Megatron data set one after the other, memory-mapped.

    Megatron's own reader takes seconds to import, and opens a truncated .bin without complaint.

    Raises:
        DataError: the index is not one, holds no integer ids, or the .bin is not as long as the index says.
    """
    dtype, tokens = _read_index(Path(f"{prefix}.idx"))
    expected, found = tokens * dtype.itemsize, Path(f"{prefix}.bin").stat().st_size
    if expected != found:
        state = "truncated" if found < expected else "longer than its index"
        raise DataError(
            f"{state}: {found} bytes, the index says {expected}",
            where=f"{prefix}.bin",
            fix="run tools/preprocess_data.py again",
        )
    if expected == 0:
        raise DataError("holds no tokens", where=f"{prefix}.bin")
    return np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")


def count_documents(prefix: Path) -> int:
    """Number of documents of a data set whose index `read_stream` has checked."""
    with Path(f"{prefix}.idx").open("rb") as stream:
        return int(_HEADER.unpack(stream.read(_HEADER.size))[3])


def document_lengths(prefix: Path) -> npt.NDArray[np.int32]:
    """Tokens of every document of a data set whose index `read_stream` has checked, memory-mapped."""
    return np.memmap(f"{prefix}.idx", np.int32, "r", _HEADER.size, (count_documents(prefix),))


def check_largest_id(largest: int, vocab_size: int, where: str) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        DataError: ``largest`` of the ids that were looked at is one.
    """
    if largest >= vocab_size:
        raise DataError(
            f"token id {largest} is beyond the vocabulary of {vocab_size}",
            where=where,
            fix="preprocess with the model's own tokenizer",
        )


def _read_index(path: Path) -> tuple[np.dtype[Any], int]:
    """Type of the ids and number of tokens of a data set, whose documents must follow one another in the .bin."""
    with path.open("rb") as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise DataError("not a Megatron index", where=str(path))
    _, version, code, sequences, documents = _HEADER.unpack(head)
    size = _HEADER.size + 12 * sequences + 8 * documents
    # Multimodal data sets have one byte more per sequence.
    if version != 1 or code not in _DTYPES or path.stat().st_size not in (size, size + sequences):
        raise DataError("a torn Megatron index, or of an unknown version", where=str(path))
    dtype = np.dtype(_DTYPES[code])
    if dtype.kind not in "iu":
        raise DataError(f"holds {dtype} values, not token ids", where=str(path))
    if sequences == 0:
        return dtype, 0
    lengths = np.memmap(path, np.int32, "r", _HEADER.size, (sequences,)).astype(np.int64)
    pointers = np.memmap(path, np.int64, "r", _HEADER.size + 4 * sequences, (sequences,))
    ends = np.cumsum(lengths)
    if (lengths < 0).any() or not np.array_equal(pointers, (ends - lengths) * dtype.itemsize):
        raise DataError("its documents do not follow one another", where=str(path))
    return dtype, int(lengths.sum())


def _draw(available: int, num_samples: int | None, seed: int, path: Path) -> npt.NDArray[np.int64]:
    if num_samples is None or num_samples == available:
        return np.arange(available)
    if num_samples > available:
        raise DataError(
            f"{num_samples} samples asked for, {available} there",
            where=str(path),
            fix="ask for fewer samples or shorter sequences",
        )
    return np.sort(np.random.default_rng(seed).choice(available, num_samples, replace=False))


def _check_ids(samples: npt.NDArray[Any], rows: npt.NDArray[np.int64], vocab_size: int | None, path: Path) -> None:
    lowest, highest = int(samples.min()), int(samples.max())
    if lowest < 0:
        row = rows[int(np.argmax(samples.min(axis=1) < 0))]
        raise DataError(f"negative token id {lowest} (first in sample {row})", where=str(path))
    if vocab_size is not None and highest >= vocab_size:
        row = rows[int(np.argmax(samples.max(axis=1) >= vocab_size))]
        raise DataError(
            f"tokenizer ids beyond the vocabulary: id {highest} (first in sample {row}), "
            f"the model's vocab_size is {vocab_size}",
            where=str(path),
            fix="tokenize with the model's own tokenizer",
        )
