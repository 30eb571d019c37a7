"""A teacher's cache: samples, the hidden states that the teacher ends with for each of their positions, and its head.

The directory is a sample set (`sample_set`) and, besides that,

- ``cache.json``, written last: whose states they are, of how many heads, and in which type;
- ``config.json``: the teacher's, for the planner;
- ``head.safetensors``: the teacher's output layer, ``weight`` [vocabulary, hidden] in the checkpoint's type;
- ``states-N.bin``: of consecutive samples, [heads, samples, S, `stored_states.row_bytes`], the main head first;
- ``states-N.json``: which samples these are, and the CRC-32 of every sample's part of every head.
"""

from __future__ import annotations

import bisect
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_slim.checkpoint.raw_files import OpenFiles, as_bytes
from megatron_slim.errors import DataError
from megatron_slim.files import file_sha256, read_json
from megatron_slim.sample_set import SampleSet, open_samples
from megatron_slim.teacher_cache.names import CACHE, HEAD, is_cache, is_finished
from megatron_slim.teacher_cache.stored_states import TYPES, row_bytes

FORMAT = 1
WEIGHT = "weight"  # the tensor of `HEAD`
_AGAIN = "record the teacher again"


def shard_files(path: Path, number: int) -> tuple[Path, Path]:
    """The states of a shard, and what describes them."""
    return path / f"states-{number:05d}.bin", path / f"states-{number:05d}.json"


@dataclass(frozen=True)
class Shard:
    """The states of consecutive samples.

    Attributes:
        file: that holds them.
        samples: which.
        checksums: CRC-32 of the part of each sample, of every head.
    """

    file: Path
    samples: range
    checksums: tuple[tuple[int, ...], ...] = field(repr=False)


@dataclass(frozen=True)
class TeacherCache:
    """A cache.

    Attributes:
        path: its directory.
        samples: what the teacher has read.
        hidden_size: the teacher's.
        vocab_size: the teacher's.
        heads: whose states are here: the main head, then those of MTP depths.
        kind: type of the states, a key of `stored_states.TYPES`.
        shards: in the order of the samples.
        teacher: fingerprint of the checkpoint (`streaming.fingerprint`).
        head_sha256: of the file of its head.
        figures: what was measured while it was recorded, for people.
    """

    path: Path
    samples: SampleSet = field(repr=False)
    hidden_size: int
    vocab_size: int
    heads: int
    kind: str
    shards: tuple[Shard, ...] = field(repr=False)
    teacher: str
    head_sha256: str
    figures: Mapping[str, Any] = field(repr=False)
    _files: OpenFiles = field(default_factory=OpenFiles, repr=False, compare=False)

    @property
    def head_flops(self) -> float:
        """Operations per token of the teacher's output layer, once."""
        return 2.0 * self.vocab_size * self.hidden_size

    @property
    def row_bytes(self) -> int:
        """Bytes of the state of one position of one head."""
        return row_bytes(self.kind, self.hidden_size)

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample's states of one head."""
        return self.samples.seq_length * self.row_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process, such as a data loader's, as its path: open files stay here."""
        return open_cache, (self.path,)

    def summary(self) -> dict[str, Any]:
        """What was recorded, as ``megatron-slim record --json``."""
        samples, length = len(self.samples), self.samples.seq_length
        return {
            "save": str(self.path),
            "samples": samples,
            "seq_length": length,
            "tokens": samples * length,
            "heads": self.heads,
            "states": self.kind,
            "bytes": samples * self.heads * self.sample_bytes,
            **self.figures,
        }

    def read(self, index: int, heads: int) -> Tensor:
        """The states of a sample's first heads as they are stored, uint8 [heads, S, `row_bytes`].

        Raises:
            DataError: they are not what was written.
        """
        shard = self.shards[bisect.bisect_right(self.shards, index, key=lambda each: each.samples.start) - 1]
        row, size = shard.samples.index(index), self.sample_bytes
        found = torch.empty(heads, size, dtype=torch.uint8)
        file = self._files.get(shard.file)
        for head, checksums in enumerate(shard.checksums[:heads]):
            part = as_bytes(found[head])
            done = file.read(part, (head * len(shard.samples) + row) * size)
            if done < size or zlib.crc32(part) != checksums[row]:
                raise DataError(
                    f"the states of sample {index} are not what was written", where=str(shard.file), fix=_AGAIN
                )
        return found.view(heads, self.samples.seq_length, -1)

    @torch.no_grad()
    def load_head(self, weight: Tensor, first: int) -> None:
        """Fill rows of the teacher's output layer, in their type, from row ``first`` on; those beyond it with zero."""
        with safe_open(self.path / HEAD, "pt") as file:
            rows = file.get_slice(WEIGHT)[min(first, self.vocab_size) : first + len(weight)]
        weight[: len(rows)].copy_(rows)
        weight[len(rows) :].zero_()

    def verify_head(self) -> None:
        """See that the head is what was written; reads it whole.

        Raises:
            DataError: it has changed.
        """
        if file_sha256(self.path / HEAD) != self.head_sha256:
            raise DataError("its content is not what was written", where=str(self.path / HEAD), fix=_AGAIN)


