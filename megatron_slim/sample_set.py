"""Samples of a fixed length, with what counts in each and where its documents begin: packed chats, a teacher's cache.

A sample set is a directory: ``samples.json`` says how many samples there are, of how many tokens, and what the other
files hold; ``tokens.npy`` [samples, S + 1], ``loss_mask.npy`` [samples, S] and ``position_ids.npy`` [samples, S].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_slim.data import check_ids, draw
from megatron_slim.errors import DataError
from megatron_slim.files import file_sha256, read_json, to_json

SAMPLES = "samples.json"
FORMAT = 1
_ARRAYS = {"tokens": (np.int32, 1), "loss_mask": (np.uint8, 0), "position_ids": (np.int32, 0)}  # and columns beyond S
_AGAIN = "make the samples again"
_SEEN_TOKENS = 1 << 20


@dataclass(frozen=True)
class SampleSet:
    """A sample set, memory-mapped.

    Attributes:
        path: its directory.
        tokens: ids, int32 [samples, S + 1]: at position i a model reads column i and predicts column i + 1.
        loss_mask: uint8 [samples, S], 1 where that prediction counts.
        position_ids: int32 [samples, S], which begin again with 0 at every document.
        documents: whether documents of a sample do not see each other.
        digests: SHA-256 of each file, by its name; equal ones are the same samples in the same order.
        about: where the samples come from, for people.
    """

    path: Path
    tokens: npt.NDArray[np.int32] = field(repr=False)
    loss_mask: npt.NDArray[np.uint8] = field(repr=False)
    position_ids: npt.NDArray[np.int32] = field(repr=False)
    documents: bool
    digests: Mapping[str, str]
    about: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process, such as a data loader's, as its path: its files are not copied."""
        return open_samples, (self.path,)

    @property
    def seq_length(self) -> int:
        """Positions of a sample, S."""
        return int(self.loss_mask.shape[1])

    def largest_id(self, vocab_size: int | None) -> int:
        """The largest id of samples at equal distances, up to `_SEEN_TOKENS` ids: all of a set of that size.

        Raises:
            DataError: ids are outside a vocabulary.
        """
        seen = self.tokens[:: -(-self.tokens.size // _SEEN_TOKENS)]
        largest = int(seen.max())
        check_ids(int(seen.min()), largest, vocab_size, str(self.path))
        return largest

    def draw(
        self, *, seq_length: int | None, num_samples: int | None, seed: int, at_most: bool = False
    ) -> npt.NDArray[np.int64]:
        """Numbers of samples, drawn at random, in order.

        Args:
            seq_length: positions of a sample, as they are here; None does not say.
            num_samples: how many; None takes all.
            seed: of the random choice.
            at_most: where there are fewer, take all.

        Raises:
            DataError: samples have another length, or there are fewer.
        """
        if seq_length not in (None, self.seq_length):
            fix = f"give --seq-length {self.seq_length}, or leave it out"
            raise DataError(
                f"has samples of {self.seq_length}, --seq-length is {seq_length}", where=str(self.path), fix=fix
            )
        wanted = min(num_samples, len(self)) if at_most and num_samples is not None else num_samples
        return draw(len(self), wanted, seed, self.path)

    def verify(self, vocab_size: int) -> None:
        """See that the files are what was written, and of a model's vocabulary; reads them whole.

        Raises:
            DataError: a file has changed, or ids are outside the vocabulary.
        """
        for name, digest in self.digests.items():
            if file_sha256(self.path / name) != digest:
                raise DataError("its content is not what was written", where=str(self.path / name), fix=_AGAIN)
        check_ids(int(self.tokens.min()), int(self.tokens.max()), vocab_size, str(self.path / _file("tokens")))


def is_sample_set(path: Path) -> bool:
    """Whether a path names a sample set."""
    return (path / SAMPLES).is_file()


def length_of_samples(words: Iterable[str]) -> int | None:
    """Positions of a sample of the first sample set that is named, a teacher's cache included; None: there is none.

    Raises:
        DataError: it cannot be opened.
    """
    sets = (Path(word) for word in words if is_sample_set(Path(word)))
    return next((open_samples(each).seq_length for each in sets), None)


def open_samples(path: Path) -> SampleSet:
    """Open a sample set; of its files this reads sizes alone.

    Raises:
        DataError: it is none, or a file is missing or not of the size that it should be.
    """
    where = str(path / SAMPLES)
    if not is_sample_set(path):
        raise DataError("not a sample set", where=str(path), fix=f"name a directory that holds {SAMPLES}")
    found = read_json(path / SAMPLES)
    try:
        if found["format"] != FORMAT:
            raise DataError(f"format {found['format']}, this version reads {FORMAT}", where=where, fix=_AGAIN)
        samples, length = int(found["samples"]), int(found["seq_length"])
        documents, digests, about = bool(found["documents"]), dict(found["sha256"]), dict(found["about"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"not a description of samples ({error!r})", where=where, fix=_AGAIN) from None
    if samples < 1 or length < 1 or set(digests) != set(map(_file, _ARRAYS)):
        raise DataError("not a description of samples", where=where, fix=_AGAIN)
    arrays = {name: _open(path / _file(name), samples, length + more, dtype) for name, (dtype, more) in _ARRAYS.items()}
    return SampleSet(path, **arrays, documents=documents, digests=digests, about=about)


def write_samples(
    path: Path,
    tokens: npt.NDArray[Any],
    loss_mask: npt.NDArray[Any],
    position_ids: npt.NDArray[Any],
    *,
    documents: bool,
    about: Mapping[str, Any],
) -> SampleSet:
    """Write a sample set into a directory that exists, as `files.new_directory` makes one; see `SampleSet`."""
    given = {"tokens": tokens, "loss_mask": loss_mask, "position_ids": position_ids}
    for name, (dtype, more) in _ARRAYS.items():
        assert given[name].shape == (len(tokens), tokens.shape[1] - 1 + more)
        np.save(path / _file(name), np.ascontiguousarray(given[name], dtype=dtype), allow_pickle=False)
    description = {
        "format": FORMAT,
        "samples": len(tokens),
        "seq_length": tokens.shape[1] - 1,
        "documents": documents,
        "sha256": {_file(name): file_sha256(path / _file(name)) for name in _ARRAYS},
        "about": dict(about),
    }
    (path / SAMPLES).write_text(to_json(description))
    return open_samples(path)


def _file(name: str) -> str:
    return f"{name}.npy"


def _open(path: Path, rows: int, columns: int, dtype: Any) -> npt.NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"not readable as a .npy matrix ({error})", where=str(path), fix=_AGAIN) from None
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != (rows, columns):
        raise DataError(f"is not {np.dtype(dtype)} [{rows}, {columns}]", where=str(path), fix=_AGAIN)
    return array
