"""The archives that `torch.save` makes of one tensor: where the data is in them, and writing them without copying.

An archive is a zip file, not compressed: a pickle that says type, size and strides, then the data, aligned, then a
directory. All that surrounds the data is the same for all tensors of one type and size, so it is made by `torch.save`
once and written around the data of every other one; read back, it is parsed once and compared from then on.

Only the CRC-32 of the data differs, which is in the archive twice. torch writes it by default, slowly, and
never looks at it. An archive has none where that of the pickle is 0, which is never empty.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Buffer
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: signature, ..., length of the name, length of the padding
DIRECTORY_ENTRY = struct.Struct("<4s12xL8xHHH12x")  # signature, ..., CRC-32, lengths of name, extra field and comment
CRC_IN_ENTRY, CRC_IN_DESCRIPTOR = 16, 4
CRC = struct.Struct("<L")
MAX_SMALL_BYTES = 1 << 20  # the description of one tensor takes a few hundred


@dataclass(frozen=True)
class Frame:
    """What surrounds the data of a tensor.

    Attributes:
        head: the bytes of the archive before the data.
        tail: those after them, zeros where the CRC-32 of the data stands.
        crc_at: where in the tail that is; nowhere in an archive without checksums.
    """

    head: bytes
    tail: bytes
    crc_at: tuple[int, ...]

    @classmethod
    def of(cls, head: bytes, tail: bytes, crc_at: tuple[int, ...]) -> Frame:
        """The frame of an archive that is cut around its data."""
        return cls(head, _with_crc(tail, crc_at, 0), crc_at)

    def tail_for(self, crc: int) -> bytes:
        """The tail of an archive whose data have this CRC-32."""
        return _with_crc(self.tail, self.crc_at, crc)

    def fits(self, head: bytes, tail: bytes) -> bool:
        """Whether an archive is this one but for its data."""
        return head == self.head and tail == self.tail_for(self.crc_in(tail) or 0)

    def crc_in(self, tail: bytes) -> int | None:
        """The CRC-32 of the data as an archive's tail has it; None without checksums."""
        if not self.crc_at or len(tail) != len(self.tail):
            return None
        crc: int = CRC.unpack_from(tail, self.crc_at[0])[0]
        return crc


def _with_crc(tail: bytes, places: tuple[int, ...], crc: int) -> bytes:
    changed = bytearray(tail)
    for place in places:
        CRC.pack_into(changed, place, crc)
    return bytes(changed)


def make_frame(shape: tuple[int, ...], dtype: torch.dtype) -> Frame:
    """What `torch.save` puts around the data of a contiguous tensor, checksums included."""
    archive = saved_object(torch.zeros(shape, dtype=dtype))
    start, crc_at = locate_data(io.BytesIO(archive), len(archive), shape, dtype)
    end = start + math.prod(shape) * dtype.itemsize
    return Frame.of(archive[:start], archive[end:], tuple(place - end for place in crc_at))


def saved_object(value: object) -> bytes:
    """What `torch.save` makes of something, with checksums whatever this process has set."""
    before, stream = torch.serialization.get_crc32_options(), io.BytesIO()
    torch.serialization.set_crc32_options(True)
    try:
        torch.save(value, stream)
    finally:
        torch.serialization.set_crc32_options(before)
    return stream.getvalue()


