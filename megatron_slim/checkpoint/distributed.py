"""Megatron's distributed checkpoints (torch_dist): a streaming writer and a strict, lazy reader.

A checkpoint directory as ``--load`` takes it, with what this package adds in ``hf/``::

    DIR/latest_checkpointed_iteration.txt   "release", or a number
    DIR/release/                            or iter_0000100/
        .metadata                           names, shapes, and which bytes of which file hold them
        metadata.json                       {"sharded_backend": "torch_dist", ...}
        __0_0.distcp ...                    one torch.save archive after another
    DIR/hf/                                 config.json and tokenizer of the same model in Hugging Face form

Experts are written one by one, as Megatron does: a rank reads whole pieces, so a single piece for all experts of a
layer would be read by every rank in full.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_slim.architecture.shape import ModelShape, shape_from_hf_config
from megatron_slim.architecture.table import mtp_layers_in, weights
from megatron_slim.architecture.weight import Weight
from megatron_slim.checkpoint.huggingface import CONFIG, Index, read_config, select
from megatron_slim.checkpoint.huggingface_writer import carry_files
from megatron_slim.checkpoint.layout import from_megatron, label_rows, split_keys, stored_shapes, to_megatron
from megatron_slim.checkpoint.torch_dist_files import METADATA, PieceWriter, locate_pieces, no_crc32, read_metadata
from megatron_slim.cli import progress
from megatron_slim.errors import CheckpointError, summarise
from megatron_slim.files import to_json

TRACKER, HF_DIR, BACKEND, RELEASE = "latest_checkpointed_iteration.txt", "hf", "metadata.json", "release"
COMMON_STATE = "common_state/shard_0_1"  # Megatron's key for all that is not a tensor
# What Megatron saves beside the weights; none of it describes the model.
_NOT_WEIGHTS = ("optimizer", "chained_", "opt_param_scheduler", "rng_state", "rerun_state_machine")


def _pieces(
    weight: Weight, shape: ModelShape, read: Callable[[str], Tensor]
) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Key, offsets and content of every piece of a parameter; holds one parameter, or one expert of it, at a time."""
    if not weight.stacked:
        whole = to_megatron(weight, shape, read)
        for key, rows in split_keys(weight, shape):
            yield key, (0,) * whole.dim(), whole[rows]
        return
    for expert in range(shape.num_moe_experts):
        whole = to_megatron(weight, shape, read, expert=expert)
        for _, rows in label_rows(weight, shape):
            yield weight.key, (expert, rows.start, *(0,) * (whole.dim() - 1)), whole[rows].unsqueeze(0)


