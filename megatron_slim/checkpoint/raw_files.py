"""Reading and writing files by position: what all streaming reads and writes go through."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_slim.errors import CheckpointError

PAGE = 4096  # also what reads past the page cache are aligned to, as much as any disk needs
MOST_BETWEEN = 32 << 10  # bytes of unwanted rows that are read to get the rows around them in one go
MAX_OPEN_FILES = 64
WRITEBACK_BYTES = 16 << 20
_LIBC = ctypes.CDLL(None, use_errno=True)
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4  # of sync_file_range(2)
_MOST_AT_ONCE = 1 << 30  # Linux moves at most 2 GiB in one call


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())


def as_tensor(content: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Bytes as a tensor of a type, shared with them where torch can address them as that."""
    if content.storage_offset() % dtype.itemsize:
        content = content.clone()
    return content.view(-1).view(dtype).view(*shape)


def cached_share(file: Path) -> float:
    """Share of a file's pages that are in the page cache, as mincore(2) has it; 1 where it may not be known."""
    with file.open("rb") as stream:
        if not (size := os.fstat(stream.fileno()).st_size):
            return 1.0
        with mmap.mmap(stream.fileno(), size, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, dtype=np.uint8)
            found = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
            addresses = [ctypes.c_void_p(array.ctypes.data) for array in (view, found)]
            failed = ctypes.CDLL(None).mincore(addresses[0], ctypes.c_size_t(size), addresses[1])
            del view  # or the map cannot be closed
    return 1.0 if failed else float((found & 1).mean())


class OpenFile:
    """A file open for reading, closed with the last reference to it."""

    def __init__(self, file: Path, *, once: bool = False) -> None:
        """Open it; what is read ``once`` is read past the page cache, unless it is there already."""
        self.direct = False
        if once and cached_share(file) < 0.5:
            try:
                self.descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                self.direct = True
                return
            except OSError as error:
                if error.errno != errno.EINVAL:  # a file system that cannot do that
                    raise
        self.descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` as far as the file goes, all in pages where ``direct``; returns how many bytes that is."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.descriptor, [view[done : done + _MOST_AT_ONCE]], offset + done)
            except OSError as error:
                if not self.direct or error.errno != errno.EINVAL:
                    raise
                self._indirectly()  # a disk with larger blocks than pages
                continue
            done += count
            if count == 0 or (self.direct and count % PAGE):  # the end of the file
                break
        return done

    def _indirectly(self) -> None:
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, fcntl.fcntl(self.descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
        self.direct = False

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class OpenFiles:
    """Files open for reading; the least recently used are closed. On network file systems opening is what costs.

    Threads may read at the same time.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[Path, bool], OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._once = False

    @contextlib.contextmanager
    def reading_once(self) -> Iterator[None]:
        """Reads within go past the page cache, where file system and disk can do that.

        For a stream that reads everything once: models are larger than the memory, and to fill that with pages which
        nothing reads again costs two copies of everything, other programs their memory, and a virtual machine the time
        to get it from its host.
        """
        self._once = True
        try:
            yield
        finally:
            self._once = False

    def get(self, file: Path) -> OpenFile:
        """A file, opened if need be; it stays open for as long as the caller has this."""
        with self._lock:
            key = (file, self._once)
            found = self._open.pop(key, None) or OpenFile(file, once=self._once)
            self._open[key] = found
            if len(self._open) > MAX_OPEN_FILES:
                self._open.popitem(last=False)
            return found

    def read(self, file: Path, offset: int, nbytes: int) -> Tensor:
        """Bytes of a file: [nbytes], uint8. Read, not mapped, so that memory use is what is asked for and no more.

        Raises:
            CheckpointError: the file ends before.
        """
        opened = self.get(file)
        before = offset % PAGE if opened.direct else 0
        length = before + nbytes
        whole = -(-length // PAGE) * PAGE if opened.direct else length
        memory = torch.empty(whole + (PAGE if opened.direct else 0), dtype=torch.uint8)
        start = -memory.data_ptr() % PAGE if opened.direct else 0
        try:
            done = opened.read(as_bytes(memory[start : start + whole]), offset - before)
        except OSError as error:
            error.filename = str(file)
            raise
        if done < length:
            raise CheckpointError("the file ends inside a tensor", where=str(file), fix="get it again")
        return memory[start + before : start + length]

    def gather(self, file: Path, offset: int, rows: npt.NDArray[np.int64], row_bytes: int) -> Tensor:
        """Read rows of a matrix in a file, in the order given; those between them only where that is sooner.

        Args:
            file: the file.
            offset: where its first row starts.
            rows: indices, at least one.
            row_bytes: length of a row.

        Returns:
            [rows, row_bytes], uint8.
        """
        steps = np.diff(rows)
        near = (steps >= 1) & ((steps - 1) * row_bytes < MOST_BETWEEN)
        starts = np.flatnonzero(np.concatenate(([True], ~near)))  # of runs that are read in one go
        out: Tensor | None = None
        for start, stop in zip(starts, [*starts[1:], rows.size], strict=True):
            first, last = int(rows[start]), int(rows[stop - 1])
            span = self.read(file, offset + first * row_bytes, (last - first + 1) * row_bytes).view(-1, row_bytes)
            if len(span) == stop - start == rows.size:
                return span
            if out is None:
                out = torch.empty((rows.size, row_bytes), dtype=torch.uint8)
            # Of mode "raise" numpy would make a copy.
            np.take(span.numpy(), rows[start:stop] - first, axis=0, out=out[start:stop].numpy(), mode="clip")
        assert out is not None
        return out


class OutputFile:
    """A file that is being written, which goes to the disk as it grows.

    Left to itself the kernel waits until a tenth of the memory is dirty, and the fsync at the end then takes long. What
    has been written leaves the page cache, so that a few pages serve the whole file: a virtual machine gets each new
    one from its host, which takes longer than to fill it.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        self.path, self.size = path, 0
        self._descriptor = os.open(path, flags, 0o666)
        self._first, self._last, self._waiting = 0, 0, 0  # written since the kernel was asked
        self._sent: tuple[int, int] | None = None  # what it was asked for before

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
            self._send(self._first, self._last)
            self._first, self._last, self._waiting = offset + done, 0, 0

    def _send(self, first: int, last: int) -> None:
        """Have the kernel begin to write what is new, and end with what it began before."""
        self._sync(first, last, _WRITE)
        if self._sent is not None:
            self._sync(*self._sent, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
            os.posix_fadvise(self._descriptor, self._sent[0], self._sent[1] - self._sent[0], os.POSIX_FADV_DONTNEED)
        self._sent = (first, last)

    def _sync(self, first: int, last: int, flags: int) -> None:
        span = ctypes.c_int64(first), ctypes.c_int64(last - first)
        if _LIBC.sync_file_range(self._descriptor, *span, ctypes.c_uint(flags)):
            number = ctypes.get_errno()
            if number not in (errno.ENOSYS, errno.EPERM):  # of a sandbox: the fsync does it all
                raise OSError(number, os.strerror(number), str(self.path))

    def close(self) -> None:
        """Flush and close it: what cannot be written is known now or never."""
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
