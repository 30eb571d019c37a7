"""The files of a torch distributed checkpoint: pieces of tensors as torch.save archives, and their pickled metadata.

Written here and not by torch's `FileSystemWriter`, which (in 2.13) keeps every tensor of a file in memory until the
file is complete. Read with unpicklers that know the plain data classes of the format and nothing else; the data go from
the file straight to where they are wanted.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_slim.checkpoint.archives import Frame, make_frame, saved_object
from megatron_slim.checkpoint.metadata_pickle import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageInfo,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    dumps,
    loads,
)
from megatron_slim.checkpoint.raw_files import OutputFile, as_bytes
from megatron_slim.checkpoint.torch_dist_names import METADATA
from megatron_slim.errors import CheckpointError, summarise

MAX_FILE_BYTES = 4_000_000_000
MAX_METADATA_BYTES = 2_000_000_000  # the published 80B model takes 15 MB; optimizer states of many ranks, much more


@dataclass(frozen=True)
class Piece:
    """A rectangle of a tensor and where its archive is."""

    file: Path
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    position: int
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.sizes) * self.dtype.itemsize


@dataclass
class Part:
    """What one process has written: pieces by key, shapes of the whole tensors, objects, and hashes of the files."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    pieces: dict[str, list[Piece]] = field(default_factory=lambda: defaultdict(list))
    objects: dict[str, Piece] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)


class PieceWriter:
    """Appends archives to ``__RANK_N.distcp`` files, as the ranks of a training run do.

    Attributes:
        part: what has been written so far; the hash of a file is known when it is closed.
        frames: what has been written around the data of each size and type.
    """

    def __init__(self, directory: Path, rank: int = 0) -> None:
        self.part = Part()
        self._directory, self._rank, self._files = directory, rank, 0
        self._output: OutputFile | None = None
        self._hash = hashlib.sha256()
        self.frames: dict[tuple[tuple[int, ...], torch.dtype], Frame] = {}

    def add(self, key: str, shape: tuple[int, ...], offsets: tuple[int, ...], tensor: Tensor) -> Piece:
        """Append one piece of a tensor of this whole ``shape``."""
        sizes, dtype = tuple(tensor.shape), tensor.dtype
        if (frame := self.frames.get((sizes, dtype))) is None:
            frame = self.frames[sizes, dtype] = make_frame(sizes, dtype)
        content = as_bytes(tensor.contiguous())
        file, position, length = self._append(frame.head, content, frame.tail_for(zlib.crc32(content)))
        piece = Piece(file, offsets, sizes, dtype, position, length)
        self.part.shapes[key] = shape
        self.part.pieces[key].append(piece)
        return piece

    def add_object(self, key: str, value: object) -> None:
        """Append an object that is not a tensor."""
        file, position, length = self._append(saved_object(value))
        self.part.objects[key] = Piece(file, (), (), torch.uint8, position, length)

    def _append(self, *buffers: bytes | memoryview) -> tuple[Path, int, int]:
        if self._output is None or self._output.size >= MAX_FILE_BYTES:
            self.close()
            self._output = OutputFile(self._directory / f"__{self._rank}_{self._files}.distcp")
            self._files += 1
        start = self._output.size
        for buffer in buffers:
            self._hash.update(buffer)
        self._output.append(buffers)
        return self._output.path, start, self._output.size - start

    def close(self) -> None:
        """Close the file that is being written."""
        if self._output is not None:
            self._output.close()
            self.part.sha256[self._output.path.name] = self._hash.hexdigest()
            self._output, self._hash = None, hashlib.sha256()


def write_metadata(directory: Path, parts: Sequence[Part]) -> bytes:
    """Write the metadata of all parts, which makes the directory a checkpoint; returns their content."""
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, StorageInfo] = {}
    for part in parts:
        for key, pieces in part.pieces.items():
            entry = tensors.setdefault(
                key, TensorStorageMetadata(TensorProperties(dtype=pieces[0].dtype), torch.Size(part.shapes[key]), [])
            )
            assert isinstance(entry, TensorStorageMetadata)
            assert all(piece.dtype == entry.properties.dtype for piece in pieces), f"{key}: mixed dtypes"
            for piece in pieces:
                entry.chunks.append(ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes)))
                storage[MetadataIndex.of(key, piece.offsets)] = _info(piece)
        for key, piece in part.objects.items():
            tensors[key], storage[MetadataIndex(key)] = BytesStorageMetadata(), _info(piece)
    content = dumps(Metadata(tensors, storage_data=storage, storage_meta=StorageMeta()))
    (directory / METADATA).write_bytes(content)
    return content


