"""What pruning needs of a checkpoint, whatever its format, and the fingerprint that ties statistics and plans to it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_slim.architecture.qwen3_next import Weight, hf_tensors
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.distributed import DistCheckpoint, is_torch_dist
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.layout import from_megatron


class Source(Protocol):
    """A checkpoint whose tensors are read one by one under their Hugging Face names."""

    @property
    def path(self) -> Path:
        """The checkpoint's directory."""

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""

    @property
    def shape(self) -> ModelShape:
        """Its sizes."""

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Type of every tensor."""

    def read(self, name: str) -> Tensor:
        """One whole tensor."""

    def read_rows(
        self,
        name: str,
        dim0_index: npt.NDArray[np.int64] | None = None,
        dim1_index: npt.NDArray[np.int64] | None = None,
    ) -> Tensor:
        """The given rows and columns of one tensor."""


class DistSource:
    """A torch_dist checkpoint read under Hugging Face names; keeps the parameter that it read last."""

    def __init__(self, checkpoint: DistCheckpoint) -> None:
        self.path, self.config, self.shape = checkpoint.path, checkpoint.config, checkpoint.shape
        self.dtypes: Mapping[str, torch.dtype] = checkpoint.dtypes
        self._checkpoint = checkpoint
        self._holder: dict[str, tuple[Weight, int | None]] = {
            tensor.name: (weight, expert)
            for weight in checkpoint.weights
            for tensor, expert in weight.hf_tensors(checkpoint.shape)
        }
        self._last: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        if name not in self._last:
            weight, expert = self._holder[name]
            parameter = self._checkpoint.read_weight(weight, expert=expert)
            self._last = from_megatron(weight, self.shape, parameter, expert=expert)
        return self._last[name]

    def read_rows(
        self,
        name: str,
        dim0_index: npt.NDArray[np.int64] | None = None,
        dim1_index: npt.NDArray[np.int64] | None = None,
    ) -> Tensor:
        """The given rows and columns of one tensor."""
        return select(self.read(name), dim0_index, dim1_index)


def select(
    tensor: Tensor, dim0_index: npt.NDArray[np.int64] | None, dim1_index: npt.NDArray[np.int64] | None
) -> Tensor:
    """The given rows and columns; None takes all."""
    for dim, index in enumerate((dim0_index, dim1_index)):
        if index is not None:
            tensor = tensor.index_select(dim, torch.from_numpy(index))
    return tensor


def open_source(path: Path) -> tuple[Source, Path]:
    """Open a checkpoint of either format, and say where its tokenizer files are.

    Args:
        path: a Hugging Face directory, or a torch_dist one with its config.json in ``hf/``.

    Raises:
        CheckpointError: see `HFCheckpoint.open` and `DistCheckpoint.open`.
    """
    if is_torch_dist(path):
        checkpoint = DistCheckpoint.open(path)
        return DistSource(checkpoint), checkpoint.config_path
    return HFCheckpoint.open(path), path


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a CPU tensor."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def fingerprint(source: Source) -> str:
    """SHA-256 that tells checkpoints apart without reading all of them.

    It covers the sizes, the name, shape and type of every tensor, and the values of all vectors and routers, which
    training moves first and which are a thousandth of the bytes. A checkpoint has one fingerprint, in either format.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(source.shape), sort_keys=True).encode())
    for name, tensor in sorted(hf_tensors(source.shape).items()):
        extents = tensor.shape(source.shape)
        digest.update(f"{name} {list(extents)} {source.dtypes[name]}\n".encode())
        if len(extents) == 1 or name.endswith(".mlp.gate.weight"):
            digest.update(tensor_bytes(source.read(name)))
    return digest.hexdigest()
