"""Reading and writing files by position: what all streaming reads and writes go through."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_slim.errors import CheckpointError

PAGE = 4096
MAX_OPEN_FILES = 64
WRITEBACK_BYTES = 32 << 20
_MOST_AT_ONCE = 1 << 30  # Linux moves at most 2 GiB in one call
_RWF_DONTCACHE = 0x80  # of Linux 6.14: what a read brings into the page cache leaves it again, what was there stays


_read_flags = 0  # of every read


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """Reads within, of this process, leave the page cache as it was, where kernel and file system can do that.

    For a stream that reads everything once: models are larger than the memory, and to fill that with pages which nobody
    reads again costs other programs theirs, and a virtual machine the time to get them from its host.
    """
    global _read_flags
    _read_flags = _RWF_DONTCACHE
    try:
        yield
    finally:
        _read_flags = 0


def _read(descriptor: int, view: memoryview, offset: int) -> int:
    global _read_flags
    try:
        return os.preadv(descriptor, [view], offset, _read_flags)
    except OSError as error:
        if not _read_flags or error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        _read_flags = 0
        return os.preadv(descriptor, [view], offset)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())


class OpenFiles:
    """Files open for reading; the least recently used are closed. On network file systems opening is what costs."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def descriptor(self, file: Path) -> int:
        """Descriptor of a file, opened if need be; valid until the next call."""
        if file not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(file)
        return self._open[file]

    def read_into(self, file: Path, offset: int, view: memoryview) -> None:
        """Fill ``view``: read, not mapped, so that memory use is what is asked for and no more.

        Raises:
            CheckpointError: the file ends before.
        """
        descriptor, done = self.descriptor(file), 0
        while done < len(view):
            try:
                count = _read(descriptor, view[done : done + _MOST_AT_ONCE], offset + done)
            except OSError as error:
                error.filename = str(file)
                raise
            if count == 0:
                raise CheckpointError("the file ends inside a tensor", where=str(file), fix="get it again")
            done += count

    def gather(self, file: Path, offset: int, rows: npt.NDArray[np.int64], out: Tensor) -> None:
        """Read rows of a matrix in a file, in the order given; pages between them that hold no wanted row are not read.

        Args:
            file: the file.
            offset: where its first row starts.
            rows: indices, at least one.
            out: [rows, ...], contiguous: where to.
        """
        row_bytes = out.nbytes // rows.size
        view = as_bytes(out)
        steps = np.diff(rows)
        near = (steps >= 1) & ((steps - 1) * row_bytes < PAGE)
        starts = np.flatnonzero(np.concatenate(([True], ~near)))  # of runs that are read in one go
        for start, stop in zip(starts, [*starts[1:], rows.size], strict=True):
            first, last = int(rows[start]), int(rows[stop - 1])
            target = view[start * row_bytes : stop * row_bytes]
            if last - first + 1 == stop - start:
                self.read_into(file, offset + first * row_bytes, target)
                continue
            span = np.empty((last - first + 1, row_bytes), dtype=np.uint8)
            self.read_into(file, offset + first * row_bytes, memoryview(span).cast("B"))
            wanted = np.frombuffer(target, dtype=np.uint8).reshape(-1, row_bytes)
            np.take(span, rows[start:stop] - first, axis=0, out=wanted)

    def close(self) -> None:
        """Close all."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()


class OutputFile:
    """A file that is being written, which the kernel is told to send to the disk as it grows.

    Left to itself the kernel waits until a tenth of the memory is dirty, and the fsync at the end then takes long.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        self.path, self.size = path, 0
        self._descriptor = os.open(path, flags, 0o666)
        self._first, self._last, self._waiting = 0, 0, 0  # written since the kernel was told
        self._sent: tuple[int, int] | None = None  # what it was told of before

    def append(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Write at the end."""
        for buffer in buffers:
            self.write_at(self.size, buffer)
            self.size += len(buffer)

    def write_at(self, offset: int, buffer: bytes | memoryview) -> None:
        """Write at a position."""
        view, done = memoryview(buffer), 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done : done + _MOST_AT_ONCE], offset + done)
        self._first, self._last = min(self._first, offset), max(self._last, offset + done)
        self._waiting += done
        if self._waiting >= WRITEBACK_BYTES:
            # On Linux this starts writing dirty pages, and forgets those that are on the disk already: next time.
            for first, last in filter(None, (self._sent, (self._first, self._last))):
                os.posix_fadvise(self._descriptor, first, last - first, os.POSIX_FADV_DONTNEED)
            self._sent = (self._first, self._last)
            self._first, self._last, self._waiting = offset + done, 0, 0

    def close(self) -> None:
        """Flush and close it: what cannot be written is known now or never."""
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
