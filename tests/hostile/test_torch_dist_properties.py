"""Whatever is done to the files around the numbers of a torch_dist checkpoint: one error, or the same numbers.

Numbers that were changed in place are Megatron's integrity.json to find, and two entries that were exchanged whole are
another checkpoint, which nothing can distinguish from a damaged one.
"""

from __future__ import annotations

import copy
import io
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_slim.checkpoint.archives import data_offset
from megatron_slim.checkpoint.convert import hf_to_torch_dist, same_bytes
from megatron_slim.checkpoint.distributed import DistCheckpoint
from megatron_slim.checkpoint.metadata_pickle import Metadata, TensorStorageMetadata, dumps
from megatron_slim.checkpoint.torch_dist_files import read_metadata
from megatron_slim.errors import SlimError
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

SHAPE = tiny_shape(layer_types=("linear_attention", "full_attention"), num_moe_experts=2, vocab_size=16)
PROPERTY = settings(deadline=None, derandomize=True, max_examples=150, suppress_health_check=list(HealthCheck))
ODD = st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**70, 10**30, 1.5, True, None, "7", (), (1, 2), b"x", float("nan")])


class Good:
    """A checkpoint, what it holds, and its metadata as bytes and as an object."""

    def __init__(self, directory: Path) -> None:
        self.release = directory / "torch_dist" / "release"
        hf_to_torch_dist(write_tiny_checkpoint(directory / "hf", SHAPE), directory / "torch_dist")
        checkpoint = DistCheckpoint.open(self.release)
        self.tensors = {name: checkpoint.read(name) for name in checkpoint.names}
        self.pieces = [piece for found in checkpoint.pieces.values() for piece in found]
        self.file = self.release / ".metadata"
        self.content = self.file.read_bytes()
        self.metadata = read_metadata(self.release)

    def check(self, content: bytes) -> None:
        """Open and read all with this metadata."""
        self.file.write_bytes(content)
        try:
            checkpoint = DistCheckpoint.open(self.release)
            found = {name: checkpoint.read(name) for name in checkpoint.names}
        except SlimError as error:
            assert "\n" not in str(error) and len(str(error)) < 3000
            return
        finally:
            self.file.write_bytes(self.content)
        assert found.keys() == self.tensors.keys()
        assert all(same_bytes(found[name], tensor) for name, tensor in self.tensors.items())


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return Good(tmp_path_factory.mktemp("good"))


@PROPERTY
@given(data=st.data())
def test_bytes_of_the_metadata(good: Good, data: st.DataObject) -> None:
    content = bytearray(good.content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "insert", "delete", "cut"])):
            case "flip":
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case "delete":
                del content[at : at + data.draw(st.integers(1, 9))]
            case "cut":
                del content[at + 1 :]
    good.check(bytes(content))


def _spots(metadata: Metadata) -> Iterator[tuple[str, Any, str]]:
    """Everything in the metadata that can be set to something else."""
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            yield from ((key, entry, name) for name in ("size", "chunks", "properties"))
            yield key, entry.properties, "dtype"
            yield from ((key, chunk, name) for chunk in entry.chunks for name in ("offsets", "sizes"))
    for index, info in (metadata.storage_data or {}).items():
        yield from ((index.fqn, info, name) for name in ("relative_path", "offset", "length"))
    yield from (("", metadata, name) for name in ("state_dict_metadata", "storage_data"))


@PROPERTY
@given(data=st.data())
def test_values_of_the_metadata(good: Good, data: st.DataObject) -> None:
    metadata = copy.deepcopy(good.metadata)
    spots = list(_spots(metadata))
    for _ in range(data.draw(st.integers(1, 2))):
        _, owner, name = spots[data.draw(st.integers(0, len(spots) - 1))]
        value = getattr(owner, name)
        if isinstance(value, int):
            value = value + data.draw(st.sampled_from([-64, -1, 1, 64, 10**9])) if data.draw(st.booleans()) else None
        elif isinstance(value, torch.Size) and data.draw(st.booleans()):
            value = torch.Size([*value[:-1], value[-1] + data.draw(st.sampled_from([-1, 1, 2**40]))])
        elif isinstance(value, str):
            value = data.draw(st.sampled_from(["../release/" + value, "/" + value, "", "\0", "\n\x1b[31m", "..", "."]))
        else:
            value = data.draw(ODD)
        object.__setattr__(owner, name, value)
    good.check(dumps(metadata))


@settings(PROPERTY, max_examples=50)
@given(data=st.data())
def test_what_surrounds_the_numbers(good: Good, data: st.DataObject) -> None:
    """Bytes of the archives before and after a tensor's data."""
    piece = good.pieces[data.draw(st.integers(0, len(good.pieces) - 1))]
    nbytes = math.prod(piece.sizes) * piece.dtype.itemsize
    intact = piece.file.read_bytes()
    archive = bytearray(intact[piece.position : piece.position + piece.length])
    start = data_offset(io.BytesIO(archive), piece.length, piece.sizes, piece.dtype)
    around = [at for at in range(len(archive)) if not start <= at < start + nbytes]
    for _ in range(data.draw(st.integers(1, 3))):
        archive[around[data.draw(st.integers(0, len(around) - 1))]] ^= 1 << data.draw(st.integers(0, 7))
    piece.file.write_bytes(intact[: piece.position] + bytes(archive) + intact[piece.position + piece.length :])
    try:
        good.check(good.content)
    finally:
        piece.file.write_bytes(intact)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_links_and_pipes_are_not_files_of_a_checkpoint(good: Good, tmp_path: Path, name: str) -> None:
    copied = shutil.copytree(good.release.parent, tmp_path / "copy") / "release"
    (copied / name).unlink()
    (copied / name).symlink_to(good.release / name)
    with pytest.raises(SlimError):
        DistCheckpoint.open(copied)
    (copied / name).unlink()
    os.mkfifo(copied / name)
    with pytest.raises(SlimError):
        DistCheckpoint.open(copied)