def write_torch_dist(
    directory: Path,
    shape: ModelShape,
    read: Callable[[str], Tensor],
    config: Mapping[str, Any],
    *,
    copy_files_from: Path | None = None,
) -> None:
    """Write a model as a torch_dist checkpoint that ``--load`` of any parallel layout takes.

    Args:
        directory: exists, is empty (usually one from `files.new_directory`).
        shape: sizes of the model.
        read: gives a Hugging Face tensor by name; one parameter's tensors are held at a time.
        config: the model's config.json, kept in ``hf/``.
        copy_files_from: directory whose tokenizer and generation files are carried over to ``hf/``.
    """
    target = directory / RELEASE
    target.mkdir()
    writer = PieceWriter(target)
    try:
        with no_crc32():
            for weight in progress(list(weights(shape)), "writing"):
                shapes = dict(stored_shapes(weight, shape))
                for key, offsets, tensor in _pieces(weight, shape, read):
                    writer.add(key, shapes[key], offsets, tensor)
            writer.add_object(COMMON_STATE, [_common_state()])
        writer.finish()
    finally:
        writer.close()
    (target / BACKEND).write_text(to_json({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    write_hf_files(directory, config, copy_files_from)
    (directory / TRACKER).write_text(RELEASE)


def _common_state() -> dict[str, Any]:
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    return {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": content}


def hf_files(directory: Path | str) -> Path:
    """Where a Megatron checkpoint directory keeps its model's config.json and tokenizer."""
    return Path(directory) / HF_DIR


def write_hf_files(directory: Path, config: Mapping[str, Any], copy_files_from: Path | None = None) -> Path:
    """Put config.json and tokenizer files into ``DIR/hf``, where conversion and training look for the model's shape."""
    hf = hf_files(directory)
    hf.mkdir(exist_ok=True)
    (hf / CONFIG).write_text(to_json(config), encoding="utf-8")
    if copy_files_from is not None and copy_files_from.resolve() != hf.resolve():
        carry_files(copy_files_from, hf)
    return hf


def iteration_directory(path: Path) -> Path:
    """The directory of the weights: ``path`` itself, or what its latest_checkpointed_iteration.txt names.

    Raises:
        CheckpointError: there is no checkpoint, or the tracker file is torn.
    """
    if not path.is_dir():
        what = "is a file, not a checkpoint directory" if path.exists() else "no such directory"
        raise CheckpointError(what, where=str(path))
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    text = tracker.read_text(errors="replace").strip()
    if text != RELEASE and not text.isdecimal():
        raise CheckpointError(f"holds {text[:40]!r}, neither 'release' nor a number", where=str(tracker))
    found = path / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    if not found.is_dir():
        raise CheckpointError(f"names {found.name}, which does not exist", where=str(tracker))
    return found


def is_torch_dist(path: Path) -> bool:
    """Whether a directory looks like a torch_dist checkpoint."""
    return (path / TRACKER).is_file() or (path / METADATA).is_file()


class DistCheckpoint:
    """A torch_dist checkpoint of a Qwen3-Next model, checked whole; weights are read when asked for.

    Attributes:
        path: directory of the weights (``release`` or ``iter_...``).
        config_path: directory of the model's config.json and tokenizer.
        config: that config.json.
        shape: sizes of the model, MTP blocks counted from the checkpoint.
        names: every Hugging Face tensor name, in the order of the architecture table.
        dtypes: type of every Hugging Face tensor by name.
        num_ignored: entries that are not weights (optimizer, random state, ...).
    """

    def __init__(self, path: Path, config_path: Path, shape: ModelShape, metadata: Metadata) -> None:
        self.path, self.config_path, self.shape = path, config_path, shape
        self.config = read_config(config_path)
        self.weights = tuple(weights(shape))
        tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        self._entries = {key: tensors[key] for weight in self.weights for key, _ in split_keys(weight, shape)}
        self.num_ignored = len(metadata.state_dict_metadata) - len(self._entries)
        self._pieces = locate_pieces(path, self._entries, metadata.storage_data)
        self._owners: dict[str, tuple[Weight, int | None]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._last: dict[str, Tensor] = {}
        for weight in self.weights:
            dtype = self._entries[split_keys(weight, shape)[0][0]].properties.dtype
            for tensor, expert in weight.hf_tensors(shape):
                self.dtypes[tensor.name], self._owners[tensor.name] = dtype, (weight, expert)
        self.names = tuple(self.dtypes)

    @classmethod
    def open(cls, path: Path | str, hf_config: Path | str | None = None) -> DistCheckpoint:
        """Open a checkpoint directory, or one iteration of it, and check all of it but the values.

        Args:
            path: what ``--load`` takes, or the iteration's own directory.
            hf_config: directory with the model's config.json where that is not in ``hf/``.

        Raises:
            CheckpointError: missing or unknown weights, wrong shapes, missing or truncated files.
            ShapeError: config.json describes no model that can be built.
        """
        path = Path(path)
        directory = iteration_directory(path)
        metadata = read_metadata(directory)
        config_path = _find_config(path, directory, hf_config)
        entries = metadata.state_dict_metadata
        shape = shape_from_hf_config(
            read_config(config_path), mtp_num_layers=mtp_layers_in(set(entries)), where=str(config_path / CONFIG)
        )
        _check_against_table(directory, config_path, shape, entries)
        return cls(directory, config_path, shape, metadata)

    def read_weight(self, weight: Weight, *, expert: int | None = None) -> Tensor:
        """Read a whole Megatron parameter, padding of the vocabulary cut off; of a stacked one, ``expert`` alone."""
        shape = weight.shape(self.shape)
        if expert is not None:
            return self._read_rows(weight.key, expert, expert + 1)[0]
        if not weight.split:
            return self._read_rows(weight.key, 0, shape[0])
        keys = split_keys(weight, self.shape)
        return torch.cat([self._read_rows(key, 0, self._entries[key].size[0]) for key, _ in keys])

    def read(self, name: str) -> Tensor:
        """Read one Hugging Face tensor; those of the parameter that was read last cost nothing more."""
        if name not in self._last:
            weight, expert = self._owners[name]
            self._last = from_megatron(weight, self.shape, self.read_weight(weight, expert=expert), expert=expert)
        return self._last[name].clone()

    def read_rows(self, name: str, dim0_index: Index | None = None, dim1_index: Index | None = None) -> Tensor:
        """Read the given rows and columns of one Hugging Face tensor, in the order wanted."""
        return select(self.read(name), dim0_index, dim1_index)

    def tensors_of(self, weight: Weight) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors of one parameter."""
        for expert in range(self.shape.num_moe_experts) if weight.stacked else [None]:
            tensor = self.read_weight(weight, expert=expert)
            yield from from_megatron(weight, self.shape, tensor, expert=expert).items()

    def _read_rows(self, key: str, start: int, stop: int) -> Tensor:
        entry, pieces = self._entries[key], self._pieces[key]
        out = torch.empty((stop - start, *entry.size[1:]), dtype=entry.properties.dtype)
        longest = max(piece.sizes[0] for piece in pieces)
        near = bisect.bisect_right(pieces, start - longest, key=lambda piece: piece.offsets[0])
        for piece in pieces[near:]:
            if piece.offsets[0] >= stop:
                break
            first, last = max(piece.offsets[0], start), min(piece.offsets[0] + piece.sizes[0], stop)
            if first < last:
                content = piece.read()[first - piece.offsets[0] : last - piece.offsets[0]]
                rest = (slice(o, o + n) for o, n in zip(piece.offsets[1:], piece.sizes[1:], strict=True))
                out[(slice(first - start, last - start), *rest)] = content
        return out


def _find_config(path: Path, directory: Path, hf_config: Path | str | None) -> Path:
    if hf_config is not None:
        return Path(hf_config)
    for place in (hf_files(path), hf_files(directory), hf_files(directory.parent)):
        if (place / CONFIG).is_file():
            return place
    raise CheckpointError(
        f"no {HF_DIR}/{CONFIG} beside this checkpoint",
        where=str(path),
        fix="name the directory of the model's config.json with --hf-config",
    )


def _check_against_table(
    directory: Path, config_path: Path, shape: ModelShape, entries: Mapping[str, TensorStorageMetadata | Any]
) -> None:
    table = {key: (weight, size) for weight in weights(shape) for key, size in stored_shapes(weight, shape)}
    tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    faults = {
        "missing weights": [key for key in table if key not in tensors],
        "unknown weights": [key for key in tensors if key not in table and not key.startswith(_NOT_WEIGHTS)],
        "wrong shapes": [
            f"{key} {list(tensors[key].size)}, config.json says {list(size)}"
            for key, (weight, size) in table.items()
            if key in tensors and not _fits(weight, tuple(tensors[key].size), size)
        ],
    }
    found = [f"{len(names)} {kind}: {summarise(names)}" for kind, names in faults.items() if names]
    if found:
        raise CheckpointError(
            "; ".join(found), where=str(directory), fix=f"the checkpoint and {config_path} do not belong together"
        )


def _fits(weight: Weight, found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a stored shape is the wanted one; rows of the vocabulary may be padded."""
    if weight.dims[0] == "vocab":
        return len(found) == len(wanted) and found[0] >= wanted[0] and found[1:] == wanted[1:]
    return found == wanted
