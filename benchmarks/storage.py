"""What the disk itself can do, and the state of the page cache before something is measured."""

from __future__ import annotations

import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_slim.checkpoint.raw_files import OutputFile, cached_share

BLOCK = 4 << 20
PAGE = mmap.PAGESIZE
Span = tuple[Path, int, int]  # file, first byte, end


def files_of(directory: Path) -> list[Path]:
    """All files below a directory."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def bytes_of(directory: Path) -> int:
    """Their sizes together."""
    return sum(file.stat().st_size for file in files_of(directory))


def drop_cache(directory: Path) -> float:
    """Write back all files of a directory and forget their pages; returns the share that stayed in memory.

    On tmpfs nothing can be forgotten: the share is 1.
    """
    for file in files_of(directory):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return resident_share(directory)


def fill_cache(directory: Path) -> float:
    """Read all files of a directory; returns the share that is in memory."""
    raw_read(files_of(directory), bytes_of(directory), threads=1)
    return resident_share(directory)


def resident_share(directory: Path) -> float:
    """Share of the pages of all files of a directory that are in the page cache."""
    sizes = {file: size for file in files_of(directory) if (size := file.stat().st_size)}
    resident = sum(cached_share(file) * size for file, size in sizes.items())
    return resident / sum(sizes.values()) if sizes else 0.0


def raw_read(files: Iterable[Path], nbytes: int, *, threads: int) -> float:
    """Seconds to read the first ``nbytes`` of some files in blocks of 4 MiB, each thread a contiguous part."""
    spans = list(_spans(files, nbytes))

    def read(part: list[Span]) -> None:
        buffer = memoryview(bytearray(BLOCK))
        for file, start, stop in part:
            descriptor = os.open(file, os.O_RDONLY)
            while start < stop:
                start += os.preadv(descriptor, [buffer[: min(BLOCK, stop - start)]], start)
            os.close(descriptor)

    return _timed_in_threads(read, _split(spans, threads))


def raw_write(directory: Path, nbytes: int, *, threads: int) -> float:
    """Seconds to write ``nbytes`` in blocks of 4 MiB and fsync them, each thread a file of its own; then deletes them.

    Through what the tools write through: plain page cache allocates a page for every one of the result, and took up to
    three times as long.
    """
    directory.mkdir()
    content = memoryview(np.random.default_rng(0).bytes(BLOCK))
    share = -(-nbytes // threads)
    spans = [(directory / str(i), 0, min(share, nbytes - i * share)) for i in range(threads) if i * share < nbytes]

    def write(part: list[Span]) -> None:
        for file, _, stop in part:
            output = OutputFile(file)
            while output.size < stop:
                output.append([content[: min(BLOCK, stop - output.size)]])
            output.close()

    try:
        return _timed_in_threads(write, [[span] for span in spans])
    finally:
        shutil.rmtree(directory)


def _spans(files: Iterable[Path], nbytes: int) -> Iterator[Span]:
    """The first ``nbytes`` of some files, in blocks."""
    for file in files:
        size = min(file.stat().st_size, nbytes)
        nbytes -= size
        yield from ((file, start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))


def _split(spans: list[Span], parts: int) -> list[list[Span]]:
    """Contiguous parts; in each, blocks of one file that follow one another are one span."""
    share = -(-len(spans) // parts)
    found = []
    for first in range(0, len(spans), share):
        merged: list[Span] = []
        for file, start, stop in spans[first : first + share]:
            if merged and merged[-1][0] == file:
                merged[-1] = (file, merged[-1][1], stop)
            else:
                merged.append((file, start, stop))
        found.append(merged)
    return found


def _timed_in_threads(work: Callable[[list[Span]], None], parts: list[list[Span]]) -> float:
    with ThreadPoolExecutor(max(1, len(parts))) as pool:
        started = time.monotonic()
        list(pool.map(work, parts))
        return time.monotonic() - started
