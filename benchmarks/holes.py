"""Taking zeros off the disk while they are being written: 163 GB of them pass through a disk that is much smaller."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.storage import PAGE

BLOCK = 4 << 20
LEAST_PAGES = 16  # shorter runs of zeros stay: a hole costs a piece of the file's block list
# The end of a file that still grows is left alone: the last page may be half written, and what comes is not zero.
MARGIN = 16 << 20
_PUNCH_HOLE, _KEEP_SIZE = 0x02, 0x01


class HoleDigger:
    """Turns zeros in the files of a directory into holes, without changing what the files read as.

    A block is dug once, only if it held data at the pass before too and is well before the end of its file, so that
    no page is dug that is still being written; and only pages that are all zero when they are read.

    Attributes:
        peak_disk: most bytes that the files took on the disk, as seen at the start of a pass.
    """

    def __init__(self, parent: Path, name: str) -> None:
        """Dig in ``parent/name`` and in what it is built in next to it, ``parent/.name.*``."""
        self._parent, self._name = parent, name
        self._seen: dict[int, set[int]] = {}  # blocks with data, by the file's inode, because files are renamed
        self._dug: dict[int, set[int]] = {}
        self._content = np.empty(BLOCK, dtype=np.uint8)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.peak_disk = 0

    def dig(self, *, final: bool = False) -> int:
        """One pass; ``final`` when nothing is written any more. Returns the bytes that the files took before it."""
        files = list(self._files())
        disk = sum(_blocks(file) for file in files)
        self.peak_disk = max(self.peak_disk, disk)
        for file in files:
            try:
                descriptor = os.open(file, os.O_RDWR)
            except FileNotFoundError:  # renamed since
                continue
            try:
                self._dig_file(descriptor, final)
            finally:
                os.close(descriptor)
        return disk

    def _files(self) -> Iterator[Path]:
        for directory in self._parent.iterdir():
            if directory.name == self._name or directory.name.startswith(f".{self._name}."):
                yield from (Path(root, file) for root, _, files in os.walk(directory) for file in files)

    def _dig_file(self, descriptor: int, final: bool) -> None:
        status = os.fstat(descriptor)
        dug = self._dug.setdefault(status.st_ino, set())
        blocks = set(_data_blocks(descriptor, status.st_size)) - dug
        ripe = blocks if final else blocks & self._seen.get(status.st_ino, set())
        for block in sorted(ripe):
            if (block + 1) * BLOCK <= status.st_size - MARGIN or final:
                self._dig_block(descriptor, block * BLOCK)
                dug.add(block)
        self._seen[status.st_ino] = blocks

    def _dig_block(self, descriptor: int, offset: int) -> None:
        length = os.preadv(descriptor, [memoryview(self._content)], offset)
        self._content[length:] = 0  # as the rest of a file's last page reads
        pages = np.bitwise_or.reduce(self._content.view(np.uint64).reshape(-1, PAGE // 8), axis=1)
        edges = np.diff(np.concatenate(([1], pages[: -(-length // PAGE)] != 0, [1])))
        bounds = np.flatnonzero(edges)  # of runs of zeros
        for first, end in bounds.reshape(-1, 2).tolist():
            if end - first >= LEAST_PAGES:
                self._punch(descriptor, offset + first * PAGE, (end - first) * PAGE)

    def _punch(self, descriptor: int, offset: int, length: int) -> None:
        mode = ctypes.c_int(_PUNCH_HOLE | _KEEP_SIZE)
        start, count = ctypes.c_longlong(offset), ctypes.c_longlong(length)
        if self._libc.fallocate(ctypes.c_int(descriptor), mode, start, count) != 0:
            raise OSError(ctypes.get_errno(), "fallocate: this file system digs no holes")


def _blocks(file: Path) -> int:
    """Bytes that a file takes on the disk."""
    try:
        return file.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _data_blocks(descriptor: int, size: int) -> Iterator[int]:
    """Numbers of the blocks that are not all hole."""
    position = 0
    while position < size:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        position = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield from range(start // BLOCK, -(-position // BLOCK))
