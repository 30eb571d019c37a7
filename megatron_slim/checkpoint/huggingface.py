"""Hugging Face checkpoints, reading: strict and lazy.

The reader looks at every header before any tensor is read, and compares them with the index and the architecture
table in both directions. It never unpickles, never leaves the directory and runs no code from it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_slim.architecture.shape import ModelShape, shape_from_hf_config
from megatron_slim.architecture.table import hf_tensors, mtp_layers_in, weights
from megatron_slim.checkpoint.safetensors_reader import TensorEntry, as_bytes, pread_into, read_header
from megatron_slim.errors import CheckpointError, summarise
from megatron_slim.files import read_json

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
Index: TypeAlias = npt.NDArray[np.int64] | Tensor


class HFCheckpoint:
    """A Hugging Face Qwen3-Next checkpoint that has been checked whole; tensors are read when asked for.

    Attributes:
        path: the directory.
        config_path: the same; where config.json and the tokenizer are.
        config: its config.json.
        shape: sizes of the model, MTP blocks counted from the tensor names.
        names: every tensor name, in the order of the architecture table.
        dtypes: type of every tensor.
    """

    def __init__(self, path: Path, config: dict[str, Any], shape: ModelShape, entries: dict[str, TensorEntry]) -> None:
        self.path, self.config, self.shape = path, config, shape
        self.config_path = path
        self.names = tuple(hf_tensors(shape))
        self._entries = entries
        self.dtypes = {name: entries[name].dtype for name in self.names}

    @classmethod
    def open(cls, path: Path | str) -> HFCheckpoint:
        """Open a directory and check all of it but the values.

        Raises:
            CheckpointError: names every kind of fault: missing or extra tensors, shapes, types, shards.
            ShapeError: config.json describes no model that can be built.
        """
        path = Path(path)
        config = read_config(path)
        entries = _read_headers(path)
        shape = shape_from_hf_config(config, mtp_num_layers=mtp_layers_in(set(entries)), where=str(path / CONFIG))
        _refuse_oversize(shape, len(entries), path)
        _check_against_table(entries, shape, path)
        return cls(path, config, shape, entries)

    def read(self, name: str) -> Tensor:
        """Read one tensor; the result is the caller's own memory."""
        entry = self._entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        pread_into(entry.file, entry.offset, as_bytes(tensor))
        return tensor

    def read_rows(self, name: str, dim0_index: Index | None = None, dim1_index: Index | None = None) -> Tensor:
        """Read the given indices of dim 0 and of dim 1; only the bytes of the wanted rows leave the disk.

        Args:
            name: tensor name.
            dim0_index: rows in the order wanted, at least one; None for all.
            dim1_index: columns in the order wanted; None for all.
        """
        if dim0_index is None:
            return select(self.read(name), None, dim1_index)
        rows = self._gather(self._entries[name], np.asarray(dim0_index, dtype=np.int64))
        return select(rows, None, dim1_index)

    def _gather(self, entry: TensorEntry, index: npt.NDArray[np.int64]) -> Tensor:
        assert index.min() >= 0 and index.max() < entry.shape[0], "row index out of range"
        step = entry.row_bytes
        tensor = torch.empty((index.size, *entry.shape[1:]), dtype=entry.dtype)
        view = as_bytes(tensor)
        starts = np.flatnonzero(np.diff(index, prepend=-2) != 1)  # of runs of consecutive rows
        for start, stop in zip(starts, [*starts[1:], index.size], strict=True):
            pread_into(entry.file, entry.offset + int(index[start]) * step, view[start * step : stop * step])
        return tensor


def select(tensor: Tensor, dim0_index: Index | None, dim1_index: Index | None) -> Tensor:
    """The given indices of dim 0 and of dim 1, in the order wanted; None for all."""
    for dim, index in enumerate((dim0_index, dim1_index)):
        if index is not None:
            tensor = tensor.index_select(dim, torch.as_tensor(np.asarray(index, dtype=np.int64)))
    return tensor


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory.

    Raises:
        CheckpointError: there is no such directory, or no config.json in it.
    """
    if not path.is_dir():
        what = "is a file, not a checkpoint directory" if path.exists() else "no such directory"
        raise CheckpointError(what, where=str(path), fix="give the directory that holds config.json")
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"no {CONFIG} in this directory", where=str(path), fix="give a Hugging Face checkpoint")
    config = read_json(path / CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError("is not a JSON object", where=str(path / CONFIG))
    return config


def _read_headers(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of every shard; the index and the shards must agree in both directions."""
    weight_map = _read_weight_map(path)
    files = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    absent = [file for file in files if not (path / file).is_file()]
    if absent:
        raise CheckpointError(f"missing shards: {summarise(absent)}", where=str(path), fix="download them again")
    entries: dict[str, TensorEntry] = {}
    found: list[str] = []
    for file in files:
        for name, entry in read_header(path / file).items():
            if weight_map is not None and weight_map.get(name) != file:
                found.append(f"{name} is in {file} but not there in the index")
            entries[name] = entry
    for name, file in (weight_map or {}).items():
        if name not in entries:
            found.append(f"{name} is in the index but not in {file}")
    if found:
        raise CheckpointError(summarise(found), where=str(path / INDEX), fix="the index and the shards must agree")
    return entries


def _read_weight_map(path: Path) -> dict[str, str] | None:
    """The index, None for a checkpoint in a single file."""
    if not (path / INDEX).is_file():
        if (path / SINGLE).is_file():
            return None
        if list(path.glob("pytorch_model*.bin")):
            raise CheckpointError(
                "only pickled weights (pytorch_model*.bin), which are never loaded",
                where=str(path),
                fix="save the model as safetensors",
            )
        raise CheckpointError(f"neither {INDEX} nor {SINGLE} in this directory", where=str(path))
    index = read_json(path / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map", where=str(path / INDEX))
    unsafe = [
        f"{name} -> {file!r}"
        for name, file in weight_map.items()
        if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(".safetensors")
    ]
    if unsafe:
        raise CheckpointError(
            f"weight_map entries that are no safetensors file of this directory: {summarise(unsafe)}",
            where=str(path / INDEX),
        )
    return weight_map


def _refuse_oversize(shape: ModelShape, tensors: int, path: Path) -> None:
    """A table of far more tensors than there are would take minutes and all memory only to say so."""
    at_least = shape.num_layers * shape.num_moe_experts
    if at_least > tensors:
        raise CheckpointError(
            f"missing tensors: {tensors} found; num_hidden_layers {shape.num_layers} and num_experts "
            f"{shape.num_moe_experts} in config.json need more than {at_least}",
            where=str(path),
            fix="the checkpoint and its config.json do not belong together",
        )


def _check_against_table(entries: Mapping[str, TensorEntry], shape: ModelShape, path: Path) -> None:
    table = hf_tensors(shape)
    faults = {
        "missing tensors": [name for name in table if name not in entries],
        "extra tensors": [name for name in entries if name not in table],
        "wrong shapes": [
            f"{name} {list(entries[name].shape)}, config.json says {list(tensor.shape(shape))}"
            for name, tensor in table.items()
            if name in entries and entries[name].shape != tensor.shape(shape)
        ],
        "mixed types in one parameter": [
            weight.key
            for weight in weights(shape)
            if len({entries[t.name].dtype for t, _ in weight.hf_tensors(shape) if t.name in entries}) > 1
        ],
    }
    found = [f"{len(names)} {kind}: {summarise(names)}" for kind, names in faults.items() if names]
    if found:
        raise CheckpointError(
            "; ".join(found), where=str(path), fix="the checkpoint and its config.json do not belong together"
        )
