"""Checksums of what is written, by others' readers, and a flipped bit by ours."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint, same_bytes
from megatron_slim.checkpoint.distributed import DistCheckpoint
from megatron_slim.checkpoint.torch_dist_files import Piece, PieceWriter, read_metadata
from megatron_slim.checkpoint.torch_dist_reader import PieceReader
from megatron_slim.errors import CheckpointError
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

CONVERT = "tools/convert_checkpoint.py"
SHAPE = tiny_shape(num_layers=2, layer_types=("linear_attention", "full_attention"))
Tool = Callable[..., Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("integrity")
    hf_to_torch_dist(write_tiny_checkpoint(root / "hf", SHAPE), root / "dist")
    return root / "dist"


def archives(release: Path) -> Iterator[tuple[str, bytes]]:
    for index, info in read_metadata(release).storage_data.items():
        with (release / info.relative_path).open("rb") as stream:
            stream.seek(info.offset)
            yield index.fqn, stream.read(info.length)


def test_others_find_every_archive_intact(good: Path) -> None:
    """Python's zipfile reads every byte and compares; objects and tensors."""
    found = dict(archives(good / "release"))
    assert "common_state/shard_0_1" in found and len(found) > 20
    for name, content in found.items():
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert archive.testzip() is None, name
            assert all(info.CRC for info in archive.infolist())


def flip(piece: Piece, start: int) -> None:
    """One bit in the middle of a piece's data."""
    with piece.file.open("r+b") as stream:
        stream.seek(start + piece.nbytes // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 4]))


# Read whole, an expert; read by rows, as several Hugging Face tensors are made of it; a norm; rows of a vocabulary.
KEYS = (
    "decoder.layers.0.mlp.experts.experts.linear_fc2.weight",
    "decoder.layers.1.self_attention.linear_qkv.weight",
    "decoder.layers.0.self_attention.in_proj.weight.query",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)


@pytest.mark.parametrize("number", range(len(KEYS)))
def test_a_flipped_bit_is_one_line(tool: Tool, good: Path, tmp_path: Path, number: int) -> None:
    path = shutil.copytree(good, tmp_path / "dist")
    pieces = DistCheckpoint.open(path).pieces
    piece = pieces[KEYS[number]][-1]
    flip(piece, PieceReader()._locate(piece)[0])
    error = tool(CONVERT, "--load", path, "--save", tmp_path / "out").error
    assert f"__0_0.distcp: byte {piece.position}: damaged data, their CRC-32 is" in error
    error = tool(CONVERT, "--load", path, "--save", tmp_path / "out", "--verify-integrity").error
    assert "__0_0.distcp: is damaged: its SHA-256 is not that of integrity.json" in error
    assert sorted(os.listdir(tmp_path)) == ["dist"]


def test_every_byte_is_covered_by_the_manifest_for_every_tool(tool: Tool, good: Path, tmp_path: Path) -> None:
    path = shutil.copytree(good, tmp_path / "dist")
    np.save(tmp_path / "x.npy", np.ones((2, 8), np.int64))
    evaluate = ("tools/evaluate.py", "--load", path, "--data", tmp_path / "x.npy", "--verify-integrity")
    assert tool(*evaluate).code == 0
    (path / "release/metadata.json").write_text("{}")
    assert "metadata.json: is damaged" in tool(*evaluate).error
    (path / "release/integrity.json").unlink()
    assert "no integrity.json" in tool(*evaluate).error
    hf = ("tools/evaluate.py", "--load", good.parent / "hf", "--data", tmp_path / "x.npy", "--verify-integrity")
    assert "has no hashes to verify" in tool(*hf).error


@pytest.mark.parametrize("checksums", [True, False])
def test_what_torch_writes_is_read_with_checksums_or_without(tmp_path: Path, checksums: bool) -> None:
    """A zero is not a checksum where torch was set to write none, and only there."""
    tensor = torch.arange(96.0).reshape(12, 8)
    stream = io.BytesIO()
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save(tensor, stream)
    finally:
        torch.serialization.set_crc32_options(True)
    (tmp_path / "file").write_bytes(stream.getvalue())
    piece = Piece(tmp_path / "file", (0, 0), (12, 8), torch.float32, 0, len(stream.getvalue()))
    some, whole = np.array([3, 7]), np.arange(12)

    def reader() -> PieceReader:
        found = PieceReader()
        found.check_parts = True
        return found

    assert torch.equal(reader().read_rows(piece, whole), tensor)
    assert torch.equal(reader().read_rows(piece, some), tensor[some])
    flip(piece, reader()._locate(piece)[0])
    for rows in (whole, some):
        if checksums:
            with pytest.raises(CheckpointError, match="damaged data"):
                reader().read_rows(piece, rows)
        else:
            reader().read_rows(piece, rows)


def test_a_checksum_may_be_zero(tmp_path: Path) -> None:
    data = bytes.fromhex("9d0ad96d")
    assert zlib.crc32(data) == 0
    tensor = torch.frombuffer(bytearray(data), dtype=torch.float32)
    writer = PieceWriter(tmp_path)
    piece = writer.add("x", (1,), (0,), tensor)
    writer.close()
    assert same_bytes(PieceReader().read_rows(piece, np.arange(1)), tensor)
    flip(piece, PieceReader()._locate(piece)[0])
    with pytest.raises(CheckpointError, match=r"CRC-32 is [0-9a-f]{8} and was 00000000"):
        PieceReader().read_rows(piece, np.arange(1))


def test_pruning_looks_at_the_rows_that_it_reads(good: Path) -> None:
    """And at no others: that would be a pass over all of the file."""
    checkpoint = open_checkpoint(good)
    assert isinstance(checkpoint, DistCheckpoint)
    assert not checkpoint._reader.check_parts


def test_metadata_are_compared_whenever_a_checkpoint_is_opened(good: Path, tmp_path: Path, tool: Tool) -> None:
    """Where the change leaves them readable, too."""
    shutil.copytree(good, tmp_path / "dist")
    file = tmp_path / "dist" / "release" / "metadata.json"
    file.write_bytes(file.read_bytes() + b" ")
    error = tool(CONVERT, "--load", tmp_path / "dist", "--save", tmp_path / "hf").error
    assert error.startswith(f"{file}: is damaged: its SHA-256 is not that of integrity.json; get the file again")
    assert not (tmp_path / "hf").exists()
    (file.parent / "integrity.json").unlink()  # as of a run without --verify-integrity: there is nothing to compare
    assert tool(CONVERT, "--load", tmp_path / "dist", "--save", tmp_path / "hf").code == 0
