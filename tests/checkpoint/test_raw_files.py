"""Gathering rows: the right bytes, and no others."""

from __future__ import annotations

import errno
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slim.checkpoint import raw_files
from megatron_slim.checkpoint.raw_files import OpenFiles, OutputFile, as_bytes, as_tensor
from megatron_slim.errors import CheckpointError

START = 24


@pytest.fixture
def matrix(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    content = torch.arange(400 * 512, dtype=torch.int32).float().reshape(400, 512)  # rows of half a page
    (tmp_path / "file").write_bytes(bytes(START) + bytes(as_bytes(content)))
    return tmp_path / "file", content


def gather(file: Path, content: torch.Tensor, rows: Any, files: OpenFiles | None = None) -> torch.Tensor:
    index = np.asarray(rows, dtype=np.int64)
    found = (files or OpenFiles()).gather(file, START, index, content.shape[1] * 4)
    return as_tensor(found, torch.float32, (index.size, content.shape[1]))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Of every read, how many bytes were asked for, and whether past the page cache."""
    found: list[tuple[int, bool]] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: Any, offset: int) -> int:
        direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        found.append((sum(len(buffer) for buffer in buffers), direct))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(raw_files.os, "preadv", counting)
    return found


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests write is in the page cache still, and on some file systems always is."""
    monkeypatch.setattr(raw_files, "cached_share", lambda file: 0.0)


@pytest.mark.parametrize(
    "rows",
    [[0], [399], range(400), range(0, 400, 2), range(0, 400, 3), [5, 4, 3], [7, 7, 7], [0, 1, 2, 9, 10, 300, 3, 1]],
)
def test_rows_are_those_of_the_matrix(matrix: tuple[Path, torch.Tensor], rows: Any) -> None:
    file, content = matrix
    assert torch.equal(gather(file, content, rows), content[list(rows)])


def test_a_random_choice_of_rows(matrix: tuple[Path, torch.Tensor]) -> None:
    file, content = matrix
    draw = np.random.default_rng(0)
    for count in (1, 17, 200, 399):
        for rows in (draw.choice(400, count, replace=False), np.sort(draw.choice(400, count, replace=False))):
            assert torch.equal(gather(file, content, rows), content[torch.from_numpy(rows)])


def test_what_is_read_is_what_is_wanted_and_small_gaps(
    matrix: tuple[Path, torch.Tensor], reads: list[tuple[int, bool]]
) -> None:
    file, content = matrix
    between = raw_files.MOST_BETWEEN // 2048  # rows
    gather(file, content, [3, 4, 5, 100, 101])  # two runs
    assert reads == [(3 * 2048, False), (2 * 2048, False)]
    reads.clear()
    gather(file, content, range(0, 400, between))  # small gaps: one read
    assert reads == [((384 + 1) * 2048, False)]
    reads.clear()
    gather(file, content, range(0, 400, between + 1))  # row by row
    assert reads == [(2048, False)] * 24


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("rows", [[0], [399], range(400), range(0, 400, 3), [7, 7, 7], [5, 4, 300], [3, 4, 100, 101]])
def test_past_the_page_cache_the_same_rows_are_read(
    matrix: tuple[Path, torch.Tensor], reads: list[tuple[int, bool]], rows: Any
) -> None:
    file, content = matrix
    files = OpenFiles()
    with files.reading_once():
        assert torch.equal(gather(file, content, rows, files), content[list(rows)])
    assert all(direct and nbytes % raw_files.PAGE == 0 for nbytes, direct in reads)
    reads.clear()
    assert torch.equal(gather(file, content, rows, files), content[list(rows)])
    assert not any(direct for _, direct in reads)


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("start", range(8))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_at_any_byte(tmp_path: Path, dtype: torch.dtype, start: int) -> None:
    """The format aligns nothing. A safetensors file may be of any length too, and end in a page."""
    content = torch.arange(3000, dtype=torch.int32).to(dtype)
    (tmp_path / "file").write_bytes(bytes(start) + bytes(as_bytes(content)))
    files = OpenFiles()
    with files.reading_once():
        found = as_tensor(files.read(tmp_path / "file", start, content.nbytes), dtype, [30, 100])
    assert torch.equal(found, content.view(30, 100))
    assert found.untyped_storage().nbytes() <= content.nbytes + 3 * raw_files.PAGE


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("at", ["open", "read"])
def test_where_the_page_cache_cannot_be_passed_it_is_used(
    matrix: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Some file systems refuse to open a file so, and disks with larger blocks to read."""
    file, content = matrix
    open_file, preadv = os.open, os.preadv
    refused = OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def opening(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT and at == "open":
            raise refused
        return open_file(path, flags, *mode)

    def reading(descriptor: int, *arguments: Any) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise refused
        return preadv(descriptor, *arguments)

    monkeypatch.setattr(raw_files.os, "open", opening)
    monkeypatch.setattr(raw_files.os, "preadv", reading)
    files = OpenFiles()
    with files.reading_once():
        for _ in range(2):
            assert torch.equal(gather(file, content, [3, 4], files), content[3:5])


def test_a_file_in_the_page_cache_is_read_from_there(
    matrix: tuple[Path, torch.Tensor], reads: list[tuple[int, bool]]
) -> None:
    file, content = matrix
    assert raw_files.cached_share(file) == 1
    files = OpenFiles()
    with files.reading_once():
        gather(file, content, [3, 4], files)
    assert reads == [(2 * 2048, False)]


@pytest.mark.usefixtures("uncached")
def test_reads_past_the_page_cache_of_a_file_that_ends_early(matrix: tuple[Path, torch.Tensor]) -> None:
    file, content = matrix
    for length in (5000, 8192, START):
        os.truncate(file, length)
        files = OpenFiles()
        with pytest.raises(CheckpointError, match="ends inside a tensor"), files.reading_once():
            gather(file, content, range(10), files)


def test_a_file_that_ends_early_is_an_error(matrix: tuple[Path, torch.Tensor]) -> None:
    file, content = matrix
    os.truncate(file, 5000)
    with pytest.raises(CheckpointError, match="ends inside a tensor"):
        gather(file, content, range(10))


def _open_in(folder: Path) -> int:
    return sum(str(folder) in os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())


def test_only_so_many_files_stay_open(tmp_path: Path) -> None:
    files = OpenFiles()
    for number in range(2 * raw_files.MAX_OPEN_FILES):
        (tmp_path / str(number)).write_bytes(bytes([number]))
        assert files.read(tmp_path / str(number), 0, 1).tolist() == [number]
    assert _open_in(tmp_path) == raw_files.MAX_OPEN_FILES
    del files
    assert _open_in(tmp_path) == 0


def test_a_file_in_use_is_not_closed_by_threads_that_open_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_files, "MAX_OPEN_FILES", 1)
    for number in range(4):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 1000)
    files = OpenFiles()

    def read(number: int) -> bool:
        file = tmp_path / str(number % 4)
        return all(files.read(file, offset, 10).tolist() == [number % 4] * 10 for offset in range(0, 1000, 10))

    first = files.get(tmp_path / "0")
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(64)))
    assert os.pread(first.descriptor, 1, 0) == b"\0" and _open_in(tmp_path) <= 2


def test_an_output_is_appended_to_and_written_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the kernel takes a few bytes at a time."""
    pwrite = os.pwrite
    monkeypatch.setattr(raw_files.os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    monkeypatch.setattr(raw_files, "WRITEBACK_BYTES", 8)
    output = OutputFile(tmp_path / "file")
    output.append([b"hello ", memoryview(b"world")])
    output.append([b"!"])
    assert output.size == 12
    output.write_at(0, b"J")
    output.close()
    assert (tmp_path / "file").read_bytes() == b"Jello world!"
    with pytest.raises(FileExistsError):
        OutputFile(tmp_path / "file")
