"""Gathering rows: the right bytes, and no others."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slim.checkpoint import raw_files
from megatron_slim.checkpoint.raw_files import OpenFiles, OutputFile, as_bytes
from megatron_slim.errors import CheckpointError

START = 24


@pytest.fixture
def matrix(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    content = torch.arange(400 * 512, dtype=torch.int32).float().reshape(400, 512)  # rows of half a page
    (tmp_path / "file").write_bytes(bytes(START) + bytes(as_bytes(content)))
    return tmp_path / "file", content


def gather(file: Path, content: torch.Tensor, rows: Any) -> torch.Tensor:
    index = np.asarray(rows, dtype=np.int64)
    out = torch.empty(index.size, content.shape[1])
    OpenFiles().gather(file, START, index, out)
    return out


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


def test_what_is_read_is_what_is_wanted_and_gaps_below_a_page(
    matrix: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, content = matrix
    read: list[int] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        read.append(sum(len(buffer) for buffer in buffers))
        return preadv(descriptor, buffers, offset, *flags)

    monkeypatch.setattr(raw_files.os, "preadv", counting)
    gather(file, content, [3, 4, 5, 100, 101])  # two runs
    assert read == [3 * 2048, 2 * 2048]
    read.clear()
    gather(file, content, range(0, 400, 2))  # gaps of half a page: one read
    assert read == [399 * 2048]
    read.clear()
    gather(file, content, range(0, 400, 3))  # gaps of a page: row by row
    assert read == [2048] * 134


@pytest.mark.parametrize("refused", [None, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_stream_asks_for_an_untouched_page_cache_once(
    matrix: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch, refused: int | None
) -> None:
    """A kernel or file system that cannot do it says so, and is not asked again."""
    file, content = matrix
    asked: list[int] = []
    preadv = os.preadv

    def reading(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        asked.append(flags)
        if flags and refused:
            raise OSError(refused, os.strerror(refused))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(raw_files.os, "preadv", reading)
    with raw_files.reading_once():
        for _ in range(2):
            assert torch.equal(gather(file, content, [3, 4]), content[3:5])
    assert torch.equal(gather(file, content, [3, 4]), content[3:5])
    flag = 0x80
    assert asked == ([flag, 0, 0, 0] if refused else [flag, flag, 0])


def test_a_file_that_ends_early_is_an_error(matrix: tuple[Path, torch.Tensor]) -> None:
    file, content = matrix
    os.truncate(file, 5000)
    with pytest.raises(CheckpointError, match="ends inside a tensor"):
        gather(file, content, range(10))


def test_only_so_many_files_stay_open(tmp_path: Path) -> None:
    files = OpenFiles()
    for number in range(2 * raw_files.MAX_OPEN_FILES):
        (tmp_path / str(number)).write_bytes(bytes([number]))
        view = bytearray(1)
        files.read_into(tmp_path / str(number), 0, memoryview(view))
        assert view[0] == number
    mine = [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in os.path.realpath(link)]
    assert len(mine) == raw_files.MAX_OPEN_FILES
    files.close()


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
