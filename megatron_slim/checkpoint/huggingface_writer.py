"""Hugging Face checkpoints, writing: tensor by tensor."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import hf_tensors
from megatron_slim.checkpoint.huggingface import CONFIG, INDEX, SINGLE
from megatron_slim.checkpoint.safetensors_reader import TensorEntry
from megatron_slim.checkpoint.safetensors_writer import TensorSpec, plan_shards, start_shard, write_tensor
from megatron_slim.errors import summarise
from megatron_slim.files import to_json

CARRIED_FILES = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template*",
)
MAX_SHARD_BYTES = 5_000_000_000  # that of the published checkpoints


def write_hf_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    copy_files_from: Path | None = None,
) -> None:
    """Write a checkpoint tensor by tensor into an existing directory (usually one from `files.new_directory`).

    Args:
        directory: where to write; exists, is empty.
        config: the content of config.json.
        specs: every tensor of the checkpoint, in the order in which shards are filled.
        tensors: the same tensors, lazily, in any order; one is held at a time.
        max_shard_bytes: a shard's size, larger only where one tensor is.
        copy_files_from: directory whose tokenizer and generation files are carried over.
    """
    shards = plan_shards(specs, max_shard_bytes)
    many = len(shards) > 1
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if many else SINGLE for i in range(len(shards))]
    waiting: dict[str, TensorEntry] = {}
    for file, shard in zip(files, shards, strict=True):
        waiting.update(start_shard(directory / file, shard))
    weight_map = {name: entry.file.name for name, entry in waiting.items()}
    for name, tensor in tensors:
        entry = waiting.pop(name)
        assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), (name, tensor.shape, tensor.dtype)
        write_tensor(entry, tensor)
    assert not waiting, f"tensors never produced: {summarise(list(waiting))}"
    if many:
        index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
        (directory / INDEX).write_text(to_json(index), encoding="utf-8")
    (directory / CONFIG).write_text(to_json(config), encoding="utf-8")
    if copy_files_from is not None:
        carry_files(copy_files_from, directory)


def carried_files(source: Path) -> Iterator[Path]:
    """Tokenizer and generation files of a checkpoint directory."""
    for pattern in CARRIED_FILES:
        yield from sorted(file for file in source.glob(pattern) if file.is_file())


def carry_files(source: Path, target: Path) -> None:
    """Copy tokenizer and generation files from one checkpoint directory to another."""
    for file in carried_files(source):
        shutil.copyfile(file, target / file.name)


def specs_of(shape: ModelShape, dtypes: Mapping[str, torch.dtype] | torch.dtype) -> list[TensorSpec]:
    """Specs of every tensor of a model, in the order of the table; ``dtypes`` by name, or one for all."""
    return [
        TensorSpec(name, tensor.shape(shape), dtypes if isinstance(dtypes, torch.dtype) else dtypes[name])
        for name, tensor in hf_tensors(shape).items()
    ]


def total_bytes(shape: ModelShape, dtypes: Mapping[str, torch.dtype]) -> int:
    """Bytes of all tensors of a model."""
    return sum(spec.nbytes for spec in specs_of(shape, dtypes))
