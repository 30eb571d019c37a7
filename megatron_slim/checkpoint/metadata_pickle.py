"""The pickle in ``.metadata`` of a torch distributed checkpoint, read and written without what torch keeps around it.

A pickle names classes and says their attributes. The classes here have the attributes of torch's; they are written
under torch's names, and stand for these when a pickle is read. Importing torch's own would take as long as half of
torch again, because their package brings sharded tensors, FSDP and a computer algebra system; and a reader that knows
nothing else can run nothing else.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import PosixPath
from typing import Any

import torch

from megatron_slim.aliases import JsonObject
from megatron_slim.garbage import without_collection

VERSION = "1.0.0"  # of the format


class _MemoryFormat(Enum):
    """How torch encodes the memory format of a tensor; it is deprecated and always this one."""

    CONTIGUOUS = 0


@dataclass
class TensorProperties:
    """The type of a tensor; all else that torch keeps here is deprecated, and the same for every tensor."""

    dtype: torch.dtype

    def __getstate__(self) -> tuple[object, ...]:
        return self.dtype, torch.strided, False, _MemoryFormat.CONTIGUOUS, False

    def __setstate__(self, state: tuple[torch.dtype, object, object, object, object]) -> None:
        self.dtype, _layout, _requires_grad, _memory_format, _pin_memory = state


@dataclass
class ChunkStorageMetadata:
    """A rectangle of a tensor."""

    offsets: torch.Size
    sizes: torch.Size


@dataclass
class TensorStorageMetadata:
    """A tensor and the rectangles that it was saved in."""

    properties: TensorProperties
    size: torch.Size
    chunks: list[ChunkStorageMetadata]


@dataclass
class BytesStorageMetadata:
    """An object that is not a tensor."""


@dataclass(frozen=True)
class MetadataIndex:
    """Names a rectangle by its tensor and its offsets, or an object, which has none."""

    fqn: str
    index: int | None = field(hash=False, compare=False, default=None)  # a hint where to look first
    offset: torch.Size | None = None

    @classmethod
    def of(cls, fqn: str, offset: Sequence[int]) -> MetadataIndex:
        """Of a rectangle."""
        return cls(fqn, offset=torch.Size(offset))

    def __getstate__(self) -> JsonObject:
        return {name: value for name, value in vars(self).items() if name != "offset" or value is not None}


@dataclass
class StorageInfo:
    """Which bytes of which file hold a rectangle or an object."""

    relative_path: str
    offset: int
    length: int


@dataclass
class StorageMeta:
    """Identifies a checkpoint; nothing here does."""

    checkpoint_id: str | None = None
    save_id: str | None = None
    load_id: str | None = None
    modules: list[str] = field(default_factory=list)


@dataclass
class Metadata:
    """All of it: entries by key, where their rectangles lie, and what the program that saved them kept for itself."""

    state_dict_metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata]
    planner_data: object = None
    storage_data: Any = None
    storage_meta: StorageMeta | None = None
    version: str | None = VERSION


class _Unused:
    """Stands for classes that a saving program keeps for itself; takes anything, and keeps nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_METADATA, _FILES, _PLANNER = (f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner"))
_CLASSES: dict[tuple[str, str], object] = {
    (_METADATA, "BytesStorageMetadata"): BytesStorageMetadata,
    (_METADATA, "ChunkStorageMetadata"): ChunkStorageMetadata,
    (_METADATA, "Metadata"): Metadata,
    (_METADATA, "MetadataIndex"): MetadataIndex,
    (_METADATA, "StorageMeta"): StorageMeta,
    (_METADATA, "TensorProperties"): TensorProperties,
    (_METADATA, "TensorStorageMetadata"): TensorStorageMetadata,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _MemoryFormat,
    (_FILES, "_StorageInfo"): StorageInfo,
}
_NAMES = {id(known): name for name, known in _CLASSES.items()}
_READ = _CLASSES | {
    (_METADATA, "_MEM_FORMAT_ENCODING"): _Unused,
    (_FILES, "_StoragePrefix"): _Unused,
    **{(_PLANNER, name): _Unused for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")},
    **{
        ("torch", str(each).removeprefix("torch.")): each
        for each in vars(torch).values()
        if isinstance(each, torch.dtype)
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib._local", "PosixPath"): PosixPath,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "slice"): slice,
}


_InPython: Any = pickle._Pickler  # the one in C looks every class up where its name says that it is


class _Pickler(_InPython):
    """Writes these classes under torch's names."""

    def save_global(self, obj: object, name: str | None = None) -> None:
        if (known := _NAMES.get(id(obj))) is None:
            super().save_global(obj, name)
            return
        for part in known:
            self.save(part)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)


class _Unpickler(pickle.Unpickler):
    """Unpickles plain data and refuses everything else."""

    def find_class(self, module: str, name: str) -> object:
        if (found := _READ.get((module, name))) is None:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint's metadata")
        return found


def dumps(metadata: Metadata) -> bytes:
    """The bytes of a ``.metadata`` file."""
    stream = io.BytesIO()
    with without_collection():
        _Pickler(stream, protocol=4).dump(metadata)
    return stream.getvalue()


def loads(content: bytes) -> Any:
    """What is in a ``.metadata`` file: mostly a `Metadata`, but attributes are set unchecked.

    Raises:
        Exception: of any kind; the bytes are not ours.
    """
    with without_collection():
        return _Unpickler(io.BytesIO(content)).load()
