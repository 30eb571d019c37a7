"""The files of a torch distributed checkpoint: pieces of tensors as torch.save archives, and their pickled metadata.

Written here and not by torch's `FileSystemWriter`, which (in 2.13) keeps every tensor of a file in memory until the
file is complete. Read with an unpickler that knows the metadata's plain data classes and nothing else.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_slim.errors import CheckpointError, summarise

METADATA = ".metadata"
MAX_FILE_BYTES = 4_000_000_000


@contextlib.contextmanager
def no_crc32() -> Iterator[None]:
    """Leave out the zip checksums of `torch.save`, about half of its time; `torch.load` does not look at them."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@dataclass
class PieceWriter:
    """Appends `torch.save` archives to ``__0_N.distcp`` files and remembers where each lies."""

    directory: Path
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = field(default_factory=dict)
    storage: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)
    stream: BinaryIO | None = None
    files: int = 0

    def add_object(self, key: str, value: Any) -> None:
        """Append an object that is no tensor."""
        self.tensors[key] = BytesStorageMetadata()
        self._append(MetadataIndex(key), value)

    def _append(self, index: MetadataIndex, value: Any) -> None:
        if self.stream is None or self.stream.tell() >= MAX_FILE_BYTES:
            self.close()
            self.stream = (self.directory / f"__0_{self.files}.distcp").open("wb")
            self.files += 1
        start = self.stream.tell()
        torch.save(value, self.stream)
        name = os.path.basename(self.stream.name)
        self.storage[index] = _StorageInfo(name, start, self.stream.tell() - start)

    def add(self, key: str, shape: tuple[int, ...], offsets: tuple[int, ...], tensor: Tensor) -> None:
        """Append one piece of a tensor of this whole ``shape``."""
        entry = self.tensors.get(key)
        if entry is None:
            entry = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(shape), [])
            self.tensors[key] = entry
        assert isinstance(entry, TensorStorageMetadata)
        assert entry.properties.dtype == tensor.dtype, f"{key}: mixed dtypes"
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), tensor.shape))
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone(memory_format=torch.contiguous_format)  # torch.save writes a view's whole storage
        self._append(MetadataIndex(key, offsets), tensor)

    def finish(self) -> None:
        """Write the metadata, which makes the directory a checkpoint."""
        self.close()
        metadata = Metadata(self.tensors, storage_data=self.storage, storage_meta=StorageMeta())
        (self.directory / METADATA).write_bytes(pickle.dumps(metadata))

    def close(self) -> None:
        """Close the file that is being written."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None


_DCP = "torch.distributed.checkpoint"
_ALLOWED = {
    f"{_DCP}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_DCP}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch": {"Size", *(str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "builtins": {"set", "frozenset", "slice"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles the plain data classes of a ``.metadata`` file and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint's metadata")
        return super().find_class(module, name)


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
    try:
        metadata = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
    except Exception as error:  # any exception: the bytes are not ours
        raise CheckpointError(f"not readable as checkpoint metadata ({error})", where=str(file)) from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError("holds no checkpoint metadata", where=str(file))
    return metadata


@dataclass(frozen=True)
class Piece:
    """A rectangle of a tensor and where its archive lies."""

    file: Path
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    position: int
    length: int

    def read(self) -> Tensor:
        """Read it.

        Raises:
            CheckpointError: the bytes are not the tensor that the metadata promises.
        """
        with self.file.open("rb") as stream:
            stream.seek(self.position)
            archive = io.BytesIO(stream.read(self.length))
        try:
            tensor = torch.load(archive, map_location="cpu", weights_only=True)
        except Exception as error:  # any exception: the bytes are not ours
            what = " ".join(str(error).split())[:120]
            raise CheckpointError(f"byte {self.position} is no tensor ({what})", where=str(self.file)) from None
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != self.sizes:
            raise CheckpointError(f"byte {self.position} is not the tensor that {METADATA} says", where=str(self.file))
        return tensor


def locate_pieces(
    directory: Path, entries: Mapping[str, TensorStorageMetadata], storage: Mapping[MetadataIndex, _StorageInfo]
) -> dict[str, list[Piece]]:
    """Where the pieces of every tensor lie, by first row; all bytes must be there and every element covered."""
    found: dict[str, list[Piece]] = defaultdict(list)
    sizes: dict[str, int] = {}
    faults = []
    for key, entry in entries.items():
        for chunk in entry.chunks:
            info = storage.get(MetadataIndex(key, chunk.offsets))
            if info is None or info.relative_path != os.path.basename(info.relative_path):
                faults.append(f"{key} lies in no file of this directory")
                continue
            if info.relative_path not in sizes:
                file = directory / info.relative_path
                sizes[info.relative_path] = file.stat().st_size if file.is_file() else -1
            if info.offset + info.length > sizes[info.relative_path]:
                state = "truncated" if sizes[info.relative_path] >= 0 else "missing"
                faults.append(f"{info.relative_path} is {state}: {key} lies there")
            file = directory / info.relative_path
            found[key].append(Piece(file, tuple(chunk.offsets), tuple(chunk.sizes), info.offset, info.length))
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            faults.append(f"the pieces of {key} do not make up the whole")
        found[key].sort(key=lambda piece: piece.offsets)
    if faults:
        raise CheckpointError(summarise(faults), where=str(directory), fix="the checkpoint is damaged")
    return dict(found)
