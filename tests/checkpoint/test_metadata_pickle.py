"""Metadata as torch has it: the same bytes, read both ways."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from megatron_slim.checkpoint import metadata_pickle

PAIRS = [
    (metadata_pickle.BytesStorageMetadata, metadata.BytesStorageMetadata),
    (metadata_pickle.ChunkStorageMetadata, metadata.ChunkStorageMetadata),
    (metadata_pickle.Metadata, metadata.Metadata),
    (metadata_pickle.MetadataIndex, metadata.MetadataIndex),
    (metadata_pickle.StorageMeta, metadata.StorageMeta),
    (metadata_pickle.TensorStorageMetadata, metadata.TensorStorageMetadata),
]


def example(classes: Any, info: Any, **properties: Any) -> Any:
    """Two tensors, one of them in two pieces, and an object."""
    size, half = torch.Size((4, 3)), torch.Size((2, 3))
    chunks = [classes.ChunkStorageMetadata(torch.Size((row, 0)), half) for row in (0, 2)]
    vector = classes.ChunkStorageMetadata(torch.Size((0,)), torch.Size((4,)))
    entries = {
        "matrix": classes.TensorStorageMetadata(
            classes.TensorProperties(dtype=torch.bfloat16, **properties), size, chunks
        ),
        "vector": classes.TensorStorageMetadata(
            classes.TensorProperties(dtype=torch.float32, **properties), torch.Size((4,)), [vector]
        ),
        "object": classes.BytesStorageMetadata(),
    }
    named = [("matrix", (0, 0)), ("matrix", (2, 0)), ("vector", (0,))]
    places = {
        classes.MetadataIndex(key, offset=torch.Size(offset)): info("__0_0.distcp", 64 * at, 64)
        for at, (key, offset) in enumerate(named)
    }
    places[classes.MetadataIndex("object")] = info("__0_0.distcp", 256, 9)
    return classes.Metadata(entries, storage_data=places, storage_meta=classes.StorageMeta(), version="1.0.0")


def test_the_bytes_are_those_that_torch_writes() -> None:
    ours = example(metadata_pickle, metadata_pickle.StorageInfo)
    assert metadata_pickle.dumps(ours) == pickle.dumps(example(metadata, filesystem._StorageInfo), protocol=4)
    assert metadata_pickle.loads(metadata_pickle.dumps(ours)) == ours


def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(metadata_pickle.dumps(example(metadata_pickle, metadata_pickle.StorageInfo)))
    found = filesystem.FileSystemReader(tmp_path).read_metadata()
    found.storage_meta.load_id = None  # the reader's own
    assert found == example(metadata, filesystem._StorageInfo)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_what_torch_keeps_for_itself_is_passed_over(protocol: int) -> None:
    """Plans of a program that caches them, other memory formats, hints, a transformed file, paths."""
    theirs = example(
        metadata, filesystem._StorageInfo, memory_format=torch.preserve_format, requires_grad=True, pin_memory=True
    )
    tensor = planner.TensorWriteData(
        metadata.ChunkStorageMetadata(torch.Size((0,)), torch.Size((4,))),
        metadata.TensorProperties(dtype=torch.float32),
        torch.Size((4,)),
    )
    hinted = metadata.MetadataIndex("vector", (0,), 7)
    item = planner.WriteItem(hinted, planner.WriteItemType.SHARD, tensor_data=tensor)
    theirs.planner_data = [planner.SavePlan([item], storage_data=filesystem._StoragePrefix("__0_"))]
    theirs.storage_meta.checkpoint_id = Path("somewhere")
    theirs.storage_data[hinted] = filesystem._StorageInfo("__0_0.distcp", 128, 64, ["zstd"])
    ours = example(metadata_pickle, metadata_pickle.StorageInfo)
    found = metadata_pickle.loads(pickle.dumps(theirs, protocol=protocol))
    assert (found.state_dict_metadata, found.storage_data) == (ours.state_dict_metadata, ours.storage_data)


@pytest.mark.parametrize("ours, theirs", PAIRS, ids=[ours.__name__ for ours, _ in PAIRS])
def test_the_attributes_are_torch_s(ours: Any, theirs: Any) -> None:
    assert {each.name for each in dataclasses.fields(ours)} == {each.name for each in dataclasses.fields(theirs)}
    assert metadata_pickle.VERSION == filesystem.CURRENT_DCP_VERSION


@pytest.mark.parametrize("content", [b"cos\nsystem\n(S'true'\ntR.", pickle.dumps(filesystem.FileSystemWriter)])
def test_other_classes_are_refused(content: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match="does not belong in a checkpoint's metadata"):
        metadata_pickle.loads(content)
