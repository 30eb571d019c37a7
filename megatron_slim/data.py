"""Token data: Megatron's .bin/.idx and plain .npy matrices, read as [samples, sequence]."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_slim.aliases import Array, DType
from megatron_slim.data_index import HEADER, read_index
from megatron_slim.errors import DataError

Tokens = npt.NDArray[np.int64]

# Of each data set before a run, in stretches from its beginning to its end. All of it would be hours of reading where
# data are terabytes; training looks at what it reads.
_SEEN_TOKENS, _STRETCHES = 1 << 20, 16
_AGAIN = "run megatron-slim preprocess again"


def read_samples(
    data: Path | Tokens,
    *,
    seq_length: int | None,
    num_samples: int | None,
    vocab_size: int | None = None,
    seed: int = 0,
    at_most: bool = False,
) -> Tokens:
    """Read token ids for calibration or evaluation.

    A Megatron data set is one stream, its documents one after the other, cut into non-overlapping windows of
    ``seq_length`` tokens; what is left over at the end is not used. A ``.npy`` matrix is used as it is.

    Args:
        data: prefix of a Megatron .bin/.idx pair (either file name is accepted too), a ``.npy`` file, or its matrix.
        seq_length: tokens per sample; for a matrix None or its width.
        num_samples: number of samples; if fewer than there are, random ones, in the order of
            the data. None takes all.
        vocab_size: ids must be smaller than this; None is any.
        seed: of the random choice.
        at_most: where there are fewer than ``num_samples``, take them all.

    Returns:
        Token ids, int64 [samples, sequence].

    Raises:
        DataError: nothing there, not integer token ids, too few samples, or ids outside the vocabulary.
    """
    for name, value in (("seq_length", seq_length), ("num_samples", num_samples)):
        if value is not None and value < 1:
            raise DataError(f"{name} {value} is not a positive number")
    path = Path("samples" if isinstance(data, np.ndarray) else data)
    if isinstance(data, np.ndarray):
        matrix = _check_matrix(data, seq_length, str(path))
    elif path.suffix == ".npy":
        matrix = _open_matrix(path, seq_length)
    else:
        matrix = _open_windows(data_prefix(path, or_matrix=True), seq_length)
    wanted = min(num_samples, len(matrix)) if at_most and num_samples is not None else num_samples
    chosen = draw(len(matrix), wanted, seed, path)
    samples = np.array(matrix[chosen])
    _check_type(samples.dtype, vocab_size, str(path))
    _check_rows(samples, chosen, vocab_size, path)
    return samples.astype(np.int64)


def data_prefix(path: Path, *, or_matrix: bool = False) -> Path:
    """The prefix of a Megatron data set, given the prefix or one of its two files.

    Args:
        path: as a user gave it.
        or_matrix: whether a ``.npy`` matrix would do as well, which the error then says.

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
        raise DataError("its other half is missing", where=missing[0], fix=_AGAIN)
    if Path(name).exists():
        raise DataError(
            "neither a Megatron .bin/.idx prefix nor a .npy matrix of token ids"
            if or_matrix
            else "not the prefix of a Megatron .bin/.idx pair",
            where=name,
            fix="tokenize text with megatron-slim preprocess",
        )
    fix = "give the prefix of a .bin/.idx pair" + (", or a .npy matrix" if or_matrix else "")
    raise DataError("no such data", where=name, fix=fix)


def exact_prefix(path: Path) -> Path:
    """`data_prefix` of what training reads, which takes no file of a data set for it.

    Raises:
        DataError: it is one, or files are missing.
    """
    found = data_prefix(path)
    if found != path:
        raise DataError("is a file of a data set", where=str(path), fix=f"name its prefix, {found}")
    return found


def _open_matrix(path: Path, seq_length: int | None) -> Array:
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError("no such file", where=str(path)) from None
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"not readable as a .npy matrix ({error})", where=str(path)) from None
    return _check_matrix(matrix, seq_length, str(path))


def _check_matrix(matrix: object, seq_length: int | None, where: str) -> Array:
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind not in "iu" or matrix.size == 0:
        found = f"{matrix.dtype} {list(matrix.shape)}" if isinstance(matrix, np.ndarray) else "an archive"
        raise DataError(f"is {found}, not an integer matrix [samples, sequence]", where=where)
    if seq_length not in (None, matrix.shape[1]):
        raise DataError(
            f"its samples have {matrix.shape[1]} tokens, seq_length is {seq_length}",
            where=where,
            fix="leave the sequence length out: a matrix is used as it is",
        )
    return matrix


def _open_windows(prefix: Path, seq_length: int | None) -> Array:
    if seq_length is None:
        raise DataError("a Megatron data set needs a sequence length", where=str(prefix), fix="give --seq-length")
    stream = read_stream(prefix)
    windows = len(stream) // seq_length
    if windows == 0:
        raise DataError(
            f"holds {len(stream)} tokens, fewer than one sample of {seq_length}",
            where=f"{prefix}.bin",
            fix="ask for shorter samples (seq_length)",
        )
    return stream[: windows * seq_length].reshape(windows, seq_length)


