"""Our frames are those of `torch.save`, and nothing but a plain tensor is found in an archive."""

from __future__ import annotations

import contextlib
import io
import os
import random
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_slim.checkpoint.archives import Frame, Window, data_offset, make_frame, saved_object
from megatron_slim.checkpoint.raw_files import as_bytes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def saved(value: Any, *, crc32: bool = True) -> bytes:
    if crc32:
        return saved_object(value)
    stream = io.BytesIO()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(value, stream)
    finally:
        torch.serialization.set_crc32_options(True)
    return stream.getvalue()


def found(archive: bytes, like: Tensor) -> Tensor:
    """The tensor at the offset that we find."""
    start = data_offset(io.BytesIO(archive), len(archive), tuple(like.shape), like.dtype)
    content = bytearray(archive[start : start + like.nbytes])
    return torch.frombuffer(content, dtype=like.dtype).reshape(like.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (1, 7, 130), (300, 1, 4)])
def test_a_framed_tensor_is_what_torch_saves(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    frame = make_frame(shape, dtype)
    content = bytes(as_bytes(tensor))
    archive = frame.head + content + frame.tail_for(zlib.crc32(content))
    # torch makes an id of all checksums, which nothing compares: its 40 digits and their own checksum, twice.
    differing = sum(a != b for a, b in zip(archive, saved(tensor), strict=True))
    assert len(archive) == len(saved(tensor)) and differing <= 40 + 2 * 4
    with zipfile.ZipFile(io.BytesIO(archive)) as found:
        assert found.testzip() is None and zlib.crc32(content) == found.getinfo("archive/data/0").CRC
    assert torch.equal(torch.load(io.BytesIO(archive), weights_only=True), tensor)


@pytest.mark.parametrize("crc32", [False, True])
@pytest.mark.parametrize("shape", [(6,), (1, 6, 3), (2, 1, 5, 1)])
def test_data_are_where_torch_has_put_them(shape: tuple[int, ...], crc32: bool) -> None:
    tensor = torch.randn(shape).bfloat16()
    assert torch.equal(found(saved(tensor, crc32=crc32), tensor), tensor)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("false",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2, 3).t(), "not a contiguous tensor"),
        (torch.zeros(4, 4)[1:3], "not a contiguous tensor"),
        (torch.zeros(3, 2), "not a contiguous tensor"),
        (torch.zeros(2, 3, dtype=torch.float16), "not a contiguous tensor"),
        (torch.zeros(2, 3, dtype=torch.int32), "IntStorage does not belong in a tensor"),
        (torch.nn.Parameter(torch.zeros(2, 3)), "_rebuild_parameter does not belong"),
        ({"a": torch.zeros(2, 3)}, "not a contiguous tensor"),
        ([torch.zeros(2, 3), torch.zeros(2)], "not a plain tensor"),
        (Evil(), "system does not belong in a tensor"),
        (3, "data/0"),
    ],
)
def test_anything_else_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found(saved(value), torch.zeros(2, 3))


def test_damage_is_an_error_or_does_not_touch_the_numbers() -> None:
    tensor = torch.arange(100).float()
    archive = saved(tensor)
    start = data_offset(io.BytesIO(archive), len(archive), (100,), torch.float32)
    numbers = range(start, start + tensor.nbytes)
    draw = random.Random(0)
    for position in range(len(archive)):
        if position in numbers:
            continue
        damaged = bytearray(archive)
        damaged[position] ^= 1 << draw.randrange(8)
        with contextlib.suppress(ValueError):
            assert torch.equal(found(bytes(damaged), tensor), tensor), position
    for length in range(0, len(archive), 7):
        with pytest.raises(ValueError, match=r"."):
            found(archive[:length], tensor)


def test_a_window_is_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    window = Window(descriptor, 3, 4)
    assert window.read() == b"3456"
    assert (window.seek(-2, os.SEEK_END), window.read(9), window.read(1)) == (2, b"56", b"")
    assert (window.seek(1), window.seek(1, os.SEEK_CUR), window.read(1)) == (1, 2, b"5")
    with pytest.raises(OSError, match="before the start"):
        window.seek(-5)
    os.close(descriptor)


def test_frames_differ_by_type_and_shape() -> None:
    assert make_frame((2, 3), torch.float32) != make_frame((3, 2), torch.float32)
    assert isinstance(make_frame((2,), torch.float16), Frame)