def open_cache(path: Path) -> TeacherCache:
    """Open a cache; of its states this reads sizes alone.

    Raises:
        DataError: it is none, it was not finished, or a file is missing or not of the size that it should be.
    """
    if not is_cache(path):
        raise DataError("not a teacher's cache", where=str(path), fix="make one with megatron-slim record")
    if not is_finished(path):
        raise DataError("was not finished", where=str(path), fix="run the same megatron-slim record again")
    where, found = str(path / CACHE), read_json(path / CACHE)
    samples = open_samples(path)
    try:
        if found["format"] != FORMAT:
            raise DataError(f"format {found['format']}, this version reads {FORMAT}", where=where, fix=_AGAIN)
        hidden_size, vocab_size, heads = (int(found[name]) for name in ("hidden_size", "vocab_size", "heads"))
        kind, teacher, head_sha256 = (str(found[name]) for name in ("kind", "teacher", "head_sha256"))
        count, figures = int(found["shards"]), dict(found["figures"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"not a description of a cache ({error!r})", where=where, fix=_AGAIN) from None
    if kind not in TYPES or min(hidden_size, vocab_size, heads) < 1:
        raise DataError("not a description of a cache", where=where, fix=_AGAIN)
    shards = tuple(read_shard(path, number, heads) for number in range(count))
    cache = TeacherCache(path, samples, hidden_size, vocab_size, heads, kind, shards, teacher, head_sha256, figures)
    _check_shards(cache)
    if not (path / HEAD).is_file():
        raise DataError("no such file", where=str(path / HEAD), fix=_AGAIN)
    return cache


def read_shard(path: Path, number: int, heads: int) -> Shard:
    """What describes a shard.

    Raises:
        DataError: it is missing or does not describe one.
    """
    file, description = shard_files(path, number)
    found = read_json(description)
    try:
        samples = range(int(found["first"]), int(found["first"]) + int(found["samples"]))
        checksums = tuple(tuple(map(int, of_head)) for of_head in found["crc32"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"not a description of states ({error!r})", where=str(description), fix=_AGAIN) from None
    if len(checksums) != heads or any(len(of_head) != len(samples) for of_head in checksums):
        raise DataError("not a description of states", where=str(description), fix=_AGAIN)
    return Shard(file, samples, checksums)


def _check_shards(cache: TeacherCache) -> None:
    covered = 0
    for shard in cache.shards:
        expected = cache.heads * len(shard.samples) * cache.sample_bytes
        if not shard.file.is_file() or shard.file.stat().st_size != expected:
            raise DataError(f"is not a file of {expected} bytes", where=str(shard.file), fix=_AGAIN)
        if shard.samples.start != covered:
            first = shard.samples.start
            raise DataError(f"begins with sample {first}, not {covered}", where=str(shard.file), fix=_AGAIN)
        covered = shard.samples.stop
    if covered != len(cache.samples):
        raise DataError(f"has states of {covered} of {len(cache.samples)} samples", where=str(cache.path), fix=_AGAIN)