def _info(piece: Piece) -> StorageInfo:
    return StorageInfo(piece.file.name, piece.position, piece.length)


def read_metadata(directory: Path) -> Metadata:
    """The metadata of a checkpoint directory.

    Raises:
        CheckpointError: there is none, or it is not plain metadata.
    """
    file = directory / METADATA
    if not file.is_file():
        raise CheckpointError(
            f"no {METADATA} in this directory: not a torch_dist checkpoint, or one whose writing was interrupted",
            where=str(directory),
        )
    if file.is_symlink():
        raise CheckpointError("is a link, which is not followed", where=str(file), fix="copy the file here")
    if file.stat().st_size > MAX_METADATA_BYTES:
        raise CheckpointError(f"is {file.stat().st_size} bytes long: not checkpoint metadata", where=str(file))
    try:
        metadata = loads(file.read_bytes())
        _validate(metadata)
    except Exception as error:  # any exception: the bytes are not ours
        what = " ".join(str(error).split())[:200]
        raise CheckpointError(f"not readable as checkpoint metadata ({what})", where=str(file)) from None
    assert isinstance(metadata, Metadata)
    return metadata


def _validate(metadata: object) -> None:
    """Unpickling sets attributes unchecked: look at the type of everything that will be used."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError("does not hold checkpoint metadata")
    if not isinstance(metadata.state_dict_metadata, dict):
        raise ValueError("holds no table of entries")
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, StorageInfo):
            raise ValueError("its storage table is malformed")
        if not isinstance(info.relative_path, str) or not _whole(info.offset, info.length):
            raise ValueError(f"malformed storage of {index.fqn}")
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise ValueError("a key that is not a name")
        if isinstance(entry, TensorStorageMetadata) and not _well_formed(entry):
            raise ValueError(f"malformed entry {key}")


def _whole(*values: object) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _well_formed(entry: TensorStorageMetadata) -> bool:
    rectangles = [(chunk.offsets, chunk.sizes) for chunk in entry.chunks]
    return isinstance(entry.properties.dtype, torch.dtype) and all(
        isinstance(extents, torch.Size) and _whole(*extents) and len(extents) == len(entry.size)
        for extents in (entry.size, *itertools.chain.from_iterable(rectangles))
    )


def locate_pieces(
    directory: Path, entries: Mapping[str, TensorStorageMetadata], storage: Mapping[MetadataIndex, StorageInfo]
) -> dict[str, list[Piece]]:
    """Where the pieces of every tensor are, by first row; all bytes must be there and every element covered once."""
    found: dict[str, list[Piece]] = defaultdict(list)
    sizes: dict[str, int] = {}
    violations = []
    for key, entry in entries.items():
        for chunk in entry.chunks:
            info = storage.get(MetadataIndex.of(key, chunk.offsets))
            if info is None or info.relative_path != os.path.basename(info.relative_path):
                violations.append(f"{key} is in no file of this directory")
                continue
            file = directory / info.relative_path
            if info.relative_path not in sizes:
                regular = file.is_file() and not file.is_symlink()
                sizes[info.relative_path] = file.stat().st_size if regular else -1
            if info.offset + info.length > sizes[info.relative_path]:
                state = "truncated" if sizes[info.relative_path] >= 0 else "missing"
                violations.append(f"{info.relative_path} is {state}: {key} is there")
            rectangle = tuple(chunk.offsets), tuple(chunk.sizes)
            found[key].append(Piece(file, *rectangle, entry.properties.dtype, info.offset, info.length))
        found[key].sort(key=lambda piece: piece.offsets)
        if not _cover(tuple(entry.size), found[key]):
            violations.append(f"the pieces of {key} do not make up the whole")
    if violations:
        raise CheckpointError(summarise(violations), where=str(directory), fix="the checkpoint is damaged")
    return dict(found)


def _cover(shape: tuple[int, ...], pieces: Sequence[Piece]) -> bool:
    """Whether rectangles are the cells of a grid over a tensor: every element in exactly one of them."""
    cells = {piece.offsets: piece.sizes for piece in pieces}
    cuts = [sorted({offsets[dim] for offsets in cells}) for dim in range(len(shape))]
    ends = [dict(zip(at, [*at[1:], extent], strict=True)) for at, extent in zip(cuts, shape, strict=True) if at]
    if len(cells) != len(pieces) or len(ends) != len(shape) or len(cells) != math.prod(map(len, cuts)):
        return False
    return all(at[0] == 0 for at in cuts) and all(
        offset + size == end[offset] and size > 0
        for offsets, sizes in cells.items()
        for offset, size, end in zip(offsets, sizes, ends, strict=True)
    )
