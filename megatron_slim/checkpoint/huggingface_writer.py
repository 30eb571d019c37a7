"""Hugging Face checkpoints, writing: tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_slim.aliases import HFConfig
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import hf_tensors, weights
from megatron_slim.architecture.wrapper import Wrapper
from megatron_slim.checkpoint.carried import CarriedTensors
from megatron_slim.checkpoint.huggingface_files import CONFIG, INDEX, SINGLE
from megatron_slim.checkpoint.raw_files import OpenFiles, OutputFile, as_bytes
from megatron_slim.checkpoint.safetensors_reader import TensorEntry
from megatron_slim.checkpoint.safetensors_writer import TensorSpec, plan_shards, start_shard
from megatron_slim.checkpoint.side_files import carry_files
from megatron_slim.checkpoint.units import Unit
from megatron_slim.errors import CheckpointError, summarise
from megatron_slim.files import to_json

MAX_SHARD_BYTES = 5_000_000_000  # that of the published checkpoints


class HFWriter:
    """Writes one process's part of what `start_hf_checkpoint` has prepared; see `transfer.Writer`."""

    def __init__(self, entries: Mapping[str, TensorEntry], copies: Mapping[str, str] | None = None) -> None:
        """Set up.

        Args:
            entries: the place of every tensor.
            copies: by name, the name under which a tensor is written once more.
        """
        self._entries, self._copies = entries, copies or {}
        self._outputs: dict[Path, OutputFile] = {}
        self._files = OpenFiles()

    def write(self, unit: Unit, tensors: dict[str, Tensor]) -> None:
        """Write a unit."""
        for name, tensor in tensors.items():
            rows = unit.rows_of(name)
            for each in (name, self._copies.get(name)):
                if each is not None:
                    self.write_tensor(each, tensor, 0 if rows is None else rows.start)

    def write_tensor(self, name: str, tensor: Tensor, first_row: int = 0) -> None:
        """Write a tensor, or some of its rows."""
        entry = self._entries[name]
        assert (tensor.shape[1:], tensor.dtype) == (entry.shape[1:], entry.dtype), (name, tensor.shape, tensor.dtype)
        assert first_row + len(tensor) <= entry.shape[0], (name, tensor.shape, first_row)
        if entry.file not in self._outputs:
            self._outputs[entry.file] = OutputFile(entry.file, create=False)
        offset = entry.offset + first_row * entry.row_bytes
        self._outputs[entry.file].write_at(offset, as_bytes(tensor.contiguous()))

    def read(self, unit: Unit) -> dict[str, Tensor]:
        """Read a unit back."""
        found = {}
        for name, _ in unit.tensors:
            entry = self._entries[name]
            rows = np.arange(*(unit.rows_of(name) or slice(0, entry.shape[0])).indices(entry.shape[0]))
            found[name] = entry.read(self._files, rows)
            if (copy := self._copies.get(name)) is not None:
                again = self._entries[copy].read(self._files, rows)
                if as_bytes(again) != as_bytes(found[name]):
                    what = f"{copy}: not what was written when read back"
                    raise CheckpointError(what, where=str(entry.file.parent), fix="check disk and memory")
        return found

    def finish(self) -> None:
        """Close the files."""
        while self._outputs:
            self._outputs.popitem()[1].close()


def start_hf_checkpoint(
    directory: Path,
    specs: Sequence[TensorSpec],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    wrapper: Wrapper | None = None,
    carried: CarriedTensors | None = None,
) -> dict[str, TensorEntry]:
    """Prepare the shards of a checkpoint, headers written and every tensor's place known.

    Args:
        directory: exists, is empty (usually one from `files.new_directory`).
        specs: every tensor of the checkpoint, in the order in which shards are filled.
        max_shard_bytes: a shard's size, larger only where one tensor is.
        wrapper: the larger model whose names the files have.
        carried: tensors of that, which follow the others.

    Returns:
        The place of every tensor, by its name in ``specs`` or in ``carried``.
    """
    names = {spec.name if wrapper is None else wrapper.file_name(spec.name): spec.name for spec in specs}
    specs = [replace(spec, name=name) for name, spec in zip(names, specs, strict=True)]
    specs += [] if carried is None else carried.specs
    shards = plan_shards(specs, max_shard_bytes)
    many = len(shards) > 1
    entries: dict[str, TensorEntry] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" if many else SINGLE
        entries.update(start_shard(directory / file, shard))
    if many:
        weight_map = {name: entry.file.name for name, entry in entries.items()}
        index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
        (directory / INDEX).write_text(to_json(index), encoding="utf-8")
    return {names.get(name, name): entry for name, entry in entries.items()}


def finish_hf_checkpoint(directory: Path, config: HFConfig, copy_files_from: Path | None = None) -> None:
    """Write all that is not weights: config.json, and the side files of another directory (`side_files`)."""
    (directory / CONFIG).write_text(to_json(config), encoding="utf-8")
    if copy_files_from is not None:
        carry_files(copy_files_from, directory)


def write_hf_checkpoint(
    directory: Path,
    config: HFConfig,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    copy_files_from: Path | None = None,
) -> None:
    """Write a checkpoint tensor by tensor into an existing, empty directory.

    Args:
        directory: where to write.
        config: the content of config.json.
        specs: every tensor of the checkpoint, in the order in which shards are filled.
        tensors: the same tensors, in any order.
        max_shard_bytes: a shard's size, larger only where one tensor is.
        copy_files_from: directory whose `side_files` are carried over.
    """
    writer = HFWriter(start_hf_checkpoint(directory, specs, max_shard_bytes=max_shard_bytes))
    waiting = {spec.name for spec in specs}
    for name, tensor in tensors:
        writer.write_tensor(name, tensor)
        waiting.remove(name)
    writer.finish()
    assert not waiting, f"tensors never produced: {summarise(sorted(waiting))}"
    finish_hf_checkpoint(directory, config, copy_files_from)


def specs_of(
    shape: ModelShape, dtypes: Mapping[str, torch.dtype] | torch.dtype, fused_blocks: Collection[str] = ()
) -> list[TensorSpec]:
    """Specs of every tensor in the files of a model, in the order of the table.

    Args:
        shape: the model.
        dtypes: by name, one tensor per expert; or one for all.
        fused_blocks: the blocks whose experts are to be fused.
    """
    tensors = hf_tensors(shape, fused_blocks)
    if isinstance(dtypes, torch.dtype):
        return [TensorSpec(name, tensor.shape(shape), dtypes) for name, tensor in tensors.items()]
    found = dict(dtypes)
    for weight in weights(shape) if fused_blocks else ():
        if weight.fused is not None:  # all experts of a parameter have one type
            found[weight.fused.name] = dtypes[next(weight.hf_tensors(shape))[0].name]
    return [TensorSpec(name, tensor.shape(shape), found[name]) for name, tensor in tensors.items()]


def total_bytes(shape: ModelShape, dtypes: Mapping[str, torch.dtype]) -> int:
    """Bytes of all tensors of a model."""
    return sum(spec.nbytes for spec in specs_of(shape, dtypes))