def data_offset(stream: BinaryIO, length: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Where the data starts; as `locate_data`."""
    return locate_data(stream, length, shape, dtype)[0]


def locate_data(
    stream: BinaryIO, length: int, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[int, tuple[int, ...]]:
    """Where the data is in an archive that holds one contiguous tensor and nothing else.

    Args:
        stream: the archive.
        length: its bytes.
        shape: shape that the tensor must have.
        dtype: type that it must have.

    Returns:
        Where the data starts, and where its CRC-32 stands (nowhere in an archive without checksums).

    Raises:
        ValueError: it holds something else, or is damaged.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            places = _crc_places(stream, archive)
        checked = entries["data.pkl"].CRC != 0
        if "byteorder" in entries and _content(stream, entries["byteorder"], length, checked) != b"little":
            raise ValueError("not little-endian")
        found = _TensorUnpickler(io.BytesIO(_content(stream, entries["data.pkl"], length, checked))).load()
        data = entries["data/0"]
        start = _start(stream, data, length)
    except Exception as error:  # any exception: the bytes are not ours
        raise ValueError(" ".join(str(error).split())[:120] or type(error).__name__) from None
    if found != _describe(dtype, math.prod(shape), 0, shape, _contiguous_strides(shape)):
        raise ValueError(f"not a contiguous tensor of {list(shape)} {str(dtype).removeprefix('torch.')}")
    if (nbytes := math.prod(shape) * dtype.itemsize) != data.file_size:
        raise ValueError(f"{data.file_size} bytes for a tensor of {nbytes}")
    return start, (start + nbytes + CRC_IN_DESCRIPTOR, places[data.filename]) if checked else ()


def _crc_places(stream: BinaryIO, archive: zipfile.ZipFile) -> dict[str, int]:
    """Where the directory of an archive has the CRC-32 of every entry."""
    found, at = {}, archive.start_dir
    for info in archive.infolist():
        stream.seek(at)
        signature, crc, name, extra, comment = DIRECTORY_ENTRY.unpack(stream.read(DIRECTORY_ENTRY.size))
        if signature != b"PK\x01\x02" or crc != info.CRC:
            raise ValueError("its directory is damaged")
        found[info.filename] = at + CRC_IN_ENTRY
        at += DIRECTORY_ENTRY.size + int(name) + int(extra) + int(comment)
    return found


def _start(stream: BinaryIO, info: zipfile.ZipInfo, length: int) -> int:
    """Where the content of an entry starts; what is before and after it must be what belongs there."""
    name = info.orig_filename.encode()
    stream.seek(info.header_offset)
    signature, name_length, padding = LOCAL_HEADER.unpack(stream.read(LOCAL_HEADER.size))
    start = info.header_offset + LOCAL_HEADER.size + len(name) + int(padding)
    sound = signature == b"PK\x03\x04" and name_length == len(name) and stream.read(len(name)) == name
    if not sound or info.compress_type != zipfile.ZIP_STORED or start + info.file_size > length:
        raise ValueError(f"{info.filename} is damaged")
    stream.seek(start + info.file_size)
    descriptor = stream.read(CRC_IN_DESCRIPTOR + CRC.size)
    if descriptor != b"PK\x07\x08" + CRC.pack(info.CRC):
        raise ValueError(f"{info.filename} is damaged")
    return start


def _content(stream: BinaryIO, info: zipfile.ZipInfo, length: int, checked: bool) -> bytes:
    """A small entry. `zipfile` would insist on its checksum, which is absent where torch was set to leave it out."""
    if info.file_size > MAX_SMALL_BYTES:
        raise ValueError(f"{info.filename} of {info.file_size} bytes")
    stream.seek(_start(stream, info, length))
    content = stream.read(info.file_size)
    if checked and zlib.crc32(content) != info.CRC:
        raise ValueError(f"{info.filename} is damaged")
    return content


def pickle_of(stream: BinaryIO, length: int) -> bytes:
    """The pickle of an archive, whatever it describes.

    Raises:
        ValueError: it is damaged; `zipfile` and `struct` have errors of their own.
    """
    with zipfile.ZipFile(stream) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    return _content(stream, entries["data.pkl"], length, entries["data.pkl"].CRC != 0)


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


@dataclass(frozen=True)
class _Description:
    """A pickled tensor: what it says of the storage, and which part of it the tensor is."""

    dtype: torch.dtype
    storage_numel: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _describe(
    dtype: torch.dtype, numel: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> _Description:
    """Strides of dimensions of one element mean nothing, and are left out."""
    kept = tuple(stride for extent, stride in zip(shape, strides, strict=True) if extent > 1)
    return _Description(dtype, numel, offset, tuple(shape), kept)


_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
}


def _rebuild(
    storage: tuple[Any, ...], offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object
) -> object:
    kind, dtype, key, _device, numel = storage
    if kind != "storage" or key != "0":
        raise pickle.UnpicklingError("not a plain tensor")
    return _describe(dtype, numel, offset, shape, strides)


class _TensorUnpickler(pickle.Unpickler):
    """Reads the description of one tensor, builds nothing and refuses everything else."""

    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a tensor")

    def persistent_load(self, pid: object) -> object:
        if not isinstance(pid, tuple) or len(pid) != 5:
            raise pickle.UnpicklingError("not a storage")
        return pid


class Window(io.RawIOBase):
    """A part of a file as a file of its own, read-only."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._position = descriptor, start, length, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("a position before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        """Read on from the position."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._length - self._position))
        content = os.pread(self._descriptor, count, self._start + self._position) if count else b""
        view[: len(content)] = content
        self._position += len(content)
        return len(content)