def read_stream(prefix: Path) -> Array:
    """All documents of a Megatron data set one after the other, memory-mapped.

    Megatron's own reader takes seconds to import, and opens a truncated .bin without an error.

    Raises:
        DataError: the index is not one, holds no integer ids, or the .bin is not as long as the index says.
    """
    dtype, tokens = read_index(Path(f"{prefix}.idx"))
    expected, found = tokens * dtype.itemsize, Path(f"{prefix}.bin").stat().st_size
    if expected != found:
        state = "truncated" if found < expected else "longer than its index"
        raise DataError(
            f"{state}: {found} bytes, the index says {expected}",
            where=f"{prefix}.bin",
            fix=_AGAIN,
        )
    if expected == 0:
        raise DataError("holds no tokens", where=f"{prefix}.bin")
    return np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")


def open_stream(prefix: Path, vocab_size: int | None) -> tuple[Array, int]:
    """A data set that a model with ``vocab_size`` ids can read, as `read_stream`, and the largest id that was seen.

    Raises:
        DataError: as `read_stream`; or ids of another vocabulary, as far as its type and a part of it show.
    """
    stream, where = read_stream(prefix), f"{prefix}.bin"
    _check_type(stream.dtype, vocab_size, where)
    seen = list(_stretches(stream))
    largest = max(int(ids.max()) for ids in seen)
    check_ids(min(int(ids.min()) for ids in seen), largest, vocab_size, where)
    return stream, largest


def _stretches(stream: Array) -> Iterator[Array]:
    """Up to `_SEEN_TOKENS` ids in stretches at equal distances, the first and the last ones among them."""
    if len(stream) <= _SEEN_TOKENS:
        yield stream
        return
    length = _SEEN_TOKENS // _STRETCHES
    for number in range(_STRETCHES):
        begin = (len(stream) - length) * number // (_STRETCHES - 1)
        yield stream[begin : begin + length]


def count_documents(prefix: Path) -> int:
    """Number of documents of a data set whose index `read_stream` has checked."""
    with Path(f"{prefix}.idx").open("rb") as stream:
        return int(HEADER.unpack(stream.read(HEADER.size))[3])


def document_lengths(prefix: Path) -> npt.NDArray[np.int32]:
    """Tokens of every document of a data set whose index `read_stream` has checked, memory-mapped."""
    return np.memmap(f"{prefix}.idx", np.int32, "r", HEADER.size, (count_documents(prefix),))


def check_ids(lowest: int, highest: int, vocab_size: int | None, where: str) -> None:
    """Refuse token ids that no model has, or that this one has no embedding for.

    An id below 0 has overflowed, or means "ignore" or "padding" to the program that wrote it. To Megatron -1 is the
    padding that it adds itself, in memory alone.

    Args:
        lowest: of the ids that were looked at.
        highest: of the same ids.
        vocab_size: of the model; None is any.
        where: where they come from.

    Raises:
        DataError: one of the two is outside the vocabulary.
    """
    if lowest < 0:
        raise DataError(
            f"token id {lowest} is below 0",
            where=where,
            fix="an id overflowed, or stands for 'ignore' or padding, of which data sets have none: preprocess again",
        )
    if vocab_size is not None and highest >= vocab_size:
        raise DataError(
            f"token id {highest} is beyond the vocabulary of {vocab_size}",
            where=where,
            fix="preprocess with the model's own tokenizer",
        )


def _check_type(dtype: DType, vocab_size: int | None, where: str) -> None:
    """Refuse a type that the vocabulary does not fit into: what did not fit has wrapped to ids that look right."""
    if vocab_size is not None and vocab_size - 1 > (most := np.iinfo(dtype).max):
        raise DataError(
            f"{dtype} holds ids up to {most}, the vocabulary has {vocab_size}: larger ids have wrapped",
            where=where,
            fix="preprocess again, with the model's own tokenizer",
        )


def draw(available: int, num_samples: int | None, seed: int, path: Path) -> npt.NDArray[np.int64]:
    """Numbers of samples that are drawn from those of a data set, in order; None draws all.

    Raises:
        DataError: there are fewer.
    """
    if num_samples is None or num_samples == available:
        return np.arange(available)
    if num_samples > available:
        raise DataError(
            f"{num_samples} samples asked for, {available} there",
            where=str(path),
            fix=f"ask for {available} or fewer (num_samples), or for shorter ones (seq_length)",
        )
    return np.sort(np.random.default_rng(seed).choice(available, num_samples, replace=False))


def _check_rows(samples: Array, rows: npt.NDArray[np.int64], vocab_size: int | None, path: Path) -> None:
    """`check_ids`, naming the first sample that has such an id."""
    lowest, highest = samples.min(axis=1), samples.max(axis=1)
    outside = lowest < 0 if vocab_size is None else (lowest < 0) | (highest >= vocab_size)
    if outside.any():
        first = int(outside.argmax())
        check_ids(int(lowest[first]), int(highest[first]), vocab_size, f"{path}, sample {rows[first]}")
